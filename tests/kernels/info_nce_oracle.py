"""InfoNCE in plain Python loops over lists, straight from the definition; slow and obvious."""

from __future__ import annotations

import math


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length > 0 else 0.0


def oracle(
    query,
    key,
    log_scale,
    *,
    query_ids=None,
    key_ids=None,
    positives=None,
    hard_negatives=None,
    margin=None,
    include_query_query=False,
    symmetric=True,
    query_group=None,
    key_group=None,
    weight=None,
    unique_keys=False,
):
    """The loss, and for every query the similarities of its negatives in the direction query to key."""
    n, m, scale = len(query), len(key), math.exp(log_scale)
    positives = list(range(n)) if positives is None else positives
    answer = (lambda j: j) if key_ids is None else (lambda j: key_ids[j])

    def same_answer(i, j):
        return answer(positives[i]) == answer(j)

    def same_query(i, other):
        return same_answer(i, positives[other]) or (query_ids is not None and query_ids[i] == query_ids[other])

    def repeated(j):
        return unique_keys and any(
            key_ids[j] == key_ids[k] and (key_group is None or key_group[j] == key_group[k]) for k in range(j)
        )

    def in_group(own, other):
        return query_group is None or own == other

    def one(positive, negatives):
        kept = [s for s in negatives if margin is None or s <= positive + margin]
        # Highest excess first, as in every stable log-sum-exp.
        top = max([0.0, *[scale * (s - positive) for s in kept]])
        loss = top + math.log(math.exp(-top) + sum(math.exp(scale * (s - positive) - top) for s in kept))
        return loss, kept

    forward, backward, kept_of = [], [], []
    for i in range(n):
        own = None if query_group is None else query_group[i]
        positive = cosine(query[i], key[positives[i]])
        negatives = [
            cosine(query[i], key[j])
            for j in range(m)
            if not same_answer(i, j) and not repeated(j) and in_group(own, None if key_group is None else key_group[j])
        ]
        others = [
            other
            for other in range(n)
            if not same_query(i, other) and in_group(own, None if query_group is None else query_group[other])
        ]
        if include_query_query:
            negatives += [cosine(query[i], query[other]) for other in others]
        if hard_negatives is not None:
            negatives += [cosine(query[i], hard) for hard in hard_negatives[i]]
        loss, kept = one(positive, negatives)
        forward.append(loss)
        kept_of.append((positive, kept))
        backward.append(one(positive, [cosine(key[positives[i]], query[other]) for other in others])[0])
    losses = [(a + b) / 2 for a, b in zip(forward, backward, strict=True)] if symmetric else forward
    weight = [1.0] * n if weight is None else weight
    total = sum(weight)
    mean = sum(w * loss for w, loss in zip(weight, losses, strict=True)) / total if total else 0.0
    return mean, kept_of

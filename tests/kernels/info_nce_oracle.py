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
    positives = [[i] for i in range(n)] if positives is None else positives
    positives = [[p for p in one if p >= 0] if isinstance(one, list) else [one] for one in positives]
    answer = (lambda j: j) if key_ids is None else (lambda j: key_ids[j])

    def same_answer(i, j):
        return answer(j) in [answer(p) for p in positives[i]]

    def same_query(i, other):
        return any(same_answer(i, p) for p in positives[other]) or (
            query_ids is not None and query_ids[i] == query_ids[other]
        )

    def repeated(j):
        return unique_keys and any(
            key_ids[j] == key_ids[k] and (key_group is None or key_group[j] == key_group[k]) for k in range(j)
        )

    def in_group(own, other):
        return query_group is None or own == other

    def one(positive, negatives, closest):
        kept = [s for s in negatives if margin is None or s <= closest + margin]
        # Highest excess first, as in every stable log-sum-exp.
        top = max([0.0, *[scale * (s - positive) for s in kept]])
        loss = top + math.log(math.exp(-top) + sum(math.exp(scale * (s - positive) - top) for s in kept))
        return loss, kept

    def others_in_group(i):
        return [
            other
            for other in range(n)
            if other != i
            and (query_ids is None or query_ids[i] != query_ids[other])
            and (query_group is None or query_group[i] == query_group[other])
        ]

    forward, backward, kept_of = [], [], []
    for i in range(n):
        own = None if query_group is None else query_group[i]
        own_keys = [key[p] for p in positives[i]]
        similar = [cosine(query[i], one_key) for one_key in own_keys]
        negatives = [
            cosine(query[i], key[j])
            for j in range(m)
            if not same_answer(i, j) and not repeated(j) and in_group(own, None if key_group is None else key_group[j])
        ]
        others = [other for other in others_in_group(i) if not same_query(i, other)]
        if include_query_query:
            negatives += [cosine(query[i], query[other]) for other in others]
        if hard_negatives is not None:
            negatives += [cosine(query[i], hard) for hard in hard_negatives[i]]
        found = [one(positive, negatives, max(similar)) for positive in similar]
        forward.append(sum(loss for loss, _ in found) / len(found))
        kept_of.append((max(similar), found[0][1]))
        back = [
            one(
                positive,
                [
                    cosine(own_key, query[other])
                    for other in others_in_group(i)
                    if answer(p) not in [answer(q) for q in positives[other]]
                ],
                positive,
            )[0]
            for p, own_key, positive in zip(positives[i], own_keys, similar, strict=True)
        ]
        backward.append(sum(back) / len(back))
    losses = [(a + b) / 2 for a, b in zip(forward, backward, strict=True)] if symmetric else forward
    weight = [1.0] * n if weight is None else weight
    total = sum(weight)
    mean = sum(w * loss for w, loss in zip(weight, losses, strict=True)) / total if total else 0.0
    return mean, kept_of

"""The public functions of InfoNCE."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from instructue_kernels import triton_support
from instructue_kernels.info_nce import fused
from instructue_kernels.info_nce.chunked import Problem, chunks, contrast, contrast_once
from instructue_kernels.info_nce.directions import Direction, Pairs, directions
from instructue_kernels.info_nce.reference import closest, compute_dtype, contrast_reference, unit_rows

# N = queries, M = keys, D = size of a vector, R = own hard negatives of a query

Impl = Literal["auto", "triton", "chunked", "reference"]

_CHUNK_FROM_SIMILARITIES = 2**18
"""Below this the reference's workspace is a few MB and chunking only costs the recompute."""


class InfoNceStats(NamedTuple):
    """What a batch looks like, query to key; scalar tensors without gradient, over this rank's queries.

    Attributes:
        accuracy: Share of queries, of those with a negative, whose positive is closest; NaN if none has a negative.
        positive_similarity: Mean cosine of query and positive; NaN without queries.
        negatives: Mean number of negatives of a query; NaN without queries.
        without_negatives: How many queries of positive weight have none, so their loss is 0.
    """

    accuracy: torch.Tensor
    positive_similarity: torch.Tensor
    negatives: torch.Tensor
    without_negatives: torch.Tensor


def info_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    log_scale: torch.Tensor,
    *,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    positives: torch.Tensor | None = None,
    hard_negatives: torch.Tensor | None = None,
    margin: float | None = None,
    include_query_query: bool = False,
    symmetric: bool = True,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
    query_group: torch.Tensor | None = None,
    key_group: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    unique_keys: bool = False,
) -> torch.Tensor:
    """Contrastive loss of queries against keys on cosines, without ever holding all similarities.

    With `s` for cosines, `p_i` the positive of query i and `negatives(i)` what the masks leave:

        loss_i = log(1 + sum over j in negatives(i) of exp(scale * (s_ij - s_i,p_i)))

    A query without negatives has loss 0 and counts in the mean.

    Args:
        query: `[N, D]` queries of any length; a zero vector has cosine 0 with everything and no gradient.
        key: `[M, D]` keys; M may differ from N, and keys may be a list of distinct answers.
        log_scale: Scalar tensor; `scale = exp(log_scale)` is one over the temperature. The caller clamps it.
        query_ids: `[N]` int64. A *query* is no negative of a query with the same id, nor of that one's positive.
        key_ids: `[M]` int64. A key with the id of the query's positive is the same answer and no negative.
        positives: `[N]` int64 place of each query's positive in `key`; by default query i belongs to key i. Several
            positives: `[N, P]`, with -1 behind the last of a query that has fewer. Its loss is the mean over them, and
            none of them is a negative of another.
        hard_negatives: `[N, R, D]` further negatives of each query alone; only `margin` may drop them.
        margin: Drops candidates with `s_ij > s_i,p_i + margin` as unlabelled positives, p_i the closest positive; a
            decision without gradient.
        include_query_query: Other queries are candidates too, unless their positive is the same answer.
        symmetric: Also contrasts each query's positive key against the queries and takes the mean of both.
        group: Ranks whose keys (and queries, where these are candidates) are candidates here too. Every rank must call
            this and run the backward. The loss is scaled so that the mean over ranks, of the loss and of the gradients
            as DistributedDataParallel takes it, is that of one process holding all rows. Ranks may differ in N and M.
        impl: `reference`; `chunked` (plain torch, memory bounded); `triton` (kernels, memory bounded; NaN for a scale
            above 160); or `auto`: `reference` below 262,144 similarities, from there `triton` for float16 and bfloat16
            vectors on a GPU, else `chunked`.
        query_group: `[N]` int64, given with `key_group`: only candidates of the same group are negatives.
        key_group: `[M]` int64. The positive counts whatever its group.
        weight: `[N]` weights of the mean, at least 0, without gradient; if all are 0 the loss is 0.
        unique_keys: Of the keys of one id and group, over all ranks, one is a candidate: for closed sets of answers,
            which every rank encodes for itself. Needs `key_ids`.

    Returns:
        Scalar, float64 if an input is, else float32 (also under autocast); once differentiable in `query`, `key`,
        `log_scale` and `hard_negatives`.

    Raises:
        ValueError: A shape or dtype does not fit, `positives` points outside `key`, `impl` is unknown or cannot run
            here, or the ranks disagree.

    Source: joint loss of arXiv 2510.11016 (InstructUE); false negatives by margin as in arXiv 2602.14492 (Q-Anchor).

    Example:
        >>> user, answer = torch.eye(2), torch.eye(2)
        >>> round(info_nce(user, answer, torch.tensor(0.0)).item(), 4)  # log(1 + exp(-1))
        0.3133
        >>> info_nce(user, answer, torch.tensor(0.0), key_ids=torch.tensor([7, 7])).item()  # one answer: no negatives
        0.0
    """
    if impl not in ("auto", "triton", "chunked", "reference"):
        raise ValueError(f"impl {impl!r} is unknown; use auto, triton, chunked or reference")
    pairs = _checked(query, key, query_ids, key_ids, positives, hard_negatives, margin, query_group, key_group)
    _check_unique(unique_keys, key_ids)
    if log_scale.numel() != 1 or not log_scale.is_floating_point():
        raise ValueError(f"log_scale must be one floating point number, not {log_scale.dtype} {tuple(log_scale.shape)}")
    weight_N = _weights(weight, pairs)
    with torch.autocast(query.device.type, enabled=False):
        switches = {"include_query_query": include_query_query, "symmetric": symmetric, "unique_keys": unique_keys}
        chosen = _choose(impl, pairs)
        found = directions(pairs, **switches, group=group, merge=chosen != "reference")
        total = weight_N.sum()
        if group is not None:
            dist.all_reduce(total, group=group)
            weight_N = weight_N * dist.get_world_size(group)
        weight_N = weight_N / (torch.where(total > 0, total, 1) * (1 + symmetric))
        log_scale = log_scale.reshape(()).to(query.device)
        losses = [_contrast(one, weight_N, log_scale, margin, chosen) for one in found]
        return torch.stack(losses).sum()


def info_nce_stats(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    positives: torch.Tensor | None = None,
    hard_negatives: torch.Tensor | None = None,
    margin: float | None = None,
    include_query_query: bool = False,
    group: dist.ProcessGroup | None = None,
    query_group: torch.Tensor | None = None,
    key_group: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    unique_keys: bool = False,
) -> InfoNceStats:
    """How well queries find their keys among the candidates that `info_nce` sees; arguments as there.

    A tie counts as wrong, so collapsed embeddings do not look accurate. Means are weighted by `weight`.

    Raises:
        ValueError: As `info_nce`.

    Example:
        >>> stats = info_nce_stats(torch.eye(3), torch.eye(3), key_ids=torch.tensor([1, 2, 2]))
        >>> stats.accuracy.item(), round(stats.negatives.item(), 2)
        (1.0, 1.33)
    """
    pairs = _checked(query, key, query_ids, key_ids, positives, hard_negatives, margin, query_group, key_group)
    _check_unique(unique_keys, key_ids)
    weight_N = _weights(weight, pairs)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        switches = {"include_query_query": include_query_query, "symmetric": False, "unique_keys": unique_keys}
        (own,) = directions(pairs, **switches, group=group)
        unit_KD = unit_rows(own.candidate_KD, compute_dtype(own.anchor_ND, own.candidate_KD))
        closest_N, positive_N = unit_KD.new_empty(len(query)), unit_KD.new_empty(len(query))
        count_N = own.positive_NP.new_empty(len(query))
        problem = Problem(
            own.positive_NP, own.anchor_labels_LN, own.candidate_labels_LK, (True, True, True), False, margin
        )
        for chunk in chunks(own.anchor_ND, unit_KD, own.hard_NRD, problem):
            assert chunk.negative_CK is not None
            cosine, negative = chunk.cosine_CK, chunk.negative_CK
            if chunk.cosine_CR is not None and chunk.negative_CR is not None:
                cosine = torch.cat([cosine, chunk.cosine_CR], dim=1)
                negative = torch.cat([negative, chunk.negative_CR], dim=1)
            closest_N[chunk.rows] = cosine.masked_fill_(~negative, -torch.inf).amax(dim=1)
            positive_N[chunk.rows] = closest(chunk.positive_CP, own.positive_NP[chunk.rows]).squeeze(1)
            count_N[chunk.rows] = negative.sum(dim=1)
    contested_N = weight_N * (count_N > 0)
    return InfoNceStats(
        accuracy=((positive_N > closest_N) * contested_N).sum() / contested_N.sum(),
        positive_similarity=(positive_N * weight_N).sum() / weight_N.sum(),
        negatives=(count_N * weight_N).sum() / weight_N.sum(),
        without_negatives=((count_N == 0) & (weight_N > 0)).sum(),
    )


def explain_choice() -> str:
    """What `impl="auto"` does on this machine, in words.

    >>> explain_choice().startswith("auto: plain torch below 262,144 similarities; from there ")
    True
    """
    start = f"auto: plain torch below {_CHUNK_FROM_SIMILARITIES:,} similarities; from there"
    if triton_support.auto_allowed("cuda"):
        return f"{start} kernels ({triton_support.where()}) for float16 and bfloat16, row chunks for other types"
    return f"{start} row chunks of bounded memory (no kernels: {triton_support.why_not()})"


def _choose(impl: Impl, pairs: Pairs) -> str:
    """The implementation that `auto` stands for.

    Raises:
        ValueError: The one asked for cannot run here.
    """
    query, key = pairs.query_ND, pairs.key_MD
    if impl == "triton":
        reason = fused.problem(query, key)
        if reason is not None:
            raise ValueError(f"impl 'triton' cannot run here: {reason}; use 'auto' or 'chunked'")
    if impl != "auto":
        return impl
    if len(query) * len(key) < _CHUNK_FROM_SIMILARITIES:
        return "reference"
    half = query.dtype == key.dtype and query.dtype in (torch.float16, torch.bfloat16)
    return "triton" if half and triton_support.auto_allowed(query.device.type) else "chunked"


def _contrast(
    own: Direction, weight_N: torch.Tensor, log_scale: torch.Tensor, margin: float | None, impl: str
) -> torch.Tensor:
    """Weighted sum of the losses of a direction, or of both."""
    if own.share_N is not None:
        weight_N = weight_N.repeat_interleave(own.several) * own.share_N.to(weight_N.dtype)
    tensors = (own.anchor_ND, own.candidate_KD, log_scale, own.hard_NRD)
    labels = (own.positive_NP, own.anchor_labels_LN, own.candidate_labels_LK)
    if impl == "reference":
        return (contrast_reference(*tensors, *labels, margin) * weight_N).sum()
    needs = [one is not None and one.requires_grad and torch.is_grad_enabled() for one in tensors]
    # float16 gradients must be formed from the gradient that comes back: a scaled loss's is too large for float16, and
    # without it they are too small.
    half = any(one is not None and one.dtype == torch.float16 for one in tensors)
    if impl == "chunked" and not own.both and any(needs) and not half:
        loss: torch.Tensor = contrast_once(weight_N, needs, *tensors, *labels, own.compared, margin, 0)[0]
        return loss
    run = fused.contrast_fused if impl == "triton" else contrast
    loss_SN: torch.Tensor = run(*tensors, *labels, own.compared, own.both, margin, 0)[0]
    return (loss_SN * weight_N).sum()


def _weights(weight: torch.Tensor | None, pairs: Pairs) -> torch.Tensor:
    rows = len(pairs.query_ND)
    dtype = compute_dtype(pairs.query_ND, pairs.key_MD)
    if weight is None:
        return pairs.query_ND.new_ones(rows, dtype=dtype)
    if weight.shape != (rows,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but there are {rows} queries")
    return weight.detach().to(dtype)


def _check_unique(unique_keys: bool, key_ids: torch.Tensor | None) -> None:
    if unique_keys and key_ids is None:
        raise ValueError("unique_keys needs key_ids, which say what keys are the same")


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    positives: torch.Tensor | None,
    hard_negatives: torch.Tensor | None,
    margin: float | None,
    query_group: torch.Tensor | None,
    key_group: torch.Tensor | None,
) -> Pairs:
    if query.dim() != 2 or key.dim() != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must be [N, D] and [M, D]")
    if (query_group is None) != (key_group is None):
        raise ValueError("query_group and key_group must be given together")
    if margin is not None and not 0 <= margin < float("inf"):
        raise ValueError(f"margin {margin} must be a number from 0 up, or None for none")
    queries, keys = len(query), len(key)
    labels = {"query_ids": (query_ids, queries), "key_ids": (key_ids, keys)}
    if positives is None or positives.dim() != 2:
        labels["positives"] = (positives, queries)
    elif len(positives) != queries or not positives.shape[1] or positives.dtype != torch.int64:
        raise ValueError(f"positives must be int64 [{queries}, P], not {positives.dtype} {list(positives.shape)}")
    labels |= {"query_group": (query_group, queries), "key_group": (key_group, keys)}
    for name, (tensor, rows) in labels.items():
        if tensor is not None and (tensor.shape != (rows,) or tensor.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 [{rows}], not {tensor.dtype} {list(tensor.shape)}")
    hard = hard_negatives
    if hard is not None and (hard.dim() != 3 or (hard.shape[0], hard.shape[2]) != tuple(query.shape)):
        raise ValueError(f"hard_negatives {tuple(hard.shape)} must be [{queries}, R, {query.shape[1]}]")
    in_order, given = positives is None, positives
    if positives is None:
        if queries > keys:
            raise ValueError(f"{queries} queries but {keys} keys; say in `positives` which key belongs to which query")
        positives = torch.arange(queries, device=query.device)
    # Looking at values stops a GPU and breaks a graph; there, an index out of range fails in the gather itself.
    elif positives.device.type == "cpu" and not torch.compiler.is_compiling() and queries:
        if positives.dim() == 2:
            if bool((positives[:, 0] < 0).any()):
                raise ValueError("every query needs a positive: the first column of `positives` must not be -1")
            positives = torch.where(positives == -1, positives[:, :1], positives)
        low, high = int(positives.min()), int(positives.max())
        if low < 0 or high >= keys:
            raise ValueError(f"positives go from {low} to {high}, but there are {keys} keys")
    places = given if given is not None else positives
    places = places[:, None] if places.dim() == 1 else places
    return Pairs(query, key, places, hard, query_ids, key_ids, query_group, key_group, in_order)

"""Queries and keys, of one process or of all ranks, as the one or two contrasts that make up the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from instructue_kernels.info_nce.gather import gather_rows, sizes_of_ranks
from instructue_kernels.info_nce.reference import shares

# N = own queries, M = own keys, Q = queries of all ranks, A = keys of all ranks, K = candidates, D = size of a vector
# R = own hard negatives of a query, P = positives of a query, L = labels of a row: its group, its owner, its answers


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the caller gave, shapes checked.

    Attributes:
        query_ND: `[N, D]` queries.
        key_MD: `[M, D]` keys.
        positive_NP: `[N, P]` int64 places of each query's positives among the own keys; -1 is none.
        hard_NRD: `[N, R, D]` own negatives of each query.
        query_ids_N: `[N]` int64; queries of one id are never negatives of each other.
        key_ids_M: `[M]` int64; keys of one id are the same answer.
        query_group_N: `[N]` int64; only candidates of the same group are negatives.
        key_group_M: `[M]` int64.
        in_order: Query i belongs to key i and to no other.
    """

    query_ND: torch.Tensor
    key_MD: torch.Tensor
    positive_NP: torch.Tensor
    hard_NRD: torch.Tensor | None
    query_ids_N: torch.Tensor | None
    key_ids_M: torch.Tensor | None
    query_group_N: torch.Tensor | None
    key_group_M: torch.Tensor | None
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class Direction:
    """Anchors against candidates.

    Attributes:
        anchor_ND: `[N, D]` anchors, always of this process.
        candidate_KD: `[K, D]` candidates, of all ranks.
        hard_NRD: `[N, R, D]` own hard negatives or None.
        positive_NP: `[N, P]` places of each anchor's positives among the candidates; -1 is none.
        anchor_labels_LN: `[L, N]` group, owner, answers.
        candidate_labels_LK: `[L, K]` the same of the candidates.
        compared: Whether groups, owners and answers differ at all. Where answers are not compared, an anchor's positive
            is the one candidate that is no negative.
        both: Candidate i is the positive of anchor i, for all N of them, and is an anchor itself, against the anchors
            as candidates. So one pass over the similarities yields both directions.
        share_N: `[N]` weight of each anchor, if a query's positives are anchors one by one.
        several: How many anchors a query has.
    """

    anchor_ND: torch.Tensor
    candidate_KD: torch.Tensor
    hard_NRD: torch.Tensor | None
    positive_NP: torch.Tensor
    anchor_labels_LN: torch.Tensor
    candidate_labels_LK: torch.Tensor
    compared: tuple[bool, bool, bool]
    both: bool = False
    share_N: torch.Tensor | None = None
    several: int = 1


@dataclass(frozen=True, slots=True)
class _Ranks:
    """How to bring together the rows of all ranks."""

    queries: list[int]
    keys: list[int]
    rank: int
    group: dist.ProcessGroup

    def queries_of_all(self, rows_N: torch.Tensor) -> torch.Tensor:
        return gather_rows(rows_N, self.queries, self.group)

    def keys_of_all(self, rows_M: torch.Tensor) -> torch.Tensor:
        return gather_rows(rows_M, self.keys, self.group)


def directions(
    pairs: Pairs,
    *,
    include_query_query: bool,
    symmetric: bool,
    unique_keys: bool,
    group: dist.ProcessGroup | None,
    merge: bool = False,
) -> list[Direction]:
    """Query to key, and key to query if `symmetric`; with `merge` as one where that is possible.

    Raises:
        ValueError: The ranks of `group` disagree on the vectors' size or on which arguments are given.
    """
    queries_too = include_query_query or symmetric
    ranks = None if group is None else _meet(pairs, [include_query_query, symmetric, unique_keys], group)
    query_ND, key_MD, positive_NP = pairs.query_ND, pairs.key_MD, pairs.positive_NP
    own_query_N = torch.arange(len(query_ND), device=query_ND.device)
    key_labels_M2 = torch.stack(
        [
            positive_NP.new_zeros(len(key_MD)) if pairs.key_group_M is None else pairs.key_group_M,
            torch.arange(len(key_MD), device=key_MD.device) if pairs.key_ids_M is None else pairs.key_ids_M,
        ],
        dim=1,
    )
    key_AD, key_labels_A2 = key_MD, key_labels_M2
    if ranks is not None:
        key_AD, key_labels_A2 = ranks.keys_of_all(key_MD), ranks.keys_of_all(key_labels_M2)
        positive_NP = torch.where(positive_NP < 0, positive_NP, positive_NP + sum(ranks.keys[: ranks.rank]))
        own_query_N = own_query_N + sum(ranks.queries[: ranks.rank])
        if pairs.key_ids_M is None:
            key_labels_A2[:, 1] = torch.arange(len(key_AD), device=key_AD.device)
    # A place without a positive repeats the answer of the first, which changes no mask.
    filled_NP = torch.where(positive_NP < 0, positive_NP[:, :1], positive_NP)
    # Without ids nobody has the owner of a candidate: anchors are 0, candidates 1.
    zeros_N = torch.zeros_like(own_query_N)
    labels_NL = torch.cat(
        [
            (zeros_N if pairs.query_group_N is None else pairs.query_group_N)[:, None],
            (zeros_N if pairs.query_ids_N is None else pairs.query_ids_N)[:, None],
            key_labels_A2[filled_NP, 1],
        ],
        dim=1,
    )
    query_QD, labels_QL = query_ND, labels_NL
    if ranks is not None and queries_too:
        query_QD, labels_QL = ranks.queries_of_all(query_ND), ranks.queries_of_all(labels_NL)
    query_candidates_LQ = labels_QL.T.clone()
    query_candidates_LQ[1] += 1 if pairs.query_ids_N is None else 0
    # Keys have no owner: one below every query id differs from all of them.
    nobody = labels_QL[:, 1].min() - 1 if len(labels_QL) else positive_NP.new_tensor(-1)
    group_A, answer_A = key_labels_A2.T
    if unique_keys and len(labels_NL):
        # One above every group of the anchors: a repeated key stands in no anchor's group.
        group_A = torch.where(_repeats(answer_A, group_A), labels_NL[:, 0].max() + 1, group_A)
    candidate_KD, candidate_labels_LK = key_AD, torch.stack([group_A, nobody.expand(len(key_AD)), answer_A])
    if include_query_query:
        candidate_KD = torch.cat([key_AD, query_QD])
        answers_PA = answer_A.expand(positive_NP.shape[1], -1)
        candidate_labels_LK = torch.cat([torch.cat([candidate_labels_LK[:2], answers_PA]), query_candidates_LQ], dim=1)
    anchor_labels_LN = labels_NL.T.contiguous()
    one_each = pairs.in_order and pairs.key_ids_M is None
    merged = merge and symmetric and pairs.in_order and ranks is None
    compared = (
        pairs.query_group_N is not None or unique_keys,
        pairs.query_ids_N is not None and (include_query_query or merged),
        include_query_query or pairs.key_ids_M is not None or positive_NP.shape[1] > 1,
    )
    first = (query_ND, candidate_KD, pairs.hard_NRD, positive_NP, anchor_labels_LN, candidate_labels_LK, compared)
    if not symmetric or merged:
        return [Direction(*first, both=merged)]
    several = positive_NP.shape[1]
    anchor_labels_LX = anchor_labels_LN.repeat_interleave(several, dim=1)[:3].clone()
    anchor_labels_LX[2] = anchor_labels_LN[2:].T.reshape(-1)
    second = Direction(
        key_MD[pairs.positive_NP.clamp(min=0).reshape(-1)],
        query_QD,
        None,
        own_query_N.repeat_interleave(several)[:, None],
        anchor_labels_LX,
        query_candidates_LQ,
        (pairs.query_group_N is not None, pairs.query_ids_N is not None, not one_each),
        share_N=None if several == 1 else shares(positive_NP, torch.float64).reshape(-1),
        several=several,
    )
    return [Direction(*first), second]


def _repeats(answer_A: torch.Tensor, group_A: torch.Tensor) -> torch.Tensor:
    """`[A]` bool: keys whose answer has already occurred in their group."""
    order_A = torch.argsort(answer_A, stable=True)
    order_A = order_A[torch.argsort(group_A[order_A], stable=True)]
    answer_A, group_A = answer_A[order_A], group_A[order_A]
    repeats_A = torch.zeros_like(answer_A, dtype=torch.bool)
    repeats_A[order_A[1:]] = (answer_A[1:] == answer_A[:-1]) & (group_A[1:] == group_A[:-1])
    return repeats_A


def _meet(pairs: Pairs, switches: list[bool], group: dist.ProcessGroup) -> _Ranks:
    """Sizes of every rank; what must be the same on all of them is compared first, since a mismatch would hang."""
    grad = torch.is_grad_enabled()
    same = [
        pairs.key_MD.shape[1],
        pairs.positive_NP.shape[1],
        *[int(one) for one in switches],
        int(pairs.query_ids_N is not None),
        int(pairs.key_ids_M is not None),
        int(pairs.query_group_N is not None),
        int(grad and pairs.query_ND.requires_grad),
        int(grad and pairs.key_MD.requires_grad),
    ]
    numbers = [len(pairs.query_ND), len(pairs.key_MD), *same]
    found_R = sizes_of_ranks(numbers, group, pairs.query_ND.device)
    if (found_R[:, 2:] != found_R[0, 2:]).any():
        raise ValueError(
            "the ranks disagree: size of the vectors, positives of a query, include_query_query, symmetric, "
            "unique_keys, query_ids, key_ids, groups, gradient of queries and of keys are "
            f"{found_R[:, 2:].tolist()}; give every rank the same arguments"
        )
    return _Ranks(found_R[:, 0].tolist(), found_R[:, 1].tolist(), dist.get_rank(group), group)

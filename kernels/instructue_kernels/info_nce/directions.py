"""Queries and keys, of one process or of all ranks, as the one or two contrasts that make up the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from instructue_kernels.info_nce.gather import gather_rows, sizes_of_ranks

# N = own queries, M = own keys, Q = queries of all ranks, A = keys of all ranks, K = candidates, D = size of a vector
# R = own hard negatives of a query, 3 = labels of a row: its answer, its group, its owner


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the caller gave, shapes checked.

    Attributes:
        query_ND: `[N, D]` queries.
        key_MD: `[M, D]` keys.
        positive_N: `[N]` int64 place of each query's positive among the own keys.
        hard_NRD: `[N, R, D]` own negatives of each query.
        query_ids_N: `[N]` int64; queries of one id are never negatives of each other.
        key_ids_M: `[M]` int64; keys of one id are the same answer.
        query_group_N: `[N]` int64; only candidates of the same group are negatives.
        key_group_M: `[M]` int64.
    """

    query_ND: torch.Tensor
    key_MD: torch.Tensor
    positive_N: torch.Tensor
    hard_NRD: torch.Tensor | None
    query_ids_N: torch.Tensor | None
    key_ids_M: torch.Tensor | None
    query_group_N: torch.Tensor | None
    key_group_M: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Direction:
    """Anchors against candidates: the tensors that `contrast` and `contrast_reference` take first, in their order.

    Attributes:
        anchor_ND: `[N, D]` anchors, always of this process.
        candidate_KD: `[K, D]` candidates, of all ranks.
        hard_NRD: `[N, R, D]` own hard negatives or None.
        positive_N: `[N]` place of each anchor's positive among the candidates.
        anchor_labels_3N: `[3, N]` answer, group, owner.
        candidate_labels_3K: `[3, K]` the same of the candidates.
    """

    anchor_ND: torch.Tensor
    candidate_KD: torch.Tensor
    hard_NRD: torch.Tensor | None
    positive_N: torch.Tensor
    anchor_labels_3N: torch.Tensor
    candidate_labels_3K: torch.Tensor


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
) -> list[Direction]:
    """Query to key, and key to query if `symmetric`.

    Raises:
        ValueError: The ranks of `group` disagree on the vectors' size or on which arguments are given.
    """
    queries_too = include_query_query or symmetric
    ranks = None if group is None else _meet(pairs, [include_query_query, symmetric, unique_keys], group)
    query_ND, key_MD, positive_N = pairs.query_ND, pairs.key_MD, pairs.positive_N
    own_query_N = torch.arange(len(query_ND), device=query_ND.device)
    key_labels_M2 = torch.stack(
        [
            torch.arange(len(key_MD), device=key_MD.device) if pairs.key_ids_M is None else pairs.key_ids_M,
            positive_N.new_zeros(len(key_MD)) if pairs.key_group_M is None else pairs.key_group_M,
        ],
        dim=1,
    )
    key_AD, key_labels_A2 = key_MD, key_labels_M2
    if ranks is not None:
        key_AD, key_labels_A2 = ranks.keys_of_all(key_MD), ranks.keys_of_all(key_labels_M2)
        positive_N = positive_N + sum(ranks.keys[: ranks.rank])
        own_query_N = own_query_N + sum(ranks.queries[: ranks.rank])
        if pairs.key_ids_M is None:
            key_labels_A2[:, 0] = torch.arange(len(key_AD), device=key_AD.device)
    # Without ids nobody has the owner of a candidate: anchors are 0, candidates 1.
    zeros_N = torch.zeros_like(positive_N)
    labels_N3 = torch.stack(
        [
            key_labels_A2[positive_N, 0],
            zeros_N if pairs.query_group_N is None else pairs.query_group_N,
            zeros_N if pairs.query_ids_N is None else pairs.query_ids_N,
        ],
        dim=1,
    )
    query_QD, labels_Q3 = query_ND, labels_N3
    if ranks is not None and queries_too:
        query_QD, labels_Q3 = ranks.queries_of_all(query_ND), ranks.queries_of_all(labels_N3)
    owner_Q = labels_Q3[:, 2] + (1 if pairs.query_ids_N is None else 0)
    query_candidates_3Q = torch.stack([labels_Q3[:, 0], labels_Q3[:, 1], owner_Q])
    # Keys have no owner: one below every query id differs from all of them.
    nobody = labels_Q3[:, 2].min() - 1 if len(labels_Q3) else positive_N.new_tensor(-1)
    answer_A, group_A = key_labels_A2.T
    if unique_keys and len(labels_N3):
        # One above every group of the anchors: a repeated key stands in no anchor's group.
        group_A = torch.where(_repeats(answer_A, group_A), labels_N3[:, 1].max() + 1, group_A)
    candidate_KD, candidate_labels_3K = key_AD, torch.stack([answer_A, group_A, nobody.expand(len(key_AD))])
    if include_query_query:
        candidate_KD = torch.cat([key_AD, query_QD])
        candidate_labels_3K = torch.cat([candidate_labels_3K, query_candidates_3Q], dim=1)
    anchor_labels_3N = labels_N3.T.contiguous()
    found = [Direction(query_ND, candidate_KD, pairs.hard_NRD, positive_N, anchor_labels_3N, candidate_labels_3K)]
    if symmetric:
        anchor_ND = key_MD[pairs.positive_N]
        found.append(Direction(anchor_ND, query_QD, None, own_query_N, anchor_labels_3N, query_candidates_3Q))
    return found


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
            "the ranks disagree: size of the vectors, include_query_query, symmetric, unique_keys, query_ids, key_ids, "
            "groups, gradient of queries and of keys are "
            f"{found_R[:, 2:].tolist()}; give every rank the same arguments"
        )
    return _Ranks(found_R[:, 0].tolist(), found_R[:, 1].tolist(), dist.get_rank(group), group)

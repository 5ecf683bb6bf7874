"""One direction of the loss, written to be read: plain torch with the whole similarity matrix."""

from __future__ import annotations

import torch

# N = anchors, K = candidates, D = size of a vector, R = own hard negatives of an anchor
# 3 = labels of a row: its answer, its group, its owner

_SMALLEST_NORM = 1e-12
"""A shorter vector has no direction: its cosine is 0 with everything and it gets no gradient."""


def contrast_reference(
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    positive_N: torch.Tensor,
    anchor_labels_3N: torch.Tensor,
    candidate_labels_3K: torch.Tensor,
    margin: float | None,
) -> torch.Tensor:
    """InfoNCE of every anchor against the candidates.

        loss_i = log(1 + sum over negatives j of exp(scale * (cos_ij - cos_i,positive_i)))

    Args:
        anchor_ND: `[N, D]` vectors of any length.
        candidate_KD: `[K, D]` vectors of any length.
        log_scale: Scalar; `scale = exp(log_scale)` is one over the temperature.
        hard_NRD: `[N, R, D]` further negatives of each anchor alone.
        positive_N: `[N]` int64 place of each anchor's positive among the candidates.
        anchor_labels_3N: `[3, N]` int64, see `negatives`.
        candidate_labels_3K: `[3, K]` int64.
        margin: See `within_margin`.

    Returns:
        `[N]` losses, float64 if an input is, else float32; autograd keeps several `[N, K + R]` tensors.
    """
    dtype = compute_dtype(anchor_ND, candidate_KD)
    anchor_ND, candidate_KD = unit_rows(anchor_ND, dtype), unit_rows(candidate_KD, dtype)
    cosine_NK = anchor_ND @ candidate_KD.T
    positive_N1 = cosine_NK.gather(1, positive_N[:, None])
    negative_NK = negatives(anchor_labels_3N, candidate_labels_3K) & within_margin(cosine_NK, positive_N1, margin)
    if hard_NRD is not None:
        hard_NR = torch.einsum("nd,nrd->nr", anchor_ND, unit_rows(hard_NRD, dtype))
        cosine_NK = torch.cat([cosine_NK, hard_NR], dim=1)
        negative_NK = torch.cat([negative_NK, within_margin(hard_NR, positive_N1, margin)], dim=1)
    excess_NK = torch.where(negative_NK, log_scale.to(dtype).exp() * (cosine_NK - positive_N1), -torch.inf)
    # 1 stands for the positive: exact where the loss is tiny. The shift keeps a huge one from overflowing.
    shift_N = torch.cat([excess_NK.detach(), torch.zeros_like(positive_N1)], dim=1).amax(dim=1)
    total_N = torch.exp(excess_NK - shift_N[:, None]).sum(dim=1)
    return shift_N + torch.log1p(torch.expm1(-shift_N) + total_N)


def negatives(anchor_labels_3N: torch.Tensor, candidate_labels_3K: torch.Tensor) -> torch.Tensor:
    """Which candidates may be negatives of which anchors, by label.

    Returns:
        `[N, K]` bool: another answer, the same group and another owner.
    """
    (answer_N, group_N, owner_N), (answer_K, group_K, owner_K) = anchor_labels_3N, candidate_labels_3K
    negative_NK: torch.Tensor = answer_N[:, None] != answer_K
    negative_NK &= group_N[:, None] == group_K
    negative_NK &= owner_N[:, None] != owner_K
    return negative_NK


def within_margin(cosine_NK: torch.Tensor, positive_N1: torch.Tensor, margin: float | None) -> torch.Tensor:
    """Which candidates are at most `margin` closer than the positive; closer ones count as unlabelled positives.

    Returns:
        `[N, K]` bool, a decision without gradient.
    """
    if margin is None:
        return torch.ones_like(cosine_NK, dtype=torch.bool)
    return cosine_NK.detach() <= positive_N1.detach() + margin


def unit_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[..., D]` vectors divided by their length in `dtype`; a zero vector stays zero."""
    rows = rows.to(dtype)
    return rows * inverse_norms(rows)


def inverse_norms(rows: torch.Tensor) -> torch.Tensor:
    """`[..., 1]` one over the length of each vector; 0 for a vector without direction."""
    long_enough = rows.detach().norm(dim=-1, keepdim=True) > _SMALLEST_NORM
    # Chosen before the division too, so that the branch not taken has no NaN for a gradient.
    return torch.where(long_enough, torch.where(long_enough, rows, 1.0).norm(dim=-1, keepdim=True).reciprocal(), 0.0)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if a tensor is, else float32: half types hold too few digits for a margin or a scale of 100."""
    return torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32

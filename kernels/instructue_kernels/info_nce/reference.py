"""One direction of the loss, written to be read: plain torch with the whole similarity matrix."""

from __future__ import annotations

import torch

# N = anchors, K = candidates, D = size of a vector, R = own hard negatives of an anchor, P = positives of an anchor
# L = labels of a row: its group, its owner, its answers

_SMALLEST_NORM = 1e-12
"""A shorter vector has no direction: its cosine is 0 with everything and it gets no gradient."""


def contrast_reference(
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    positive_NP: torch.Tensor,
    anchor_labels_LN: torch.Tensor,
    candidate_labels_LK: torch.Tensor,
    margin: float | None,
) -> torch.Tensor:
    """InfoNCE of every anchor against the candidates, the mean over its positives.

        loss_ip = log(1 + sum over negatives j of exp(scale * (cos_ij - cos_ip)))

    Args:
        anchor_ND: `[N, D]` vectors of any length.
        candidate_KD: `[K, D]` vectors of any length.
        log_scale: Scalar; `scale = exp(log_scale)` is one over the temperature.
        hard_NRD: `[N, R, D]` further negatives of each anchor alone.
        positive_NP: `[N, P]` int64 places of each anchor's positives among the candidates; -1 is none.
        anchor_labels_LN: `[L, N]` int64, see `negatives`.
        candidate_labels_LK: `[L, K]` int64; its number of answers may differ.
        margin: See `within_margin`.

    Returns:
        `[N]` losses, float64 if an input is, else float32; autograd keeps several `[N, K + R]` tensors.
    """
    dtype = compute_dtype(anchor_ND, candidate_KD)
    anchor_ND, candidate_KD = unit_rows(anchor_ND, dtype), unit_rows(candidate_KD, dtype)
    cosine_NK = anchor_ND @ candidate_KD.T
    similarity_NP = cosine_NK.gather(1, positive_NP.clamp(min=0))
    closest_N1 = closest(similarity_NP, positive_NP)
    negative_NK = negatives(anchor_labels_LN, candidate_labels_LK) & within_margin(cosine_NK, closest_N1, margin)
    if hard_NRD is not None:
        hard_NR = torch.einsum("nd,nrd->nr", anchor_ND, unit_rows(hard_NRD, dtype))
        cosine_NK = torch.cat([cosine_NK, hard_NR], dim=1)
        negative_NK = torch.cat([negative_NK, within_margin(hard_NR, closest_N1, margin)], dim=1)
    scale = log_scale.to(dtype).exp()
    losses_NP = [_against(one_N1, cosine_NK, negative_NK, scale) for one_N1 in torch.split(similarity_NP, 1, dim=1)]
    return (torch.stack(losses_NP, dim=1) * shares(positive_NP, dtype)).sum(dim=1)


def _against(
    positive_N1: torch.Tensor, cosine_NK: torch.Tensor, negative_NK: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`[N]` losses of one positive an anchor."""
    excess_NK = torch.where(negative_NK, scale * (cosine_NK - positive_N1), -torch.inf)
    # 1 stands for the positive: exact where the loss is tiny. The shift keeps a huge one from overflowing.
    shift_N = torch.cat([excess_NK.detach(), torch.zeros_like(positive_N1)], dim=1).amax(dim=1)
    total_N = torch.exp(excess_NK - shift_N[:, None]).sum(dim=1)
    return shift_N + torch.log1p(torch.expm1(-shift_N) + total_N)


def shares(positive_NP: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[N, P]` weight of each positive in its anchor's mean; 0 for places that hold none."""
    real_NP = (positive_NP >= 0).to(dtype)
    return real_NP / real_NP.sum(dim=1, keepdim=True)


def closest(similarity_NP: torch.Tensor, positive_NP: torch.Tensor) -> torch.Tensor:
    """`[N, 1]` highest similarity of an anchor with a positive of its own."""
    return similarity_NP.masked_fill(positive_NP < 0, -torch.inf).amax(dim=1, keepdim=True)


def negatives(anchor_labels_LN: torch.Tensor, candidate_labels_LK: torch.Tensor) -> torch.Tensor:
    """Which candidates may be negatives of which anchors, by label.

    Returns:
        `[N, K]` bool: the same group, another owner and no answer in common.
    """
    group_N, owner_N, *answers_N = anchor_labels_LN
    group_K, owner_K, *answers_K = candidate_labels_LK
    negative_NK: torch.Tensor = group_N[:, None] == group_K
    negative_NK &= owner_N[:, None] != owner_K
    for answer_N in answers_N:
        for answer_K in answers_K:
            negative_NK &= answer_N[:, None] != answer_K
    return negative_NK


def within_margin(cosine_NK: torch.Tensor, positive_N1: torch.Tensor, margin: float | None) -> torch.Tensor:
    """Which candidates are at most `margin` closer than the closest positive; others count as unlabelled positives.

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

"""Pooling of texts, written to be read: one matrix product per user."""

from __future__ import annotations

import itertools

import torch

# T = texts of all users, N = distinct texts, S = users, or other runs of texts, K = columns of weights, H = hidden size


def bounds(offsets: torch.Tensor, number: int) -> list[int]:
    """Where each run begins, and T.

    Raises:
        ValueError: They do not ascend from 0 to T.
    """
    found: list[int] = offsets.tolist()
    if not found or found[0] != 0 or found[-1] != number or found != sorted(found):
        shown = found if len(found) < 8 else f"{found[:3]}..{found[-3:]}"
        raise ValueError(f"offsets must ascend from 0 to {number}, the number of texts, not {shown}")
    return found


def text_pool_reference(
    weights_TK: torch.Tensor, soft_NH: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """`out[s] = sum of weights[t] (outer) soft[rows[t]]` over the texts t of run s.

    Returns:
        `[S, K, H]`; autograd keeps a gathered `[T, H]`.
    """
    soft_TH = soft_NH if rows is None else soft_NH[rows]
    starts = bounds(offsets, len(weights_TK))
    runs = [slice(start, end) for start, end in itertools.pairwise(starts)]
    if not runs:
        return (weights_TK.sum() + soft_TH.sum()).expand(0, weights_TK.shape[1], soft_NH.shape[1])
    return torch.stack([weights_TK[own].T @ soft_TH[own] for own in runs])

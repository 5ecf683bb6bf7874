"""Pooling of texts, a few users at a time: no tensor of all texts' soft tokens is made, forward or backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from instructue_kernels.text_pool.reference import bounds

# T = texts of all users, N = distinct texts, S = runs of texts, K = columns of weights, H = hidden size, G = runs of a
# group, L = longest of them

CPU_ELEMENTS = 2**19
"""Gathered numbers at once on a CPU: what its cache holds, 2 MB in float32."""

GPU_ELEMENTS = 2**25
"""Likewise on a GPU: what fills it."""


def forward(
    weights_TK: torch.Tensor, soft_NH: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """`[S, K, H]` sums."""
    pooled_SKH = weights_TK.new_zeros(len(offsets) - 1, weights_TK.shape[1], soft_NH.shape[1])
    for group, text_GL, valid_GL in _groups(offsets, weights_TK, soft_NH.shape[1]):
        weights_GLK = _padded(weights_TK, text_GL, valid_GL)
        pooled_SKH[group] = weights_GLK.transpose(1, 2) @ _gathered(soft_NH, text_GL, rows)
    return pooled_SKH


def backward(
    grad_SKH: torch.Tensor,
    weights_TK: torch.Tensor,
    soft_NH: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    of_weights: bool,
    of_soft: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the weights and of the soft tokens; without rows where one is not wanted."""
    grad_TK = weights_TK.new_zeros(len(weights_TK) * of_weights, weights_TK.shape[1])
    grad_NH = soft_NH.new_zeros(len(soft_NH) * of_soft, soft_NH.shape[1])
    for group, text_GL, valid_GL in _groups(offsets, weights_TK, soft_NH.shape[1]):
        grad_GKH = grad_SKH[group]
        text_X = text_GL.flatten() if valid_GL is None else text_GL[valid_GL]
        if of_weights:
            grad_GLK = _gathered(soft_NH, text_GL, rows) @ grad_GKH.transpose(1, 2)
            grad_TK[text_X] = grad_GLK.flatten(0, 1) if valid_GL is None else grad_GLK[valid_GL]
        if of_soft:
            grad_GLH = _padded(weights_TK, text_GL, valid_GL) @ grad_GKH
            grad_XH = grad_GLH.flatten(0, 1) if valid_GL is None else grad_GLH[valid_GL]
            add_rows(grad_NH, text_X if rows is None else rows[text_X], grad_XH)
    return grad_TK, grad_NH


def add_rows(total_NH: torch.Tensor, rows_X: torch.Tensor, values_XH: torch.Tensor) -> None:
    """Adds values to rows, in the same order every time: on a GPU `index_add_` would add in any order."""
    if total_NH.device.type == "cpu":
        total_NH.index_add_(0, rows_X, values_XH)
    else:
        total_NH.index_put_((rows_X,), values_XH, accumulate=True)


def _groups(
    offsets: torch.Tensor, weights_TK: torch.Tensor, hidden: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Runs that fit into the workspace together, the texts of each, and which of those are there; None for all."""
    starts = bounds(offsets, len(weights_TK))
    device = weights_TK.device
    limit = max(1, (CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // max(1, hidden))
    on_device = offsets.to(device)
    runs = len(starts) - 1
    first = 0
    while first < runs:
        longest, end = starts[first + 1] - starts[first], first + 1
        while end < runs:
            grown = max(longest, starts[end + 1] - starts[end])
            if grown * (end + 1 - first) > limit:
                break
            longest, end = grown, end + 1
        if longest:
            if end == first + 1:
                yield slice(first, end), torch.arange(starts[first], starts[end], device=device)[None], None
            else:
                place_L = torch.arange(longest, device=device)
                begin_G1 = on_device[first:end, None]
                valid_GL = place_L < on_device[first + 1 : end + 1, None] - begin_G1
                yield slice(first, end), torch.where(valid_GL, begin_G1 + place_L, 0), valid_GL
        first = end


def _padded(weights_TK: torch.Tensor, text_GL: torch.Tensor, valid_GL: torch.Tensor | None) -> torch.Tensor:
    weights_GLK = weights_TK[text_GL]
    return weights_GLK if valid_GL is None else weights_GLK.masked_fill(~valid_GL[:, :, None], 0.0)


def _gathered(soft_NH: torch.Tensor, text_GL: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    row_GL = text_GL if rows is None else rows[text_GL]
    return soft_NH.index_select(0, row_GL.flatten()).view(*row_GL.shape, -1)

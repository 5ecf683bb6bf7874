"""The Triton kernels of `text_pool`. Imported only where they run or are compiled.

A program owns what it writes, so nothing is added atomically and every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from instructue_kernels.text_pool.reference import bounds

# T = texts of all users, N = distinct texts, S = runs of texts, K = columns of weights, H = hidden size

BLOCK_TEXTS = 32
BLOCK_HIDDEN = 64
MAX_COLUMNS = 64
"""K up to this goes through the kernels at once; more goes in turns."""

PARTS = 4
"""Programs that share the texts of a run where texts are independent."""


@triton.jit
def pool_kernel(
    weights, soft, offsets, rows, pooled, K, H, HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`pooled[s, k, h] = sum_t weights[t, k] soft[rows[t], h]` of one run."""
    run = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(offsets + run)
    end = tl.load(offsets + run + 1)
    total = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = t < end
        row = tl.load(rows + t, mask=there, other=0) if HAS_ROWS else t
        w = tl.load(weights + t[None, :] * K + k[:, None], mask=there[None, :] & (k[:, None] < K), other=0.0)
        x = tl.load(soft + row[:, None] * H + h[None, :], mask=there[:, None] & (h[None, :] < H), other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
    place = (run * K + k[:, None]) * H + h[None, :]
    tl.store(pooled + place, total.to(pooled.dtype.element_ty), mask=(k[:, None] < K) & (h[None, :] < H))


@triton.jit
def weights_kernel(
    grad, soft, offsets, rows, of_weights, K, H, parts, HAS_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`of_weights[t, k] = <grad[s, k], soft[rows[t]]>` of every `parts`-th block of a run's texts."""
    run = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(offsets + run)
    end = tl.load(offsets + run + 1)
    for start in range(begin + tl.program_id(1) * BLOCK_T, end, parts * BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = t < end
        row = tl.load(rows + t, mask=there, other=0) if HAS_ROWS else t
        total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for first in range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            x = tl.load(soft + row[:, None] * H + h[None, :], mask=there[:, None] & (h[None, :] < H), other=0.0)
            g = tl.load(
                grad + (run * K + k[None, :]) * H + h[:, None], mask=(k[None, :] < K) & (h[:, None] < H), other=0.0
            )
            total = tl.dot(x, g, total, input_precision="ieee")
        mask = there[:, None] & (k[None, :] < K)
        tl.store(of_weights + t[:, None] * K + k[None, :], total.to(of_weights.dtype.element_ty), mask=mask)


@triton.jit
def soft_kernel(
    grad, weights, order, ends, run_of, of_soft, K, H, ADD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """`of_soft[n] = sum over the texts with that row, in order, of sum_k weights[t, k] grad[run_of[t], k]`."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for place in range(tl.load(ends + row), tl.load(ends + row + 1)):
        t = tl.load(order + place)
        run = tl.load(run_of + t)
        w = tl.load(weights + t * K + k, mask=k < K, other=0.0).to(tl.float32)
        inside = (k[:, None] < K) & (h[None, :] < H)
        g = tl.load(grad + (run * K + k[:, None]) * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(w[:, None] * g, axis=0)
    if ADD:
        total += tl.load(of_soft + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(of_soft + row * H + h, total.to(of_soft.dtype.element_ty), mask=h < H)


def forward(
    weights_TK: torch.Tensor, soft_NH: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """As `chunked.forward`."""
    soft_NH, offsets, rows = _ready(soft_NH, offsets, rows)
    runs, columns, hidden = len(offsets) - 1, weights_TK.shape[1], soft_NH.shape[1]
    parts = [
        _pool(own_TK.contiguous(), soft_NH, offsets, rows, runs, hidden)
        for own_TK in torch.split(weights_TK, MAX_COLUMNS, dim=1)
        if columns
    ]
    if not parts:
        return soft_NH.new_zeros(runs, columns, hidden)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _ready(
    soft_NH: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Offsets on the device, and everything as the kernels index it."""
    if offsets.device.type == "cpu":  # elsewhere a look at them would make the GPU wait
        bounds(offsets, len(soft_NH) if rows is None else len(rows))
    offsets = offsets.to(soft_NH.device, non_blocking=True).contiguous()
    return soft_NH.contiguous(), offsets, None if rows is None else rows.contiguous()


def _pool(
    weights_TK: torch.Tensor,
    soft_NH: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor | None,
    runs: int,
    hidden: int,
) -> torch.Tensor:
    columns = weights_TK.shape[1]
    pooled_SKH = soft_NH.new_empty(runs, columns, hidden)
    if runs:
        pool_kernel[(runs, triton.cdiv(hidden, BLOCK_HIDDEN))](
            weights_TK, soft_NH, offsets, rows, pooled_SKH, columns, hidden, HAS_ROWS=rows is not None,
            BLOCK_T=BLOCK_TEXTS, BLOCK_K=block_of(columns), BLOCK_H=BLOCK_HIDDEN, num_warps=4, num_stages=3,
        )  # fmt: skip
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
    """As `chunked.backward`."""
    soft_NH, offsets, rows = _ready(soft_NH, offsets, rows)
    runs, (number, columns), hidden = len(offsets) - 1, weights_TK.shape, soft_NH.shape[1]
    found_TK = weights_TK.new_empty(number * of_weights, columns)
    found_NH = soft_NH.new_empty(len(soft_NH) * of_soft, hidden)
    if of_soft and (not columns or not number):
        found_NH.zero_()
    if not number or not columns:
        return found_TK, found_NH
    if of_soft:
        order, ends = rows_in_order(torch.arange(number, device=soft_NH.device) if rows is None else rows, len(soft_NH))
        run_of = torch.searchsorted(offsets, torch.arange(number, device=soft_NH.device), right=True) - 1
    for first in range(0, columns, MAX_COLUMNS):
        own = slice(first, min(first + MAX_COLUMNS, columns))
        own_SKH, own_TK = grad_SKH[:, own].contiguous(), weights_TK[:, own].contiguous()
        width = own_TK.shape[1]
        if of_weights:
            part_TK = torch.empty_like(own_TK)
            weights_kernel[(runs, PARTS)](
                own_SKH, soft_NH, offsets, rows, part_TK, width, hidden, PARTS, HAS_ROWS=rows is not None,
                BLOCK_T=BLOCK_TEXTS, BLOCK_K=block_of(width), BLOCK_H=BLOCK_HIDDEN, num_warps=4, num_stages=3,
            )  # fmt: skip
            found_TK[:, own] = part_TK
        if of_soft and len(soft_NH):
            soft_kernel[(len(soft_NH), triton.cdiv(hidden, BLOCK_HIDDEN))](
                own_SKH, own_TK, order, ends, run_of, found_NH, width, hidden, ADD=first > 0,
                BLOCK_K=block_of(width), BLOCK_H=BLOCK_HIDDEN, num_warps=2,
            )  # fmt: skip
    return found_TK, found_NH


def block_of(columns: int) -> int:
    """Columns of a tile: the next power of two that a product can have."""
    return max(16, int(triton.next_power_of_2(columns)))


def rows_in_order(rows: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ordered by row, those of a row in ascending order, and where each of `number` rows begins in them.

    Rows that are not 0 to `number` - 1 come before and after.
    """
    ordered, order = torch.sort(rows, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(number + 1, device=rows.device))

"""The Triton kernels of `prompt_slots`. Imported only where they run or are compiled.

A program owns what it writes, so nothing is added atomically and every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from instructue_kernels.prompt_slots.reference import Events
from instructue_kernels.text_pool.triton import block_of, rows_in_order

# P = slots of all prompts, V = rows of the table, T = texts of all users, N = distinct texts, H = hidden size

BLOCK_SLOTS = 16
BLOCK_HIDDEN = 128
BUCKET_HIDDEN = 64
BLOCK_SUMMED = 32
MAX_PARTS = 64
_SLOTS_OF_A_PART = 512


@triton.jit(do_not_specialize=["P", "V"])
def fill_kernel(
    table, soft, count, age, row_of, count_of, age_of, slots, filled, P, V, H,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Writes what each slot names: nothing, a row of the table, or a text with its count and age."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(slots + p, mask=p < P, other=-1)
    is_text = slot >= V
    is_row = (slot >= 0) & (slot < V)
    text = tl.where(is_text, slot - V, 0)
    column = h[None, :]
    inside = column < H
    texts = is_text[:, None] & inside
    found = tl.load(table + slot[:, None] * H + column, mask=is_row[:, None] & inside, other=0.0).to(tl.float32)
    row = tl.load(row_of + text, mask=is_text, other=0)
    found += tl.load(soft + row[:, None] * H + column, mask=texts, other=0.0).to(tl.float32)
    row = tl.load(count_of + text, mask=is_text, other=0)
    found += tl.load(count + row[:, None] * H + column, mask=texts, other=0.0).to(tl.float32)
    row = tl.load(age_of + text, mask=is_text, other=0)
    found += tl.load(age + row[:, None] * H + column, mask=texts, other=0.0).to(tl.float32)
    tl.store(filled + p[:, None] * H + column, found.to(filled.dtype.element_ty), mask=(p[:, None] < P) & inside)


@triton.jit
def rows_kernel(grad, order, ends, total, H, BLOCK_H: tl.constexpr):
    """`total[n] = sum of grad over the slots of row n, in order`."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    found = tl.zeros((BLOCK_H,), tl.float32)
    for place in range(tl.load(ends + row), tl.load(ends + row + 1)):
        p = tl.load(order + place)
        found += tl.load(grad + p * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(total + row * H + h, found.to(total.dtype.element_ty), mask=h < H)


@triton.jit(do_not_specialize=["P", "V", "share"])
def buckets_kernel(
    grad, slots, bucket_of, total, P, V, H, buckets, share,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A part of `total[c] = sum of grad over the slots whose text has bucket c`, as a product with who has which."""
    part = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    found = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    last = tl.minimum((part + 1) * share, P)
    for start in range(part * share, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        slot = tl.load(slots + p, mask=p < last, other=-1)
        is_text = slot >= V
        bucket = tl.load(bucket_of + tl.where(is_text, slot - V, 0), mask=is_text, other=-1)
        g = tl.load(grad + p[:, None] * H + h[None, :], mask=is_text[:, None] & (h[None, :] < H), other=0.0)
        member = (c[:, None] == bucket[None, :]).to(g.dtype)
        found = tl.dot(member, g, found, input_precision="ieee")
    place = (part * buckets + c[:, None]) * H + h[None, :]
    tl.store(total + place, found, mask=(c[:, None] < buckets) & (h[None, :] < H))


def forward(table_VH: torch.Tensor, events: Events, slots_P: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `chunked.forward`."""
    number, (rows, hidden) = len(slots_P), table_VH.shape
    filled_PH = table_VH.new_empty(number, hidden, dtype=dtype)
    if number:
        inputs = [one.contiguous() for one in (table_VH, *events, slots_P)]
        fill_kernel[(triton.cdiv(number, BLOCK_SLOTS), triton.cdiv(hidden, BLOCK_HIDDEN))](
            *inputs, filled_PH, number, rows, hidden,
            BLOCK_P=BLOCK_SLOTS, BLOCK_H=BLOCK_HIDDEN, num_warps=4,
        )  # fmt: skip
    return filled_PH


def backward(
    grad_PH: torch.Tensor, table_VH: torch.Tensor, events: Events, slots_P: torch.Tensor, needed: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `chunked.backward`."""
    rows, slots_P = len(table_VH), slots_P.contiguous()
    of_table, of_soft, of_count, of_age = (
        one.new_empty(len(one) * need, one.shape[1]) for one, need in zip((table_VH, *events[:3]), needed, strict=True)
    )
    _sum_rows(grad_PH, slots_P, of_table, limit=rows)
    if len(of_soft):
        # Where no text is, no row is: it comes before all of them.
        row_P = slots_P.new_full(slots_P.shape, -1)
        if len(events.row_T):
            row_P = torch.where(slots_P >= rows, events.row_T[(slots_P - rows).clamp(min=0)], -1)
        _sum_rows(grad_PH, row_P, of_soft, limit=len(of_soft))
    for total, bucket_T in ((of_count, events.count_T), (of_age, events.age_T)):
        _sum_buckets(grad_PH, slots_P, bucket_T, total, rows)
    return of_table, of_soft, of_count, of_age


def _sum_rows(grad_PH: torch.Tensor, row_P: torch.Tensor, total_NH: torch.Tensor, *, limit: int) -> None:
    if not len(total_NH):
        return
    order, ends = rows_in_order(row_P, limit)
    rows_kernel[(limit, triton.cdiv(total_NH.shape[1], BLOCK_HIDDEN))](
        grad_PH, order, ends, total_NH, total_NH.shape[1], BLOCK_H=BLOCK_HIDDEN, num_warps=2
    )


def _sum_buckets(
    grad_PH: torch.Tensor, slots_P: torch.Tensor, bucket_T: torch.Tensor, total_CH: torch.Tensor, rows: int
) -> None:
    buckets, hidden = total_CH.shape
    if not buckets:
        return
    if not len(bucket_T) or not len(slots_P):
        total_CH.zero_()
        return
    parts = min(MAX_PARTS, triton.cdiv(len(slots_P), _SLOTS_OF_A_PART))
    share = triton.cdiv(len(slots_P), parts)
    found = torch.empty(parts, buckets, hidden, dtype=torch.float32, device=grad_PH.device)
    buckets_kernel[(parts, triton.cdiv(hidden, BUCKET_HIDDEN))](
        grad_PH, slots_P, bucket_T.contiguous(), found, len(slots_P), rows, hidden, buckets, share,
        BLOCK_P=BLOCK_SUMMED, BLOCK_C=block_of(buckets), BLOCK_H=BUCKET_HIDDEN, num_warps=4, num_stages=3,
    )  # fmt: skip
    total_CH.copy_(found.sum(0))

"""Triton kernels of `info_nce`. Imported only where they run or are compiled."""

from __future__ import annotations

import triton
import triton.language as tl

_SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def norms_kernel(rows, norms, num_rows, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes one over the length of each row in float32; 0 for a row without direction."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = rows + n.to(tl.int64)[:, None] * stride
    square = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_D):
        place = d + tl.arange(0, BLOCK_D)
        inside = (n[:, None] < num_rows) & (place[None, :] < D)
        x = tl.load(start + place[None, :], mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    length = tl.sqrt(square)
    tl.store(norms + n, tl.where(length > _SMALLEST_NORM, 1.0 / length, 0.0), mask=n < num_rows)

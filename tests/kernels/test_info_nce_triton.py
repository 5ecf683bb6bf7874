"""Triton kernels of InfoNCE in the interpreter."""

from __future__ import annotations

import torch


def inverse_norms_by_kernel(shape, seed):
    from instructue_kernels.info_nce.reference import inverse_norms
    from instructue_kernels.info_nce.triton import norms_kernel

    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows[0] = 0
    norms = torch.empty(shape[0])
    norms_kernel[(-(-shape[0] // 16),)](rows, norms, *shape, rows.stride(0), BLOCK_N=16, BLOCK_D=32)
    return norms, inverse_norms(rows)[:, 0]


def test_inverse_norms(interpreted):
    ours, theirs = interpreted(inverse_norms_by_kernel, (35, 70), 0)
    torch.testing.assert_close(ours, theirs)

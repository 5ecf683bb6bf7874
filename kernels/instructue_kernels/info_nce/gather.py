"""Rows of all ranks, with gradients: negatives may live on another machine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# N = own rows, A = rows of all ranks


def sizes_of_ranks(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """`[ranks, len(numbers)]` int64 on the CPU: what every rank said of itself."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return torch.stack(found).cpu()


def gather_rows(rows_N: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenates the rows of all ranks in rank order.

    Args:
        rows_N: `[N, ...]` own rows; N may differ between ranks and may be 0.
        sizes: Rows of every rank.
        group: The ranks.

    Returns:
        `[A, ...]`. The gradient of a row is the sum of what all ranks want of it, so every rank must run the backward.
    """
    gathered: torch.Tensor = _GatherRows.apply(rows_N, sizes, group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_N: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        # Collectives want equal shapes: short ranks are padded, and the padding is cut off again.
        padded = rows_N.new_zeros(max(sizes), *rows_N.shape[1:])
        padded[: len(rows_N)] = rows_N
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=group)
        return torch.cat([one[:size] for one, size in zip(found, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A copy, since autograd may still own the gradient. All-reduce runs on every backend; reduce-scatter does not.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        start = sum(ctx.sizes[: dist.get_rank(ctx.group)])
        return total[start : start + ctx.sizes[dist.get_rank(ctx.group)]], None, None

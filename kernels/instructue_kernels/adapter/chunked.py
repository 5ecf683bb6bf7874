"""The adapter in row chunks: nothing but the output grows with N, forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from instructue_kernels.adapter.reference import adapter_reference

# N = texts, D = encoder size, M = middle size, H = hidden size of the LLM, C = rows of a chunk


class _ChunkedAdapter(torch.autograd.Function):
    """Keeps only the inputs; the backward computes each chunk again (one third more FLOPs)."""

    @staticmethod
    def forward(ctx: Any, eps: float, chunk: int, vectors_ND: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(vectors_ND, *parameters)
        ctx.eps, ctx.chunk = eps, chunk
        out_NH = vectors_ND.new_empty(len(vectors_ND), len(parameters[-1]))
        for start in range(0, len(vectors_ND), chunk):
            rows = slice(start, start + chunk)
            out_NH[rows] = adapter_reference(vectors_ND[rows], *_six(parameters), eps)
        return out_NH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_NH,) = grads
        vectors_ND, *parameters = ctx.saved_tensors
        _, _, needs_vectors, *needs = ctx.needs_input_grad
        # Frozen encoders need no gradient; then the first product's input gradient is never formed.
        grad_ND = torch.empty_like(vectors_ND) if needs_vectors else None
        totals = [torch.zeros_like(one) if need else None for one, need in zip(parameters, needs, strict=True)]
        leaves = [one.detach().requires_grad_(need) for one, need in zip(parameters, needs, strict=True)]
        for start in range(0, len(vectors_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                chunk_CD = vectors_ND[rows].detach().requires_grad_(needs_vectors)
                out_CH = adapter_reference(chunk_CD, *_six(leaves), ctx.eps)
            wanted = [one for one in (chunk_CD, *leaves) if one.requires_grad]
            found = iter(torch.autograd.grad(out_CH, wanted, grad_NH[rows]))
            if grad_ND is not None:
                grad_ND[rows] = next(found)
            for total in totals:
                if total is not None:
                    total += next(found)
        return None, None, grad_ND, *totals


def _six(parameters: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b, c, d, e, f = parameters
    return a, b, c, d, e, f


def adapter_chunked(
    vectors_ND: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    up_MD: torch.Tensor,
    up_bias_M: torch.Tensor,
    down_HM: torch.Tensor,
    down_bias_H: torch.Tensor,
    eps: float,
    chunk: int = 4096,
) -> torch.Tensor:
    """The same function as `adapter_reference` with workspace for `chunk` rows.

    Gradients are once differentiable.
    """
    result: torch.Tensor = _ChunkedAdapter.apply(  # type: ignore[no-untyped-call]
        eps, chunk, vectors_ND, norm_weight_D, norm_bias_D, up_MD, up_bias_M, down_HM, down_bias_H
    )
    return result

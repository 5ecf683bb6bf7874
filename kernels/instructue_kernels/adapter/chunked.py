"""The adapter in row chunks, with a backward that never forms the gradient of the normalised vectors.

Any device. What grows with N is the output and, if it is kept, what GELU is applied to; see `README.md` for why the
gradients of the norm need no product of their own.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from instructue_kernels.adapter.reference import Parameters, Texts

# N = texts, D = encoder size, M = middle size, H = hidden size of the LLM, C = rows of a chunk

CHUNK = 1024
"""Rows at once on a CPU: 1.5 MB of 384 numbers, which stay in a core's cache between two products."""

GPU_CHUNK = 32768
"""Rows at once on a GPU: enough to fill it, 50 MB of 384 numbers."""


def forward(texts: Texts, parameters: Parameters, eps: float, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft tokens, and what GELU was applied to.

    Returns:
        `[N, H]` soft tokens; `[N, M]` values before GELU if `keep`, else `[0, M]`.
    """
    weight = parameters.up_RMD
    soft_NH = weight.new_empty(texts.number, parameters.down_RHM.shape[1])
    before_NM = weight.new_empty(texts.number if keep else 0, weight.shape[1])
    chunk = CHUNK if texts.vectors_UD.device.type == "cpu" else GPU_CHUNK
    for source, start, end in texts.parts():
        own = Parameters(*(one[source] for one in parameters))
        for first in range(start, end, chunk):
            rows = slice(first, min(first + chunk, end))
            normed_CD = _normalised(texts, rows, parameters.wide, eps)[0]
            before_CM = _before(normed_CD, own)
            soft_NH[rows] = F.linear(F.gelu(before_CM), own.down_RHM, own.down_bias_RH)
            if keep:
                before_NM[rows] = before_CM
    return soft_NH, before_NM


def backward(
    grad_NH: torch.Tensor,
    before_NM: torch.Tensor,
    texts: Texts,
    parameters: Parameters,
    eps: float,
    *,
    of_vectors: bool,
) -> tuple[torch.Tensor, Parameters]:
    """Gradients of the vectors and of all parameters.

    Args:
        grad_NH: Gradient of the soft tokens.
        before_NM: As `forward` gave it; computed again if nothing was kept.
        texts: As in the forward.
        parameters: Likewise.
        eps: Likewise.
        of_vectors: Whether the encoder learns too.

    Returns:
        `[U, D]` or `[0, D]`, and one gradient per parameter.
    """
    wide = parameters.wide
    totals = Parameters(*(torch.zeros_like(one, dtype=wide) for one in parameters))
    kept = len(before_NM) == texts.number
    vectors = texts.vectors_UD
    grad_UD = torch.zeros_like(vectors, dtype=wide) if of_vectors else vectors.new_empty(0, vectors.shape[1])
    chunk = CHUNK if texts.vectors_UD.device.type == "cpu" else GPU_CHUNK
    for source, start, end in texts.parts():
        own = Parameters(*(one[source] for one in parameters))
        total = Parameters(*(one[source] for one in totals))
        for first in range(start, end, chunk):
            rows = slice(first, min(first + chunk, end))
            normed_CD, spread_C1 = _normalised(texts, rows, wide, eps)
            before_CM = before_NM[rows] if kept else _before(normed_CD, own)
            grad_CH = grad_NH[rows]
            _add_product(total.down_RHM, grad_CH, F.gelu(before_CM))
            total.down_bias_RH.add_(grad_CH.sum(0, dtype=wide))
            inner_CM = torch.ops.aten.gelu_backward(grad_CH @ own.down_RHM, before_CM)
            # Not yet the gradient of `up`: that of the product with the vectors before the norm's own weights.
            _add_product(total.up_RMD, inner_CM, normed_CD.to(inner_CM.dtype))
            total.up_bias_RM.add_(inner_CM.sum(0, dtype=wide))
            if of_vectors:
                _add_vectors(grad_UD, texts, rows, (inner_CM @ own.up_RMD).to(wide), normed_CD, spread_C1, own)
    return grad_UD.to(vectors.dtype), finish(totals, parameters)


def finish(totals: Parameters, parameters: Parameters) -> Parameters:
    """Gradients of `up` and of the norm, from the product with the vectors before the norm's weights.

    Args:
        totals: Gradients, but for `up_RMD`, which holds `sum_n g_nm x_nd`, and the norm's, which hold nothing.
        parameters: The weights.
    """
    wide = parameters.wide
    product_RMD, bias_RM, up_RMD = totals.up_RMD, totals.up_bias_RM, parameters.up_RMD.to(wide)
    norm_weight_R1D, norm_bias_R1D = (
        parameters.norm_weight_RD[:, None].to(wide),
        parameters.norm_bias_RD[:, None].to(wide),
    )
    found = Parameters(
        norm_weight_RD=(up_RMD * product_RMD).sum(1),
        norm_bias_RD=torch.einsum("rm,rmd->rd", bias_RM, up_RMD),
        up_RMD=product_RMD * norm_weight_R1D + bias_RM[:, :, None] * norm_bias_R1D,
        up_bias_RM=bias_RM,
        down_RHM=totals.down_RHM,
        down_bias_RH=totals.down_bias_RH,
    )
    return Parameters(*(one.to(like.dtype) for one, like in zip(found, parameters, strict=True)))


def _normalised(texts: Texts, rows: slice, wide: torch.dtype, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors at mean 0 and variance 1, and the inverse standard deviation `[C, 1]`."""
    vectors_CD = texts.dequantised(rows.start, rows.stop, wide)
    normed_CD, _, spread_C1 = torch.native_layer_norm(vectors_CD, [vectors_CD.shape[1]], None, None, eps)
    return normed_CD, spread_C1


def _before(normed_CD: torch.Tensor, own: Parameters) -> torch.Tensor:
    affine_CD = torch.addcmul(own.norm_bias_RD.to(normed_CD), normed_CD, own.norm_weight_RD.to(normed_CD))
    return F.linear(affine_CD.to(own.up_RMD.dtype), own.up_RMD, own.up_bias_RM)


def _add_product(total_XY: torch.Tensor, left_CX: torch.Tensor, right_CY: torch.Tensor) -> None:
    if total_XY.dtype == left_CX.dtype:
        total_XY.addmm_(left_CX.T, right_CY)
    else:
        total_XY.add_(left_CX.T @ right_CY)


def _add_vectors(
    grad_UD: torch.Tensor,
    texts: Texts,
    rows: slice,
    outer_CD: torch.Tensor,
    normed_CD: torch.Tensor,
    spread_C1: torch.Tensor,
    own: Parameters,
) -> None:
    scaled_CD = outer_CD * own.norm_weight_RD.to(outer_CD)
    along_C1 = (scaled_CD * normed_CD).mean(-1, keepdim=True)
    found_CD = (scaled_CD - scaled_CD.mean(-1, keepdim=True) - normed_CD * along_C1) * spread_C1
    if texts.rows_N is None:
        grad_UD[rows] = found_CD
    else:
        grad_UD.index_add_(0, texts.rows_N[rows], found_CD)

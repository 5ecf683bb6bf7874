"""The public function of the adapter."""

from __future__ import annotations

from typing import Literal

import torch

from instructue_kernels.adapter.chunked import adapter_chunked
from instructue_kernels.adapter.reference import adapter_reference

Impl = Literal["auto", "chunked", "reference"]

_CHUNK_FROM_ROWS = 8192
"""Below this the reference's workspace is a few MB and chunking only costs the recompute."""


def adapter(
    vectors_ND: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    up_MD: torch.Tensor,
    up_bias_M: torch.Tensor,
    down_HM: torch.Tensor,
    down_bias_H: torch.Tensor,
    *,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Turns event vectors into soft tokens: LayerNorm -> Linear -> GELU -> Linear.

    Args:
        vectors_ND: `[N, D]` encoder vectors; N may be 0.
        norm_weight_D: `[D]` LayerNorm weight.
        norm_bias_D: `[D]` LayerNorm bias.
        up_MD: `[M, D]` weight of the first product.
        up_bias_M: `[M]` its bias.
        down_HM: `[H, M]` weight of the second product.
        down_bias_H: `[H]` its bias.
        eps: LayerNorm epsilon; small, because unit vectors of size D have variance 1/D.
        impl: `reference`, `chunked` (memory bounded), or `auto`, which chunks from 8,192 rows.

    Returns:
        `[N, H]` soft tokens, in the dtype of the inputs.

    Raises:
        ValueError: A shape does not fit, or `impl` is unknown.

    Source: adapter of arXiv 2602.14492 (Q-Anchor).

    Example:
        >>> x, m, h = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, 5)
        >>> adapter(x, torch.ones(4), torch.zeros(4), m, torch.zeros(5), h, torch.ones(2)).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    _check_shapes(vectors_ND, norm_weight_D, norm_bias_D, up_MD, up_bias_M, down_HM, down_bias_H)
    parameters = (norm_weight_D, norm_bias_D, up_MD, up_bias_M, down_HM, down_bias_H)
    if impl == "auto":
        impl = "chunked" if len(vectors_ND) >= _CHUNK_FROM_ROWS else "reference"
    if impl == "reference":
        return adapter_reference(vectors_ND, *parameters, eps)
    if impl == "chunked":
        return adapter_chunked(vectors_ND, *parameters, eps)
    raise ValueError(f"impl {impl!r} is unknown; use auto, chunked or reference")


def explain_choice() -> str:
    """What `impl="auto"` does on this machine, in words.

    >>> explain_choice()
    'auto: plain torch below 8,192 rows, row chunks of bounded memory from there'
    """
    return f"auto: plain torch below {_CHUNK_FROM_ROWS:,} rows, row chunks of bounded memory from there"


def _check_shapes(
    vectors: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
) -> None:
    if vectors.dim() != 2 or up.dim() != 2 or down.dim() != 2:
        raise ValueError(f"vectors, up and down must have two axes, not {vectors.dim()}, {up.dim()}, {down.dim()}")
    (middle, dim), (hidden, down_in) = up.shape, down.shape
    expected = {"norm_weight": dim, "norm_bias": dim, "up_bias": middle, "down_bias": hidden}
    actual = {"norm_weight": norm_weight, "norm_bias": norm_bias, "up_bias": up_bias, "down_bias": down_bias}
    wrong = [f"{name} {tuple(actual[name].shape)}" for name, size in expected.items() if actual[name].shape != (size,)]
    if vectors.shape[1] != dim:
        wrong.append(f"vectors {tuple(vectors.shape)}")
    if down_in != middle:
        wrong.append(f"down {tuple(down.shape)}")
    if wrong:
        raise ValueError(f"shapes do not fit up {tuple(up.shape)} and down {tuple(down.shape)}: {', '.join(wrong)}")

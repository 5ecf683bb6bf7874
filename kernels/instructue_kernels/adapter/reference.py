"""The adapter, written to be read: plain torch, in whatever dtype it is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

# U = stored vectors, N = texts, R = sources, D = encoder size, M = middle size, H = hidden size of the LLM


class Parameters(NamedTuple):
    """The weights of R adapters, one behind the other."""

    norm_weight_RD: torch.Tensor
    norm_bias_RD: torch.Tensor
    up_RMD: torch.Tensor
    up_bias_RM: torch.Tensor
    down_RHM: torch.Tensor
    down_bias_RH: torch.Tensor

    @property
    def wide(self) -> torch.dtype:
        """What is added up in: float64 for float64 weights, else float32."""
        return torch.float64 if self.up_RMD.dtype == torch.float64 else torch.float32


class Texts(NamedTuple):
    """N texts, ordered by source, as rows of a store of vectors.

    Attributes:
        vectors_UD: Floating point, or int8 with a scale.
        rows_N: int64 row of each text in the store; None for all rows in their order.
        offsets: int64 `[R + 1]`, where each source's texts begin.
        scale_U: float32 scale of each int8 vector.
    """

    vectors_UD: torch.Tensor
    rows_N: torch.Tensor | None
    offsets: torch.Tensor
    scale_U: torch.Tensor | None

    @property
    def number(self) -> int:
        """N."""
        return len(self.vectors_UD) if self.rows_N is None else len(self.rows_N)

    def check(self) -> list[int]:
        """The offsets.

        Raises:
            ValueError: They do not go from 0 to N in ascending order.
        """
        bounds: list[int] = self.offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != self.number or bounds != sorted(bounds):
            raise ValueError(f"offsets must ascend from 0 to {self.number}, the number of texts, not {bounds}")
        return bounds

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Source, first text, end, of every source with texts.

        Raises:
            ValueError: As `check`.
        """
        for source, (start, end) in enumerate(itertools.pairwise(self.check())):
            if start < end:
                yield source, start, end

    def dequantised(self, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """The vectors of texts `start` to `end`."""
        if self.rows_N is None:
            vectors = self.vectors_UD[start:end].to(dtype)
            return vectors if self.scale_U is None else vectors * self.scale_U[start:end, None].to(dtype)
        rows = self.rows_N[start:end]
        vectors = self.vectors_UD.index_select(0, rows).to(dtype)
        return vectors if self.scale_U is None else vectors * self.scale_U[rows, None].to(dtype)


def adapter_reference(texts: Texts, parameters: Parameters, eps: float) -> torch.Tensor:
    """Of each source's texts: LayerNorm -> Linear -> GELU (exact) -> Linear.

    Vectors are dequantised and normalised in at least float32; the products run in the dtype of the weights.

    Returns:
        `[N, H]` in the dtype of the weights; autograd keeps two `[N, M]` and two `[N, D]` tensors.
    """
    soft: list[torch.Tensor] = []
    for source, start, end in texts.parts():
        norm_weight_D, norm_bias_D, up_MD, up_bias_M, down_HM, down_bias_H = (one[source] for one in parameters)
        vectors_ND = texts.dequantised(start, end, parameters.wide)
        normed_ND = F.layer_norm(
            vectors_ND, vectors_ND.shape[-1:], norm_weight_D.to(vectors_ND), norm_bias_D.to(vectors_ND), eps
        ).to(up_MD.dtype)
        middle_NM = F.gelu(F.linear(normed_ND, up_MD, up_bias_M))
        soft.append(F.linear(middle_NM, down_HM, down_bias_H))
    if not soft:  # nothing, that still knows where it came from: every parameter gets a gradient of zero
        whence = torch.stack([one.sum() for one in (*parameters, texts.dequantised(0, 0, parameters.up_RMD.dtype))])
        return whence.sum().expand(0, parameters.down_RHM.shape[1])
    return torch.cat(soft)

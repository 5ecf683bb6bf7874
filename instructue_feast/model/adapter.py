"""From encoder vectors and numbers to soft tokens, one adapter per source, and from hidden states to embeddings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from instructue_feast.model.seeding import fill_normal
from instructue_kernels.adapter import adapter

# N = texts, D = encoder size, M = middle size, H = hidden size of the LLM, B = users, C = numeric columns, G = groups

_GELU_SECOND_MOMENT = 0.4252
"""E[gelu(z)^2] for standard normal z; makes the initial output's size exact."""


class SourceAdapter(nn.Module):
    """LayerNorm -> Linear(D, M) -> GELU -> Linear(M, H) of one source.

    Args:
        dim: Encoder size D.
        middle: M.
        hidden: H.
    """

    def __init__(self, dim: int, middle: int, hidden: int) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.up = nn.Parameter(torch.zeros(middle, dim))
        self.up_bias = nn.Parameter(torch.zeros(middle))
        self.down = nn.Parameter(torch.zeros(hidden, middle))
        self.down_bias = nn.Parameter(torch.zeros(hidden))

    def initialise(self, rms: float, *, seed: int, name: str) -> None:
        """Random weights whose soft tokens have the root-mean-square size `rms`, that of the LLM's own embeddings."""
        middle, dim = self.up.shape
        fill_normal(self.up, 1 / math.sqrt(dim), seed=seed, name=f"{name}.up")
        fill_normal(self.down, rms / math.sqrt(middle * _GELU_SECOND_MOMENT), seed=seed, name=f"{name}.down")

    def forward(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Soft tokens `[N, H]`."""
        return adapter(vectors_ND, *self.weights())

    def weights(self) -> tuple[torch.Tensor, ...]:
        """In the order the op takes them."""
        return self.norm_weight, self.norm_bias, self.up, self.up_bias, self.down, self.down_bias


def packed_soft_tokens(
    adapters: Sequence[SourceAdapter], vectors_ND: torch.Tensor, texts_of: Sequence[int]
) -> torch.Tensor:
    """Soft tokens of texts of several sources at once.

    Args:
        adapters: Of sources that share an encoder.
        vectors_ND: Encoder vectors, ordered by source.
        texts_of: Texts of each source.

    Returns:
        `[N, H]`.
    """
    if len(adapters) == 1:
        tokens: torch.Tensor = adapters[0](vectors_ND)
        return tokens
    offsets = torch.tensor([0, *itertools.accumulate(texts_of)])
    stacked = (torch.stack(one) for one in zip(*(own.weights() for own in adapters), strict=True))
    return adapter(vectors_ND, *stacked, offsets=offsets)


class NumericAdapter(nn.Module):
    """One soft token per numeric group: a linear projection of its standardised asinh values and missing flags.

    asinh tames amounts over several orders of magnitude and keeps the sign; NaN and infinity count as missing.

    Args:
        groups: Positions of each group's columns.
        columns: C.
        hidden: H.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, groups: list[list[int]], columns: int, hidden: int) -> None:
        super().__init__()
        self.groups = groups
        self.hidden = hidden
        self.projections = nn.ModuleList(nn.Linear(2 * len(one), hidden) for one in groups)
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))

    def initialise(self, rms: float, *, seed: int, name: str) -> None:
        """Random projections; tokens of about the size `rms` once `mean` and `std` are those of the data."""
        for index, (weight, bias) in enumerate(zip(*[iter(self.projections.parameters())] * 2, strict=True)):
            std = rms / math.sqrt(2 * weight.shape[1])
            fill_normal(weight, std, seed=seed, name=f"{name}.{index}.weight")
            fill_normal(bias, rms / math.sqrt(2), seed=seed, name=f"{name}.{index}.bias")

    def set_statistics(self, values_UC: torch.Tensor) -> None:
        """Takes mean and standard deviation of the asinh values from U users, missing ones left out."""
        present = values_UC.isfinite()
        scaled = torch.asinh(values_UC.float().where(present, torch.zeros(())))
        count = present.sum(0).clamp(min=1)
        mean = scaled.sum(0) / count
        variance = ((scaled - mean) ** 2 * present).sum(0) / count
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp(min=1e-3))

    def standardised(self, values_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised asinh values, 0 where one is missing, and where one is there."""
        present = values_BC.isfinite()
        scaled = (torch.asinh(values_BC.where(present, torch.zeros_like(values_BC))) - self.mean) / self.std
        return scaled.where(present, torch.zeros_like(scaled)), present

    def forward(self, values_BC: torch.Tensor) -> torch.Tensor:
        """Soft tokens `[B, G, H]`."""
        if not self.groups:
            return values_BC.new_zeros(len(values_BC), 0, self.hidden)
        scaled, present = self.standardised(values_BC)
        missing = (~present).to(scaled.dtype)
        tokens = [
            projection(torch.cat([scaled[:, group], missing[:, group]], dim=-1))
            for group, projection in zip(self.groups, self.projections, strict=True)
        ]
        return torch.stack(tokens, dim=1)


class ProjectionHead(nn.Module):
    """H -> middle -> ReLU -> embedding size, then unit length; always float32."""

    def __init__(self, hidden: int, middle: int, embedding_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, middle)
        self.down = nn.Linear(middle, embedding_dim)

    def initialise(self, *, seed: int, name: str) -> None:
        """Random weights that keep the size of their input."""
        for key, linear in (("up", self.up), ("down", self.down)):
            fill_normal(linear.weight, math.sqrt(2 / linear.in_features), seed=seed, name=f"{name}.{key}")
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_BKH: torch.Tensor) -> torch.Tensor:
        """Unit vectors `[B, K, embedding_dim]`."""
        return nn.functional.normalize(self.down(torch.relu(self.up(hidden_BKH.float()))), dim=-1)

"""The focus token: what of a user's history an instruction is about, before the LLM reads anything.

An instruction's encoder vector attends over the user's texts; what it finds becomes one soft token of its suffix.
Nothing in the shared prefix depends on the instruction, so the prefix stays shared. Numbers are found by the names of
their columns: an instruction about coupons looks at `redemptions_90d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from instructue_feast.history.buckets import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS
from instructue_feast.model.prompt import PaddedUsers, one_hot
from instructue_feast.model.seeding import fill_normal, orthonormal
from instructue_kernels.text_pool import text_pool

# N = texts, D = encoder size, F = focus size, H = hidden size, B = users, L = most texts of a user, K = instructions,
# M = distinct instructions, C = numeric columns

INITIAL_TEMPERATURE = 0.05
_NUM_SCALARS = 4


@dataclass(frozen=True, slots=True)
class FocusResult:
    """Focus tokens and what they looked at.

    Attributes:
        tokens: `[B, K, H]`.
        weights: `[B, L, K]`, over L a distribution; all zero for a user without texts.
    """

    tokens: torch.Tensor
    weights: torch.Tensor


class Focus(nn.Module):
    """Learned bilinear similarity, softmax with a learned temperature, pooling, and a linear layer.

    Args:
        dims: Vector size of each distinct encoder, in order.
        focus_dim: F. At least the largest size makes the untrained similarity the cosine exactly.
        hidden: H.
    """

    def __init__(self, dims: list[int], focus_dim: int, hidden: int) -> None:
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(dim, focus_dim, bias=False) for dim in dims)
        self.queries = nn.ModuleList(nn.Linear(dim, focus_dim, bias=False) for dim in dims)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        self.mix = nn.Linear(3 * hidden + _NUM_SCALARS, hidden)
        self.nothing = nn.Parameter(torch.zeros(hidden))

    @torch.no_grad()
    def initialise(self, nothing: torch.Tensor, rms: float, *, seed: int, name: str) -> None:
        """Identity similarity; the token starts as the sum of what was pooled, plus a trace of the scalars."""
        hidden = len(self.nothing)
        for index, (key, query) in enumerate(zip(self.keys.parameters(), self.queries.parameters(), strict=True)):
            start = orthonormal(*key.shape, seed=seed, name=f"{name}.keys.{index}")
            key.copy_(start)
            query.copy_(start)
        fill_normal(self.mix.weight, rms, seed=seed, name=f"{name}.mix")
        self.mix.weight[:, : 3 * hidden] = torch.eye(hidden).repeat(1, 3)
        self.mix.bias.zero_()
        self.nothing.copy_(nothing)

    def key(self, encoder: int, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Focus keys `[N, F]` of texts of one encoder."""
        keys: torch.Tensor = self.keys[encoder](vectors_ND)
        return keys

    def query(self, encoder: int, vectors_KD: torch.Tensor) -> torch.Tensor:
        """Focus queries `[K, F]` of instructions in one encoder's space."""
        queries: torch.Tensor = self.queries[encoder](vectors_KD)
        return queries

    def similarity(self, encoder: int, vectors_ND: torch.Tensor, wordings_WD: torch.Tensor) -> torch.Tensor:
        """`[N, W]` similarity of texts and instructions in one encoder's space: `key . query`, without the keys.

        For training, where keys change with every step, and instructions are fewer than a key has numbers.
        """
        key: nn.Linear = self.keys[encoder]  # type: ignore[assignment]
        towards_WD = self.query(encoder, wordings_WD) @ key.weight
        return vectors_ND @ towards_WD.T

    def forward(
        self,
        similarity_BLK: torch.Tensor,
        padded: PaddedUsers,
    ) -> FocusResult:
        """Pools each user's texts for each instruction.

        Args:
            similarity_BLK: Similarity of each text and instruction; anything where there is no text.
            padded: The texts, their soft tokens, and the embeddings of count and age.
        """
        events, log_gate_BL = padded.events, padded.log_gate()
        valid_BL1 = padded.valid_BL[:, :, None]
        if similarity_BLK.shape[1] == 0:
            tokens = self.nothing.expand(*similarity_BLK.shape[::2], -1)
            return FocusResult(tokens=tokens, weights=similarity_BLK)
        lowest = torch.finfo(similarity_BLK.dtype).min
        logits_BLK = similarity_BLK / self.log_temperature.exp()
        if log_gate_BL is not None:
            logits_BLK = logits_BLK + log_gate_BL[:, :, None]
        logits_BLK = logits_BLK.masked_fill(~valid_BL1, lowest)
        weights_BLK = torch.softmax(logits_BLK, dim=1) * valid_BL1
        weights_BKL = weights_BLK.transpose(1, 2)
        similarity_BLK = similarity_BLK.masked_fill(~valid_BL1, 0.0)
        levels_BL2 = torch.stack(
            [padded.count_BL / (NUM_COUNT_BUCKETS - 1), padded.age_BL / (NUM_AGE_BUCKETS - 1)], dim=-1
        )
        scalars = [
            similarity_BLK.masked_fill(~valid_BL1, -1.0).amax(1)[:, :, None],
            (weights_BLK * similarity_BLK).sum(1)[:, :, None],
            weights_BKL @ levels_BL2,
        ]
        weights_TK = weights_BLK.flatten(0, 1)[padded.place_T]
        pooled = [
            text_pool(weights_TK, events.soft_NH, padded.offsets, rows=events.row_T),
            (weights_BKL @ one_hot(padded.count_BL, events.count_CH)) @ events.count_CH,
            (weights_BKL @ one_hot(padded.age_BL, events.age_AH)) @ events.age_AH,
        ]
        tokens_BKH = self.mix(torch.cat([*pooled, *scalars], dim=-1))
        has_texts_B11 = padded.valid_BL.any(1)[:, None, None]
        return FocusResult(tokens=torch.where(has_texts_B11, tokens_BKH, self.nothing), weights=weights_BLK)


class NumberFocus(nn.Module):
    """What an instruction finds among the numbers: a sum over columns, weighted by similarity to the columns' names.

    The weights do not compete. A softmax over a few dozen columns falls for the one that serves most instructions,
    and then no gradient reaches the others.

    Args:
        columns: Columns of each distinct encoder, in order; C in all.
        dims: Vector size of each distinct encoder.
        hidden: H.
    """

    def __init__(self, columns: list[list[int]], dims: list[int], hidden: int) -> None:
        super().__init__()
        self.columns = columns
        number = sum(map(len, columns))
        self.keys = nn.ParameterList(torch.zeros(len(own), dim) for own, dim in zip(columns, dims, strict=True))
        self.scale = nn.Parameter(torch.zeros(number, hidden))
        self.offset = nn.Parameter(torch.zeros(number, hidden))
        self.missing = nn.Parameter(torch.zeros(number, hidden))
        self.mix = nn.Linear(hidden, hidden)

    @torch.no_grad()
    def initialise(self, names: list[torch.Tensor], rms: float, *, seed: int, name: str) -> None:
        """Each column a random direction, as long as the number is large.

        Args:
            names: `[C, D]` vectors of all columns' names in each encoder.
            rms: Size of a token.
            seed: Of the directions.
            name: Likewise.
        """
        for key, own, vectors_CD in zip(self.keys, self.columns, names, strict=True):
            key.copy_(vectors_CD[own])
        fill_normal(self.scale, rms, seed=seed, name=f"{name}.scale")
        fill_normal(self.offset, rms / 2, seed=seed, name=f"{name}.offset")
        fill_normal(self.missing, rms / 2, seed=seed, name=f"{name}.missing")
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def weights(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[M, C]` weights of the columns for M instructions, given as `[M, D]` vectors of each encoder."""
        weights_MC = self.scale.new_zeros(len(vectors[0]), len(self.scale))
        for key, own, vectors_MD in zip(self.keys, self.columns, vectors, strict=True):
            weights_MC[:, own] = vectors_MD @ key.T
        return weights_MC

    def forward(self, weights_BKC: torch.Tensor, scaled_BC: torch.Tensor, present_BC: torch.Tensor) -> torch.Tensor:
        """`[B, K, H]` to be added to focus tokens.

        Args:
            weights_BKC: Weights of the columns for each instruction.
            scaled_BC: Standardised numbers; anything where one is missing.
            present_BC: False where a number is missing.
        """
        known_BCH = scaled_BC[:, :, None] * self.scale + self.offset
        mixed: torch.Tensor = self.mix(weights_BKC @ torch.where(present_BC[:, :, None], known_BCH, self.missing))
        return mixed

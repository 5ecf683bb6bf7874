"""The prompt's layout: a shared prefix, one suffix per instruction, and who may look at whom.

    segment            0 0 0 0 0 -1 | 1 1 | 2 2 2 2 | -1 -1
    position (+ start) 0 1 2 3 4  0 | 5 6 | 5 6 7 8 |  0  0
                       prefix         suffix suffix   padding

A query sees the prefix up to itself, its own suffix up to itself, and, in a suffix, its instruction, which stands
before all of this (see `instruction_states`). Positions restart after the user's own prefix, so a suffix computes
exactly what it would compute alone. Suffixes are laid end to end: none is padded to the longest. Training uses the same
layout, with answer tokens behind `<USER>`. Every prefix takes as many places as the longest, so that suffixes begin at
one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# B = users, S = padded prompt length, K = instructions per user

Ints = npt.NDArray[np.int64]

PREFIX = 0
PADDING = -1

_WORTH_A_PASS = 0.25
"""Share of the budget from which a batch may be closed early."""

_MOST_PADDING = 0.1
"""Share of padding from which it is."""


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """Prompts of B users as indices into a table of token embeddings.

    Attributes:
        row_BS: `[B, S]` int64 row of the table; row 0 stands for padding.
        segment_BS: `[B, S]` int64: 0 for the prefix, k for the k-th suffix from 1, -1 for padding.
        position_BS: `[B, S]` int64 position ids.
        readout_BK: `[B, K]` int64 place of each `<USER>` token in S.
        num_tokens: Tokens that are not padding.
        prefix_places: Places of every prefix, padding included; suffixes begin there.
    """

    row_BS: Ints
    segment_BS: Ints
    position_BS: Ints
    readout_BK: Ints
    num_tokens: int
    prefix_places: int


def pack(
    prefixes: Sequence[Ints], suffixes: Sequence[Sequence[Ints]], readouts: Sequence[Sequence[int]], *, step: int = 1
) -> PackedPrompts:
    """Packs prefixes and suffixes into rectangular arrays, each half padded on its right.

    Args:
        prefixes: Table rows of each user's prefix.
        suffixes: Table rows of each user's K suffixes.
        readouts: Place of `<USER>` within each suffix.
        step: Prefixes are padded to a multiple of this.

    Example:
        >>> packed = pack([np.array([7, 8])], [[np.array([5]), np.array([3, 4])]], [[0, 1]])
        >>> packed.position_BS.tolist(), packed.readout_BK.tolist()
        ([[0, 1, 2, 2, 3]], [[2, 4]])
    """
    places = -(-max((len(prefix) for prefix in prefixes), default=0) // step) * step
    lengths = [sum(len(one) for one in own) for own in suffixes]
    shape = (len(prefixes), places + max(lengths, default=0))
    row_BS = np.zeros(shape, np.int64)
    segment_BS = np.full(shape, PADDING, np.int64)
    position_BS = np.zeros(shape, np.int64)
    readout_BK = np.zeros((len(prefixes), len(suffixes[0]) if suffixes else 0), np.int64)
    for user, prefix in enumerate(prefixes):
        own = suffixes[user]
        sizes = np.array([len(one) for one in own], np.int64)
        starts = np.cumsum(sizes) - sizes
        suffix = slice(places, places + lengths[user])
        row_BS[user, : len(prefix)] = prefix
        row_BS[user, suffix] = np.concatenate([*own, np.zeros(0, np.int64)])
        segment_BS[user, : len(prefix)] = PREFIX
        segment_BS[user, suffix] = np.repeat(np.arange(1, len(own) + 1), sizes)
        position_BS[user, : len(prefix)] = np.arange(len(prefix))
        position_BS[user, suffix] = len(prefix) + np.arange(lengths[user]) - np.repeat(starts, sizes)
        readout_BK[user] = places + starts + np.asarray(readouts[user], np.int64)
    return PackedPrompts(
        row_BS, segment_BS, position_BS, readout_BK, sum(lengths) + sum(len(prefix) for prefix in prefixes), places
    )


def block_mask(segment_BS: torch.Tensor, *, first_query: int = 0) -> torch.Tensor:
    """`[B, Q, S]` bool, true where the query (second axis) may see the key (third axis).

    Padding is seen by nobody and sees only itself, so that no softmax is over nothing.

    Args:
        segment_BS: See `PackedPrompts`.
        first_query: Place of the first query; Q of them up to the end.
    """
    places = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    query, key = segment_BS[:, first_query:, None], segment_BS[:, None, :]
    causal = places[first_query:, None] >= places[None, :]
    itself = places[first_query:, None] == places[None, :]
    visible = ((key == PREFIX) | (key == query)) & (query != PADDING) & causal
    return visible | itself


def additive(visible_BSK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask `[B, S, keys]` as `[B, 1, S, keys]` of 0 and the lowest value, which Transformers takes."""
    visible = visible_BSK[:, None]
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def token_budget_batches(lengths: Ints, names: Sequence[str], budget: int) -> list[Ints]:
    """Cuts users into batches of at most `budget` padded tokens, by length, ties by name.

    A user longer than the budget gets a batch of its own. A batch that holds enough to be worth a pass is closed before
    padding becomes too much of it, as among few users of many lengths. All depends on lengths and names alone.

    Example:
        >>> [one.tolist() for one in token_budget_batches(np.array([3, 9, 3]), ["c", "a", "b"], 6)]
        [[2, 0], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda user: (int(lengths[user]), names[user]))
    batches: list[list[int]] = []
    tokens = 0
    for user in order:
        length = int(lengths[user])
        padded = (len(batches[-1]) + 1) * length if batches else 0
        wasteful = tokens >= _WORTH_A_PASS * budget and padded - tokens - length > _MOST_PADDING * padded
        if batches and padded <= budget and not wasteful:
            batches[-1].append(user)
            tokens += length
        else:
            batches.append([user])
            tokens = length
    return [np.asarray(one, np.int64) for one in batches]

"""Filling a prompt's slots, written to be read."""

from __future__ import annotations

from typing import NamedTuple

import torch

# P = slots of all prompts, V = rows of the table, T = texts of all users, N = distinct texts, H = hidden size,
# C = count buckets, A = age buckets


class Events(NamedTuple):
    """T texts of users: each is its soft token plus the embeddings of how often and how long ago.

    Attributes:
        soft_NH: `[N, H]` soft tokens of distinct texts.
        count_CH: `[C, H]` count embeddings.
        age_AH: `[A, H]` age embeddings.
        row_T: `[T]` int64 row of each text's soft token.
        count_T: `[T]` int64 count bucket.
        age_T: `[T]` int64 age bucket.
    """

    soft_NH: torch.Tensor
    count_CH: torch.Tensor
    age_AH: torch.Tensor
    row_T: torch.Tensor
    count_T: torch.Tensor
    age_T: torch.Tensor


def prompt_slots_reference(
    table_VH: torch.Tensor, events: Events, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`out[p] = (0, table, events)[slots[p] + 1]`, zero being one row.

    Returns:
        `[*slots.shape, H]`; a `[V + T, H]` copy of everything is made on the way.
    """
    soft_TH = events.soft_NH[events.row_T] + events.count_CH[events.count_T] + events.age_AH[events.age_T]
    everything_XH = torch.cat([table_VH.new_zeros(1, table_VH.shape[1]), table_VH, soft_TH])
    return everything_XH[slots + 1].to(dtype)

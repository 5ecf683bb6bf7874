"""Packed histories with something taken out or laid out another way: the data side of ablations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from instructue_feast.history.buckets import COUNT_EDGES
from instructue_feast.history.pack import PackedHistory

# U = users, T = tokens of all users, N = tokens afterwards, R = sources

_LEAST_COUNT = np.array([1, *COUNT_EDGES], np.int64)
"""The lowest count of each bucket."""


def without_source(history: PackedHistory, source: int, numeric_columns: Sequence[int] = ()) -> PackedHistory:
    """The same users as if a source had never been logged.

    Args:
        history: U users.
        source: Position of the source; its tokens and event counts go.
        numeric_columns: Positions of its numeric columns, which become missing.

    Returns:
        Histories with the same sources and columns, so that the same model reads them.
    """
    kept_T = history.source_index != source
    num_events = history.num_events.copy()
    num_events[:, source] = 0
    numeric = history.tabular_numeric.copy()
    numeric[:, list(numeric_columns)] = np.nan
    changed = _repeated(history, kept_T.astype(np.int64))
    return dataclasses.replace(changed, num_events=num_events, tabular_numeric=numeric)


def one_token_per_event(history: PackedHistory, caps: Sequence[int]) -> PackedHistory:
    """Each text stands as often as it happened, instead of once with a count.

    A packed history knows of a text how often, in buckets, and when last. So a text stands as often as the lowest count
    of its bucket, where it was last seen, and all its tokens have that age; the newest tokens of a source are kept.

    Args:
        history: U users; the tokens of a source run from old to new.
        caps: Most tokens of each source; 0 for no bound.

    Returns:
        Histories in which every count bucket is 0.
    """
    if not len(history.text_id):
        return history
    count_T = _LEAST_COUNT[history.count_bucket]
    user_T = np.repeat(np.arange(len(history)), history.num_tokens)
    group_T = user_T * len(caps) + history.source_index
    last_T = np.searchsorted(group_T, group_T, side="right") - 1  # users and, within a user, sources ascend
    until_T = np.cumsum(count_T)
    newer_T = until_T[last_T] - until_T
    cap_T = np.array([one or np.iinfo(np.int64).max for one in caps], np.int64)[history.source_index]
    # Counted instead of laid out and cut: a heavy shopper has thousands of events, of which hundreds are kept.
    changed = _repeated(history, np.clip(cap_T - newer_T, 0, count_T))
    return dataclasses.replace(changed, count_bucket=np.zeros_like(changed.count_bucket))


def _repeated(history: PackedHistory, times_T: npt.NDArray[np.int64]) -> PackedHistory:
    """Every token so many times; 0 drops it."""
    until = np.concatenate([[0], np.cumsum(times_T)]).astype(np.int64)
    return dataclasses.replace(
        history,
        offsets=until[history.offsets],
        source_index=np.repeat(history.source_index, times_T),
        text_id=np.repeat(history.text_id, times_T),
        count_bucket=np.repeat(history.count_bucket, times_T),
        age_bucket=np.repeat(history.age_bucket, times_T),
    )

"""Packed histories with something taken out or laid out another way, for ablations, attributions and training."""

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
    changed = with_tokens(history, kept_T)
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
    changed = with_tokens(history, np.clip(cap_T - newer_T, 0, count_T))
    return dataclasses.replace(changed, count_bucket=np.zeros_like(changed.count_bucket))


def thinned(
    history: PackedHistory, rng: np.random.Generator, *, event_dropout: float, number_dropout: float
) -> PackedHistory:
    """The same users with some texts and some numbers missing, by chance.

    Each user draws a share of texts to lose, between none and twice `event_dropout`, so that whole histories and
    sparse ones both occur.

    Args:
        history: U users.
        rng: Draws; the same state gives the same histories.
        event_dropout: Mean share of texts that go, at most one half.
        number_dropout: Share of numbers that become missing.
    """
    if event_dropout:
        lost_T = np.repeat(2 * event_dropout * rng.random(len(history)), history.num_tokens)
        history = with_tokens(history, rng.random(len(lost_T)) >= lost_T)
    if number_dropout:
        numbers = history.tabular_numeric
        lost = rng.random(numbers.shape) < number_dropout
        history = dataclasses.replace(history, tabular_numeric=np.where(lost, np.nan, numbers).astype(numbers.dtype))
    return history


def with_tokens(history: PackedHistory, times_T: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> PackedHistory:
    """Every token so many times; 0 or false drops it. `num_events` stays what it is."""
    times_T = times_T.astype(np.int64)
    until = np.concatenate([[0], np.cumsum(times_T)])
    return dataclasses.replace(
        history,
        offsets=until[history.offsets],
        source_index=np.repeat(history.source_index, times_T),
        text_id=np.repeat(history.text_id, times_T),
        count_bucket=np.repeat(history.count_bucket, times_T),
        age_bucket=np.repeat(history.age_bucket, times_T),
    )

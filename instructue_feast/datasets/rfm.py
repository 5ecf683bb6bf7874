"""Recency, frequency and spend of users at many points in time, without looking at or past any of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# E = events, S = points in time asked about

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

_SPAN = 1 << 40  # seconds; far more than any time since the epoch, so a user's events form one block of keys


@dataclass(frozen=True, slots=True)
class Ledger:
    """Events of users in order, with running totals.

    Attributes:
        key: `[E]` user and time in one ascending number.
        total: `[E + 1]` sum of the amounts of the events before each position.
        time: `[E]` event time in the order of `key`.
    """

    key: Int
    total: Float
    time: Int

    @classmethod
    def of(cls, user: Int, time: Int, amount: Float | None = None) -> Ledger:
        """Builds a ledger.

        Args:
            user: `[E]` user number, 0 or more.
            time: `[E]` event time in seconds since the epoch, 0 or more.
            amount: `[E]` what to sum; 1 per event when left out.
        """
        key = user * _SPAN + time
        order = np.argsort(key, kind="stable")
        amounts = np.ones(len(key)) if amount is None else amount[order]
        return cls(key[order], np.concatenate([[0.0], np.cumsum(amounts)]), time[order])

    def before(self, user: Int, time: Int, days: int | None = None) -> Float:
        """`[S]` sum of the amounts in `[time - days, time)`; of everything before `time` without `days`."""
        start = np.zeros_like(time) if days is None else np.maximum(time - days * 86_400, 0)
        return np.asarray(self.total[self._position(user, time)] - self.total[self._position(user, start)])

    def first(self, user: Int, time: Int) -> Float:
        """`[S]` time of the user's first event before `time`; NaN without one."""
        return self._time_at(self._position(user, np.zeros_like(time)), user, time)

    def last(self, user: Int, time: Int) -> Float:
        """`[S]` time of the user's last event before `time`; NaN without one."""
        return self._time_at(self._position(user, time) - 1, user, time)

    def _position(self, user: Int, time: Int) -> Int:
        return np.searchsorted(self.key, user * _SPAN + time, side="left").astype(np.int64)

    def _time_at(self, position: Int, user: Int, time: Int) -> Float:
        any_before = self._position(user, time) > self._position(user, np.zeros_like(time))
        found = self.time[np.clip(position, 0, len(self.time) - 1)] if len(self.time) else np.zeros(len(time))
        return np.where(any_before, found, np.nan)

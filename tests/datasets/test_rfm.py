"""A ledger answers as if it looked at every event, and never sees what is not yet there."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instructue_feast.datasets.rfm import Ledger

DAY = 86_400
events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40 * DAY), st.integers(-50, 50)), max_size=30)
question = st.tuples(st.integers(0, 4), st.integers(0, 45 * DAY))


def ledger(rows: list[tuple[int, int, int]]) -> Ledger:
    user, time, amount = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    return Ledger.of(user, time, amount.astype(np.float64))


@given(events, question, st.sampled_from([None, 1, 30]))
def test_a_ledger_equals_looking_at_every_event(
    rows: list[tuple[int, int, int]], asked: tuple[int, int], days: int | None
) -> None:
    user, now = asked
    mine = [(time, amount) for who, time, amount in rows if who == user and time < now]
    window = sum(amount for time, amount in mine if days is None or time >= now - days * DAY)
    who, when = np.array([user]), np.array([now])
    book = ledger(rows)
    assert book.before(who, when, days)[0] == window
    times = [time for time, _ in mine]
    assert np.array_equal(book.first(who, when), [min(times) if times else np.nan], equal_nan=True)
    assert np.array_equal(book.last(who, when), [max(times) if times else np.nan], equal_nan=True)


@given(events, question, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9 * DAY), st.integers(1, 9)), max_size=9))
def test_events_at_or_after_a_time_change_nothing(
    rows: list[tuple[int, int, int]], asked: tuple[int, int], later: list[tuple[int, int, int]]
) -> None:
    user, now = asked
    who, when = np.array([user]), np.array([now])
    before, after = ledger(rows), ledger(rows + [(one, now + delay, amount) for one, delay, amount in later])
    for one in ("before", "first", "last"):
        assert np.array_equal(getattr(before, one)(who, when), getattr(after, one)(who, when), equal_nan=True)


def test_without_amounts_events_are_counted() -> None:
    book = Ledger.of(np.array([1, 1, 2]), np.array([5, 10, 5]))
    assert book.before(np.array([1, 1, 2, 3]), np.array([10, 11, 11, 11])).tolist() == [1, 2, 1, 0]

"""The second computation of an answer, on histories small enough to check by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from instructue_feast.question_specs import AnySpec, QuestionSpec
from instructue_feast.user_qa.check import Asked, UserEvents, answers_again

SPECS: TypeAdapter[QuestionSpec] = TypeAdapter(AnySpec)


def ask(events: UserEvents, places: dict[str, int] | None = None, edges=(), before=None, number=1, **spec: Any):
    spec = {"id": "f", "source": "bill", **spec}
    asked = Asked(SPECS.validate_python(spec), places or {}, number, edges)
    return answers_again(asked, events, (10, 20), before)


def events(*rows: tuple[Any, ...]) -> UserEvents:
    """Rows `(t, event_id, subject, value, key)`."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), (), ()]
    t, ids = (np.array(column, dtype=np.int64) for column in columns[:2])
    return UserEvents(t, ids, *(list(column) for column in columns[2:]))


def test_windows_hold_their_start_and_not_their_end():
    at = [events((t, 1, None, None, None)) for t in (9, 10, 19, 20)]
    assert [ask(one, kind="occurs") for one in at] == [{0: {1}}, {0: {0}}, {0: {0}}, {0: {1}}]
    assert [ask(one, kind="inactive") for one in at] == [{0: {0}}, {0: {1}}, {0: {1}}, {0: {0}}]


def test_of_an_event_that_is_there_twice_the_later_copy_in_the_window_counts():
    mine = events((11, 1, "tea", 1.0, 5), (12, 1, "milk", 2.0, 6), (25, 1, "rice", 9.0, 7), (12, 1, None, 2.0, 6))
    answers = ask(mine, {"tea": 0, "milk": 1, "rice": 2}, number=3, kind="occurs", subject="word")
    assert answers == {0: {1}, 1: {0}, 2: {1}}


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ({"measure": "count"}, 3.0),
        ({"measure": "sum", "column": "x"}, 5.0),
        ({"measure": "mean", "column": "x"}, 2.5),
        ({"measure": "distinct", "column": "x"}, 2.0),
        ({"measure": "sum_per", "column": "x", "per": "y"}, 2.5),
    ],
)
def test_measures(measure: dict[str, Any], expected: float):
    mine = events((11, 1, None, 1.0, 5), (12, 2, None, 4.0, 5), (13, 3, None, None, 6), (30, 4, None, 8.0, 7))
    for edge, level in ((expected - 0.5, 1), (expected, 1), (expected + 0.5, 0)):
        answer = ask(mine, edges=[edge], kind="amount", levels=["low", "high"], **measure)
        assert level in answer[0]
    empty = ask(events(), edges=[1.0], kind="amount", levels=["low", "high"], **measure)
    assert empty == ({} if measure["measure"] in ("mean", "sum_per") else {0: {0}})


def test_a_change_needs_something_to_compare_with():
    spec = {"kind": "change", "threshold": 0.5}
    rows = [(11, 1, None, None, None), (5, 2, None, None, None), (6, 3, None, None, None)]
    assert ask(events(*rows), before=(0, 10), **spec)[0] == {0, 1}, "exactly half is as good as on the edge"
    assert ask(events(*rows[:2]), before=(0, 10), **spec) == {0: {1}}
    assert ask(events(*rows[1:]), before=(0, 10), **spec) == {0: {0}}
    assert ask(events(*rows[:1]), before=(0, 10), **spec) == {}
    more = [(12 + place, 9 + place, None, None, None) for place in range(3)]
    assert ask(events(*rows[:2], *more), before=(0, 10), **spec) == {0: {2}}
    assert ask(events(*rows[:2], *more), before=(0, 10), levels=["down", "not"], **spec) == {0: {1}}


def test_of_two_favourites_the_first_by_name_wins_and_excluded_ones_do_not_compete():
    mine = events(*[(11, n, one, None, None) for n, one in enumerate(["tea", "milk", "tea", "milk", "rice", None])])
    spec = {"kind": "favourite", "subject": "word"}
    assert ask(mine, {"milk": 0, "tea": 1, "rice": 2}, **spec) == {0: {0}}
    assert ask(mine, {"milk": 0, "tea": 1, "rice": 2}, exclude=["Milk"], **spec) == {0: {1}}
    assert ask(mine, {"rice": 0}, **spec) == {}, "milk is the favourite, but no answer"
    assert ask(events(), {"rice": 0}, **spec) == {}

"""Whoever's packed history is the same in two extracts is found, and nobody else."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.history.changes import CONTENT, unchanged_users
from instructue_feast.schema import PACKED_HISTORY

TIMES = [dt.datetime(2025, 3, day, tzinfo=dt.UTC) for day in (1, 2)]


def user(tokens: list[tuple[int, int]], numbers: list[float]) -> dict:
    return {
        "source_index": [0] * len(tokens),
        "text_id": [text for text, _ in tokens],
        "count_bucket": [count for _, count in tokens],
        "age_bucket": [1] * len(tokens),
        "num_events": [len(tokens), 0],
        "tabular_numeric": numbers,
    }


users = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        user,
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=3),
        st.lists(st.sampled_from([0.0, 1.5, float("nan")]), min_size=1, max_size=1),
    ),
)


def table(rows: dict[str, dict], day: int) -> pa.Table:
    listed = [{"user_id": name, "as_of": TIMES[day], **one} for name, one in rows.items()]
    return pa.Table.from_pylist(listed, schema=PACKED_HISTORY)


@settings(max_examples=200, deadline=None)
@given(users, users)
def test_unchanged_means_equal_in_every_column_but_as_of(new, old):
    found = unchanged_users(table(new, 0), table(old, 1))
    naive = [
        name in old and all(np.array_equal(one[key], old[name][key], equal_nan=True) for key in CONTENT)
        for name, one in new.items()
    ]
    assert found.tolist() == naive


def test_each_column_counts():
    same = user([(1, 0), (2, 1)], [1.5])
    for name in CONTENT:
        other = same | {name: [*same[name][:-1], 7]}
        assert unchanged_users(table({"a": same}, 0), table({"a": other}, 0)).tolist() == [False]

"""A packed history survives the few bytes a feature store holds of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.runs.history_bytes import decode_history, encode_history, run_tag, tag_of
from tests.model_data import NUMERIC, SOURCES, history_table, make_history

SIZES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(0, 2)), min_size=1, max_size=6)


def decode(values, users):
    return PackedHistory.from_arrow(decode_history(values, users), num_sources=len(SOURCES), num_numeric=len(NUMERIC))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_what_is_encoded_comes_back_bit_by_bit_and_any_selection_of_users_does(sizes, seed):
    history = make_history(sizes, seed=seed)
    values = encode_history(history_table(history), "night-1")
    order = np.random.default_rng(seed).permutation(len(history))
    back, expected = (
        decode([values[row] for row in order], [history.user_ids[row] for row in order]),
        history.take(order),
    )
    for field in dataclasses.fields(history):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(expected, field.name), err_msg=field.name)
    assert {tag_of(value) for value in values} == {run_tag("night-1")}


def test_a_text_takes_eleven_bytes():
    history = make_history([(30, 10, 2)])
    (value,) = encode_history(history_table(history), "night-1")
    assert len(value) == 26 + 11 * 42 + 4 * (3 + 3)


def test_another_release_and_half_a_value_are_refused():
    (value,) = encode_history(history_table(make_history([(5, 3, 1)])), "night-1")
    for wrong in (b"ph\x02" + value[3:], b"", b"ph"):
        with pytest.raises(VersionMismatchError, match="another release"):
            decode([wrong], ["u"])
    with pytest.raises(DataError, match="position 0 is cut off"):
        decode([value[:-5]], ["u"])

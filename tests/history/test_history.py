from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructue_feast import schema
from instructue_feast.errors import SchemaError
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES, bucketize
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.render import normalise, text_id


@given(st.text())
def test_a_normalised_text_is_stable_printable_and_free_of_markup(text):
    once = normalise(text)
    assert normalise(once) == once
    assert once
    assert once == unicodedata.normalize("NFC", once)
    assert not set(once) & set("<>[]|")
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in once)
    assert once.encode()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\x00b", "a b"),
        ("<USER>", "‹USER›"),
        ("x</bill>y", "x‹/bill›y"),
        ("[SEP]", "(SEP)"),
        ("<|im_end|>", "‹¦im_end¦›"),
        ("cafe\u0301", "café"),
        ("🎉 party", "🎉 party"),
        ("\u202eשלום", "שלום"),
        ("", "empty"),
        (" \t\n", "empty"),
    ],
)
def test_odd_texts_are_rendered_harmless(raw, expected):
    assert normalise(raw) == expected


def test_a_text_id_depends_on_the_source_and_on_the_text():
    ids = {text_id(source, text) for source in ("bill", "search") for text in ("coffee", "tea")}
    assert len(ids) == 4
    assert all(-(2**63) <= one < 2**63 for one in ids)


@given(st.integers(1, 10**7))
def test_a_bucket_is_the_number_of_edges_reached(count):
    assert bucketize([count], COUNT_EDGES)[0] == sum(edge <= count for edge in COUNT_EDGES)
    assert bucketize([count], AGE_EDGES_DAYS)[0] == sum(edge <= count for edge in AGE_EDGES_DAYS)


def packed(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema.PACKED_HISTORY)


def row(user: str, tokens: list[int], numeric: list[float]) -> dict:
    return {
        "user_id": user,
        "as_of": 1_500_000_000_000_000,
        "source_index": [0] * len(tokens),
        "text_id": tokens,
        "count_bucket": [1] * len(tokens),
        "age_bucket": [2] * len(tokens),
        "num_events": [len(tokens)],
        "tabular_numeric": numeric,
    }


def test_a_packed_history_round_trips_and_takes_users_in_any_order():
    table = packed([row("a", [1, 2], [0.5]), row("b", [], [float("nan")]), row("c", [7], [2.0])])
    history = PackedHistory.from_arrow(table, num_sources=1, num_numeric=1)
    assert history.offsets.tolist() == [0, 2, 2, 3]
    taken = history.take([2, 1, 0])
    assert taken.user_ids == ["c", "b", "a"]
    assert taken.text_id.tolist() == [7, 1, 2]
    assert taken.offsets.tolist() == [0, 1, 1, 3]
    assert np.isnan(taken.tabular_numeric[1, 0])


def test_chunked_and_sliced_tables_are_read_right():
    table = packed([row("a", [1, 2], [0.5]), row("b", [3], [1.5])])
    parts = pa.concat_tables([table.slice(1), table.slice(0, 1)])
    history = PackedHistory.from_arrow(parts, num_sources=1, num_numeric=1)
    assert history.text_id.tolist() == [3, 1, 2]
    assert history.tabular_numeric[:, 0].tolist() == [1.5, 0.5]


def test_lists_of_unequal_length_and_foreign_widths_are_refused():
    broken = row("a", [1, 2], [0.5]) | {"age_bucket": [1]}
    with pytest.raises(SchemaError, match="differ in length"):
        PackedHistory.from_arrow(packed([broken]), num_sources=1, num_numeric=1)
    with pytest.raises(SchemaError, match="the config declares 2"):
        PackedHistory.from_arrow(packed([row("a", [1], [0.5])]), num_sources=1, num_numeric=2)


def test_a_table_that_departs_from_its_schema_is_described():
    table = packed([row("a", [1], [0.5])])
    with pytest.raises(SchemaError, match=r"columns not found: \[as_of\]"):
        schema.check(table.drop(["as_of"]), schema.PACKED_HISTORY, "t")
    with pytest.raises(SchemaError, match=r"unexpected columns \[extra\]"):
        schema.check(table.append_column("extra", pa.array([1])), schema.PACKED_HISTORY, "t")
    wide = table.set_column(0, "user_id", table.column("user_id").cast(pa.large_string()))
    with pytest.raises(SchemaError, match="column user_id has type large_string"):
        schema.check(wide, schema.PACKED_HISTORY, "t")
    relaxed = pa.schema([field.with_nullable(True) for field in schema.PACKED_HISTORY])
    anonymous = pa.Table.from_pylist([row("a", [1], [0.5]) | {"user_id": None}], schema=relaxed)
    with pytest.raises(SchemaError, match="column user_id has 1 nulls"):
        schema.check(anonymous, schema.PACKED_HISTORY, "t")

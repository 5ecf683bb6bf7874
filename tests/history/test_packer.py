"""Packing: neither the chunks rows are cut into nor other `as_of`s packed at once change a history."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.history import packer
from instructue_feast.history.packer import REFUSED, ROWS, TEXT, USER, Packer, PackLayout, _order
from instructue_feast.history.render import text_id

DAY = 86_400_000_000
ALWAYS = -(1 << 62)
BUCKETS = {"ann": 0, "bob": 1, "bop": 1, "eve": 1, None: 2}
HASHES = {"ann": 7, "bob": 5, "bop": 5, "eve": 12, None: 6}  # the hashes of bob and bop begin alike


def layout(*as_ofs: int) -> PackLayout:
    """Two event sources and a tabular one; windows of 20 and 5 days."""
    return PackLayout(
        names=("bill", "search", "profile"), is_event=(True, True, False), caps=(3, 2, 0),
        by_frequency=(False, True, False), numeric_widths=(0, 0, 2),
        as_of_us=tuple(one * DAY for one in as_ofs),
        start_us=tuple(((one - 20) * DAY, (one - 5) * DAY, ALWAYS) for one in as_ofs),
        buckets=3, max_text_chars=8,
    )  # fmt: skip


USERS = ["ann", "bob", "bop", "eve"]
event = st.tuples(
    st.sampled_from(USERS), st.integers(0, 1), st.integers(0, 44), st.integers(0, 6), st.sampled_from("abcdé")
)
snapshot = st.tuples(st.sampled_from(USERS), st.integers(0, 44), st.integers(-3, 3), st.sampled_from(["x", "y", None]))


def row(user, slot, t, id_, text) -> tuple:
    """A row as Spark hands it over; `t` in days."""
    key = BUCKETS[user] << 61 | HASHES[user] << 20 | id_ & 0xFFFFF
    return key, user, t * DAY << 10 | slot, id_, text


def table(events, snapshots, listed) -> pa.Table:
    """Sorted rows; one refused row among them."""
    # Ids 3 and 4, and those of the two sources, have the same last bits.
    rows = [row(user, src + 1, t, (id_ // 2) << 20 | id_ // 4, text) for user, src, t, id_, text in events]
    for user, t, number, word in snapshots:
        # A hash of a row stands for its content, so that two equal hashes are two equal rows.
        content = json.dumps({"numeric": [number + 0.1, None], "words": ["city", word]})
        rows.append(row(user, 3, t, hash((t, number, word == "x", word is None)), content))
    rows += [row(user, 0, 0, 77, None) for user in listed]
    rows.append((row(None, 0, 0, 0, None)[0], None, -1 - (3 << 10 | 1), None, '{"user":null}'))
    rows.sort(key=lambda one: one[0])
    columns = [[one[place] for one in rows] for place in range(len(ROWS))]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, ROWS, strict=True)], schema=ROWS)


def pack(rows: pa.Table, plan: PackLayout, batch: int = 1 << 20) -> tuple[dict, set, list]:
    """Users by `as_of` and id, texts, refused rows."""
    users, texts, refused = {}, set(), []
    for packed in Packer(plan, text_id).pack(rows.to_batches(max_chunksize=batch)):
        for row in packed.to_pylist():
            if row["kind"] == USER:
                key = (plan.as_of_us[row["moment"]], row["user_id"])
                assert key not in users
                users[key] = str({name: row[name] for name in (*packer.PACKED_ROWS.names[4:11], "bucket")})
            elif row["kind"] == TEXT:
                texts.add((plan.as_of_us[row["moment"]], row["src"], row["id"], row["text"]))
            else:
                assert row["kind"] == REFUSED
                refused.append((row["user_id"], row["src"], row["status"], row["text"]))
    return users, texts, refused


@settings(max_examples=60, deadline=None)
@given(st.lists(event, max_size=60), st.lists(snapshot, max_size=8), st.sets(st.sampled_from(USERS)))
def test_neither_chunks_nor_folding_nor_other_as_ofs_change_a_history(events, snapshots, listed):
    rows = table(events, snapshots, listed)
    expected, texts, refused = {}, set(), []
    for as_of in (10, 25, 40):
        users, some, refused = pack(rows, layout(as_of))
        expected |= users
        texts |= some
    assert pack(rows, layout(10, 25, 40)) == (expected, texts, refused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "_CHUNK_ROWS", 3)
        patch.setattr(packer, "_MAX_TAIL_ROWS", 2)
        patch.setattr(packer, "_MAX_TEXTS", 1)
        assert pack(rows, layout(10, 25, 40), batch=2) == (expected, texts, refused)


def test_texts_that_begin_alike_or_hold_broken_bytes_are_cut_and_mended_before_they_are_counted():
    events = [("ann", 0, 1, 4, "12345678 and"), ("ann", 0, 2, 8, "12345678"), ("ann", 0, 3, 12, "brokén")]
    rows = table(events, [], [])
    broken = [b"br\xffk" if one == "brokén".encode() else one for one in rows["text"].cast(pa.binary()).to_pylist()]
    text = pa.array(broken, pa.binary()).view(pa.string())
    users, texts, _ = pack(rows.set_column(rows.column_names.index("text"), "text", text), layout(10))
    assert {one[3] for one in texts} == {"12345678", "br\ufffdk"}
    assert "'count_bucket': [1, 0]" in users[10 * DAY, "ann"]  # buckets of 2 and of 1


def test_a_user_with_many_events_keeps_few_rows(monkeypatch):
    monkeypatch.setattr(packer, "_CHUNK_ROWS", 100)
    monkeypatch.setattr(packer, "_MAX_TAIL_ROWS", 200)
    events = [("ann", 0, 1 + number % 9, 4 * number, "abc"[number % 3]) for number in range(5_000)]
    one, largest = Packer(layout(10), text_id), 0
    for batch in table(events, [], []).to_batches(max_chunksize=100):
        list(one._arrive(pa.Table.from_batches([batch])))
        largest = max(largest, len(one._tail), sum(len(tokens.text) for tokens in one._folded[0]))
    assert largest <= 300
    (packed,) = [row for part in one._users(one._tail) for row in part.to_pylist() if row["kind"] == USER]
    assert packed["num_events"] == [5_000, 0, 0]
    assert packed["count_bucket"] == [11, 11, 11]


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 2**20, 2**62]), st.integers(0, 200))
def test_rows_are_ordered_by_group_then_place_then_tie_whatever_their_size(seed, width, rows):
    rng = np.random.default_rng(seed)
    group, place, tie = rng.integers(0, 5, rows), rng.integers(-width, width, rows), rng.integers(-9, 9, rows)
    order = _order(group, place, tie)
    assert sorted(order.tolist()) == list(range(rows))
    found = list(zip(group[order].tolist(), place[order].tolist(), tie[order].tolist(), strict=True))
    assert found == sorted(found)

"""`Packer`: the events and snapshots of one user after the other become packed histories and texts.

Rows come as five narrow columns (`ROWS`), because each costs time on its way into Python, sorted by one number:

    key    bucket | first bits of the user's hash | last `KEY_EVENT_BITS` of the event id
    when   microseconds, and in the last `SLOT_BITS` the slot: 0 for the roster, then the sources in config order

Rows that agree in all but the event's bits are a *block*: one user, seldom a few whose hashes begin alike. A block is
finished when the next one begins. Whatever a user did, memory stays bounded: of a block that has very many rows, they
are folded into counts per distinct text as soon as their ids, and so their keys, cannot repeat any more.

Several `as_of`s are packed from the same rows; each sees only its own window.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from instructue_feast.history import render
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES, bucketize

# N = rows of a chunk, T = tokens, U = users, S = sources, K = S + 1 slots (the roster is slot 0), M = as_ofs

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

USER, TEXT, REFUSED = 0, 1, 2
"""Kinds of packed rows."""

PACKED_ROWS = pa.schema(
    [
        pa.field("kind", pa.int32(), nullable=False),
        pa.field("moment", pa.int32(), nullable=False),
        pa.field("bucket", pa.int32()),
        pa.field("user_id", pa.string()),
        pa.field("source_index", pa.list_(pa.int32())),
        pa.field("text_id", pa.list_(pa.int64())),
        pa.field("count_bucket", pa.list_(pa.int32())),
        pa.field("age_bucket", pa.list_(pa.int32())),
        pa.field("num_events", pa.list_(pa.int32())),
        pa.field("tabular_numeric", pa.list_(pa.float32())),
        pa.field("kept", pa.list_(pa.int32())),
        pa.field("src", pa.int32()),
        pa.field("status", pa.int32()),
        pa.field("t", pa.int64()),
        pa.field("id", pa.int64()),
        pa.field("text", pa.string()),
    ]
)
"""What a packer makes: one row per user and `as_of` (`kept`: rows of each slot that count), per source, text and
`as_of`, and per refused row; `moment` is the position of the `as_of`, 0 for refused rows."""

KEY_BITS = 63
"""Bits of a key; the sign is never used, so that it sorts like the number it is."""
KEY_EVENT_BITS = 20
SLOT_BITS = 10
"""Bits of `when` that hold the slot."""
MAX_SOURCES = (1 << SLOT_BITS) - 1
"""Sources, with the roster, that fit into `when`."""

ROWS = pa.schema(
    [
        pa.field("key", pa.int64()),
        pa.field("user_id", pa.string()),
        pa.field("when", pa.int64()),
        pa.field("event_id", pa.int64()),
        pa.field("text", pa.string()),
    ]
)
"""What a packer takes. `event_id` is of a snapshot the hash of its row, `text` of a snapshot JSON (`SNAPSHOT`).
The text of an event may be longer than a text may be, and need not be UTF-8.

A refused row has `-1 - (status << SLOT_BITS | slot)` as `when`, its time in `event_id` and its JSON in `text`.
"""

SNAPSHOT = pa.schema([pa.field("numeric", pa.list_(pa.float32())), pa.field("words", pa.list_(pa.string()))])
"""The JSON of a snapshot: its numbers and its rendered categorical values, null for what is missing."""

_DAY_US = 86_400_000_000
_AGE_EDGES_US = tuple(edge * _DAY_US for edge in AGE_EDGES_DAYS)
_CHUNK_ROWS = 1 << 16
_CHUNK_BYTES = 1 << 27
_MAX_TAIL_ROWS = 1 << 18
_MAX_TEXTS = 200_000
_NOTHING = b'{"numeric":[],"words":[]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLayout:
    """What a packer must know about the project.

    Attributes:
        names: S sources in config order.
        is_event: Whether each is an event source; the others hold snapshots.
        caps: Most texts of each event source, 0 for a tabular one.
        by_frequency: Whether the most frequent texts of a source are kept, instead of the most recent.
        numeric_widths: Numeric columns of each source, 0 for an event source.
        as_of_us: M points in time, in microseconds.
        start_us: `[M][S]` where the window of each source begins.
        buckets: Buckets of users.
        max_text_chars: Code points an event's text is cut to.
    """

    names: tuple[str, ...]
    is_event: tuple[bool, ...]
    caps: tuple[int, ...]
    by_frequency: tuple[bool, ...]
    numeric_widths: tuple[int, ...]
    as_of_us: tuple[int, ...]
    start_us: tuple[tuple[int, ...], ...]
    buckets: int
    max_text_chars: int


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Distinct texts of groups, a group being a user and a slot: how often, and when last."""

    group: Ints
    text: Ints
    count: Ints
    last: Ints

    def where(self, kept: Mask | Ints) -> _Tokens:
        return _Tokens(self.group[kept], self.text[kept], self.count[kept], self.last[kept])


class _Rows:
    """Rows of users as arrays.

    Args:
        table: `ROWS` and `text_id`, sorted by `key`.
        slots: K.
        known: Users the first block began with, in the order of their folded counts; gets those who are new in it.
    """

    def __init__(self, table: pa.Table, slots: int, known: list[str]) -> None:
        self.table = table
        when, self.key, self.event, self.text = (
            _numbers(table, name) for name in ("when", "key", "event_id", "text_id")
        )
        self.slot: Ints = when & MAX_SOURCES
        self.t: Ints = when >> SLOT_BITS
        self.user, self.user_ids, self.user_keys = _users_of(table, self.key, known)
        self.group: Ints = self.user * slots + self.slot


class Packer:
    """Packs the rows of one partition.

    Args:
        layout: The project.
        identify: Makes the id of a source's text.
    """

    def __init__(self, layout: PackLayout, identify: Callable[[str, str], int] = render.text_id) -> None:
        self._layout, self._identify = layout, identify
        self._slots = len(layout.names) + 1
        self._is_event = np.array([False, *layout.is_event])
        unbounded = np.iinfo(np.int64).min
        self._starts = np.array([[unbounded, *one] for one in layout.start_us], np.int64)
        self._numeric_at = np.cumsum([0, 0, *layout.numeric_widths])  # by slot
        self._texts: dict[tuple[int, str], list[int]] = {}  # text id, and the as_ofs it was handed out for, as bits
        self._tail: pa.Table | None = None
        self._folded: list[list[_Tokens]] = [[] for _ in layout.as_of_us]  # of the users of the tail
        self._known: list[str] = []  # users of the tail some of whose rows were folded
        self._bucket_shift = KEY_BITS - bucket_bits(layout.buckets)

    def pack(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        """Packs rows sorted by `key`.

        Args:
            batches: `ROWS`.

        Yields:
            Tables of `PACKED_ROWS`; users come bucket by bucket.
        """
        waiting: list[pa.RecordBatch] = []
        rows = size = 0
        for batch in batches:
            waiting.append(batch)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                yield from self._arrive(pa.Table.from_batches(waiting))
                waiting, rows, size = [], 0, 0
        if waiting:
            yield from self._arrive(pa.Table.from_batches(waiting))
        if self._tail is not None:
            yield from self._users(self._tail)

    def _arrive(self, table: pa.Table) -> Iterator[pa.Table]:
        table = table.combine_chunks()
        when = _numbers(table, "when")
        refused = when < 0
        if refused.any():
            yield _refused_rows(table.filter(pa.array(refused)))
            table, when = table.filter(pa.array(~refused)), when[~refused]
        slot, t = when & MAX_SOURCES, when >> SLOT_BITS
        event = self._is_event[slot]
        inside = [self._in_window(moment, slot, t) & event for moment in range(len(self._starts))]
        ids, texts = self._text_ids(slot, table.column("text"), dict(enumerate(inside)))
        if texts is not None:
            yield texts
        # Only snapshots need their text any longer.
        content = pc.if_else(pa.array(event), pa.scalar(None, pa.string()), table.column("text"))
        table = table.set_column(table.column_names.index("text"), "text", content)
        rows = table.append_column("text_id", pa.array(ids))
        rows = rows if self._tail is None else pa.concat_tables([self._tail, rows])
        starts = _changes(_numbers(rows, "key") >> KEY_EVENT_BITS)
        if not len(starts):
            return
        last = int(starts[-1])
        if last:
            yield from self._users(rows.slice(0, last))
        self._tail = self._bounded(rows.slice(last).combine_chunks())

    def _in_window(self, moment: int, slot: Ints, t: Ints) -> Mask:
        return np.asarray((t < self._layout.as_of_us[moment]) & (t >= self._starts[moment][slot]))

    # -------------------------------------------------------------------------------------------------------- texts

    def _text_ids(self, slot: Ints, texts: pa.ChunkedArray, inside: dict[int, Mask]) -> tuple[Ints, pa.Table | None]:
        """`[N]` ids of texts, and rows for those that were not handed out yet for an `as_of` they belong to."""
        if len(self._texts) > _MAX_TEXTS:  # handing a text out twice is harmless
            self._texts.clear()
        encoded = texts.combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        words = self._cut(encoded.dictionary)
        valid = np.asarray(encoded.indices.is_valid())
        pair = np.asarray(encoded.indices.fill_null(0)).astype(np.int64) * self._slots + slot
        ids = np.zeros(max(1, len(words)) * self._slots, np.int64)
        there = {moment: np.bincount(pair[mask & valid], minlength=len(ids)) > 0 for moment, mask in inside.items()}
        new: list[tuple[int, int, int, str]] = []
        for one in np.flatnonzero(np.logical_or.reduce(list(there.values()))).tolist():
            wanted = sum(1 << moment for moment, flags in there.items() if flags[one])
            key = (one % self._slots, words[one // self._slots])
            entry = self._texts.get(key)
            if entry is None or wanted & ~entry[1]:
                source, text = self._layout.names[key[0] - 1], render.normalise(key[1])
                entry = self._texts.setdefault(key, [self._identify(source, text), 0])
                missing = wanted & ~entry[1]
                new += [(moment, key[0] - 1, entry[0], text) for moment in inside if missing >> moment & 1]
                entry[1] |= wanted
            ids[one] = entry[0]
        if not new:
            return ids[pair], None
        columns = [list(column) for column in zip(*new, strict=True)]
        texts_of = dict(zip(("src", "id", "text"), columns[1:], strict=True))
        return ids[pair], _packed_rows(TEXT, columns[0], len(new), **texts_of)

    def _cut(self, texts: pa.StringArray) -> list[str]:
        """Distinct texts as strings; Spark neither cuts nor mends a whole text, because it has every copy of it."""
        most = self._layout.max_text_chars
        return [one.decode("utf-8", "replace")[:most] for one in texts.cast(pa.binary()).to_pylist()]

    # -------------------------------------------------------------------------------------------- rows that count

    def _events(self, rows: _Rows, moment: int) -> Ints:
        """Positions of the events of an `as_of`, each once: the greatest time wins, then the smallest text id."""
        inside = np.flatnonzero(self._in_window(moment, rows.slot, rows.t) & self._is_event[rows.slot])
        key = rows.key[inside]
        again = key[1:] == key[:-1]
        if not again.any():
            return inside
        # Copies of an event have the same key, so few rows need a closer look.
        close = np.concatenate([[False], again]) | np.concatenate([again, [False]])
        copies = inside[close]
        group, event = rows.group[copies], rows.event[copies]
        order = np.lexsort((rows.text[copies], -rows.t[copies], event, group))
        group, event = group[order], event[order]
        best = order[np.concatenate([[True], (group[1:] != group[:-1]) | (event[1:] != event[:-1])])]
        return np.sort(np.concatenate([inside[~close], copies[best]]))

    def _snapshots(self, rows: _Rows, moment: int) -> Ints:
        """Positions of the snapshots of an `as_of`: the latest of each group, then the smallest hash."""
        inside = np.flatnonzero(self._in_window(moment, rows.slot, rows.t) & ~self._is_event[rows.slot])
        order = inside[_order(rows.group[inside], -rows.t[inside], rows.event[inside])]
        return order[_changes(rows.group[order])]

    def _bounded(self, tail: pa.Table) -> pa.Table:
        """The rows of a block that may go on; of very many, most are folded into counts."""
        if len(tail) <= _MAX_TAIL_ROWS:
            return tail
        rows = _Rows(tail, self._slots, self._known)
        self._known = rows.user_ids.to_pylist()
        same = rows.key == rows.key[-1]  # more copies may come
        kept = [np.flatnonzero(same)[-1:]]
        for moment, folded in enumerate(self._folded):
            events = self._events(rows, moment)
            kept += [events[same[events]], self._snapshots(rows, moment)]
            events = events[~same[events]]
            folded.append(_merged(_counted(rows, events), *folded))
            del folded[:-1]
        return tail.take(pa.array(np.unique(np.concatenate(kept))))

    # ------------------------------------------------------------------------------------------------------ packing

    def _users(self, table: pa.Table) -> Iterator[pa.Table]:
        """Packs users who are complete."""
        rows = _Rows(table.combine_chunks(), self._slots, self._known)
        self._known = []
        for moment, folded in enumerate(self._folded):
            tokens = _counted(rows, self._events(rows, moment))
            if folded:
                tokens = _merged(tokens, *folded)
                folded.clear()
            yield from self._packed(rows, moment, tokens, self._snapshots(rows, moment))

    def _packed(self, rows: _Rows, moment: int, tokens: _Tokens, snapshots: Ints) -> Iterator[pa.Table]:
        slots = self._slots
        first = _changes(tokens.group)
        groups = tokens.group[first]
        totals = np.add.reduceat(tokens.count, first) if len(first) else np.empty(0, np.int64)
        owner = rows.group[snapshots]
        users = np.unique(np.concatenate([groups, owner]) // slots)
        if not len(users):
            return
        kept_UK = np.zeros((len(users), slots), np.int32)
        kept_UK[np.searchsorted(users, groups // slots), groups % slots] = totals
        kept_UK[np.searchsorted(users, owner // slots), owner % slots] = 1
        num_events_UK = np.where(self._is_event, kept_UK, 0).astype(np.int32)
        numeric_UC = np.full((len(users), self._numeric_at[-1]), np.nan, np.float32)
        words, texts = self._tabular(rows, moment, snapshots, users, num_events_UK, numeric_UC)
        if texts is not None:
            yield texts
        tokens = self._capped(tokens, first)
        age = bucketize(self._layout.as_of_us[moment] - tokens.last, _AGE_EDGES_US)
        ago = tokens.last - (tokens.last.min() if len(tokens.last) else 0)  # small numbers, as the places of words are
        group, place, text = (
            np.concatenate(pair) for pair in zip((tokens.group, ago, tokens.text), words, strict=True)
        )
        none = np.zeros(len(words[0]), np.int32)
        order = _order(group, place, text)
        ends = np.searchsorted(group[order] // slots, users, side="right").astype(np.int32)
        offsets = np.concatenate([np.zeros(1, np.int32), ends])
        columns = {
            "source_index": (group[order] % slots - 1).astype(np.int32),
            "text_id": text[order],
            "count_bucket": np.concatenate([bucketize(tokens.count, COUNT_EDGES), none])[order],
            "age_bucket": np.concatenate([age, none])[order],
        }
        yield _packed_rows(
            USER, moment, len(users),
            bucket=(rows.user_keys[users] >> self._bucket_shift).astype(np.int32),
            user_id=rows.user_ids.take(pa.array(users)),
            **{name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)) for name, values in columns.items()},
            num_events=_lists(num_events_UK[:, 1:]), tabular_numeric=_lists(numeric_UC), kept=_lists(kept_UK),
        )  # fmt: skip

    def _tabular(
        self, rows: _Rows, moment: int, snapshots: Ints, users: Ints, num_events_UK: Any, numeric_UC: Any
    ) -> tuple[tuple[Ints, Ints, Ints], pa.Table | None]:
        """Fills in numbers and how many values are present; returns `group, place, text_id` of the words."""
        snapshots = snapshots[rows.slot[snapshots] > 0]
        group, slot = rows.group[snapshots], rows.slot[snapshots]
        at = np.searchsorted(users, group // self._slots)
        content = _contents(rows.table.column("text").take(pa.array(snapshots)))
        numeric = content.column("numeric").combine_chunks()
        for one in np.unique(slot).tolist():
            mine = np.flatnonzero(slot == one)
            first, end = int(self._numeric_at[one]), int(self._numeric_at[one + 1])
            values = pc.fill_null(numeric.take(pa.array(mine)).flatten(), np.float32(np.nan)).to_numpy()
            values = values.reshape(len(mine), end - first)
            numeric_UC[at[mine], first:end] = values
            num_events_UK[at[mine], one] = (~np.isnan(values)).sum(axis=1)
        lists = content.column("words").combine_chunks()
        parent = np.asarray(pc.list_parent_indices(lists)).astype(np.int64)
        values = lists.flatten()
        place = np.arange(len(parent)) - np.searchsorted(parent, parent)
        there = np.asarray(values.is_valid())
        ids, texts = self._text_ids(slot[parent], pa.chunked_array([values]), {moment: there})
        np.add.at(num_events_UK, (at[parent[there]], slot[parent[there]]), 1)
        return (group[parent[there]], place[there], ids[there]), texts

    def _capped(self, tokens: _Tokens, first: Ints) -> _Tokens:
        """The texts of each group that are worth most, as many as its source may have."""
        sizes = np.diff(np.append(first, len(tokens.group)))
        slot = tokens.group[first] % self._slots
        caps = np.array([0, *self._layout.caps])[slot]
        over = np.repeat(sizes > caps, sizes)
        if not over.any():
            return tokens
        crowd = tokens.where(over)
        frequent = np.array([False, *self._layout.by_frequency])[crowd.group % self._slots]
        worth = np.where(frequent, crowd.count, crowd.last)
        second = np.where(frequent, crowd.last, crowd.count)
        order = np.lexsort((crowd.text, -second, -worth, crowd.group))
        crowd = crowd.where(order)
        start = _changes(crowd.group)
        length = np.diff(np.append(start, len(crowd.group)))
        rank = np.arange(len(crowd.group)) - np.repeat(start, length)
        best = crowd.where(rank < np.repeat(caps[sizes > caps], length))
        rest = tokens.where(~over)
        return _Tokens(*(np.concatenate(pair) for pair in zip(_fields(rest), _fields(best), strict=True)))


def _fields(tokens: _Tokens) -> tuple[Ints, Ints, Ints, Ints]:
    return tokens.group, tokens.text, tokens.count, tokens.last


def _counted(rows: _Rows, events: Ints) -> _Tokens:
    one = np.ones(len(events), np.int64)
    return _merged(_Tokens(rows.group[events], rows.text[events], one, rows.t[events]))


def _merged(*parts: _Tokens) -> _Tokens:
    """Adds up what is known of the same text in the same group; sorted by group."""
    group, text, count, last = (np.concatenate(columns) for columns in zip(*map(_fields, parts), strict=True))
    if not len(group):
        return _Tokens(group, text, count, last)
    known = pa.array(text).dictionary_encode()
    both = group * len(known.dictionary) + known.indices.to_numpy()
    order = np.argsort(both)
    group, text, first = group[order], text[order], _changes(both[order])
    return _Tokens(
        group[first], text[first], np.add.reduceat(count[order], first), np.maximum.reduceat(last[order], first)
    )


def _order(group: Ints, place: Ints, tie: Ints) -> Ints:
    """`np.lexsort((tie, place, group))`; by one number where group and place fit into it, which is far quicker."""
    if not len(group):
        return np.empty(0, np.int64)
    low = int(place.min())
    bits = (int(place.max()) - low).bit_length()
    if int(group.max()).bit_length() + bits > 63:
        return np.lexsort((tie, place, group))
    both = (group << bits) | (place - low)
    order = np.argsort(both)
    again = np.diff(both[order]) == 0
    if again.any():
        close = np.flatnonzero(np.concatenate([[False], again]) | np.concatenate([again, [False]]))
        ties = order[close]
        order[close] = ties[np.lexsort((tie[ties], both[ties]))]
    return order


def _changes(values: Ints) -> Ints:
    """Where each run of equal values begins."""
    if not len(values):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))


def bucket_bits(buckets: int) -> int:
    """How many of the first bits of a key hold the bucket."""
    return max(1, (buckets - 1).bit_length())


def _users_of(table: pa.Table, key: Ints, known: list[str]) -> tuple[Ints, pa.Array, Ints]:
    """`[N]` users by number, block by block; U user ids; `[U]` a key of each.

    The users `known` have the first numbers, whether they have rows or not.
    """
    starts = np.diff(key >> KEY_EVENT_BITS, prepend=-1) != 0
    block = np.cumsum(starts) - 1
    ids = table.column("user_id").combine_chunks()
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    differs = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    first = np.flatnonzero(starts)
    if len(known) < 2 and not (differs & ~starts[1:]).any() and (not known or ids[0].as_py() == known[0]):
        return block, ids.take(pa.array(first)), key[first]
    coded = ids.dictionary_encode()
    words: list[str] = coded.dictionary.to_pylist()
    ranks = {user: rank for rank, user in enumerate(known)}
    code = np.asarray(coded.indices).astype(np.int64)
    for one in code[block == 0].tolist():
        ranks.setdefault(words[one], len(ranks))
    rank_of = np.array([ranks.get(word, len(ranks)) for word in words])
    later = len(ranks) + np.arange(len(words))
    place = block * (2 * len(ranks) + len(words)) + np.where(block == 0, rank_of[code], later[code])
    found = np.unique(np.concatenate([np.arange(len(ranks)), place]), return_inverse=True)[1]
    user: Ints = found[len(ranks) :].astype(np.int64)
    first = np.unique(user, return_index=True)[1]
    named = ids.take(pa.array(first[user[first] >= len(ranks)]))
    keys = np.concatenate([np.full(len(ranks), key[0]), key[first[user[first] >= len(ranks)]]])
    return user, pa.concat_arrays([pa.array(list(ranks), pa.string()), named]), keys


def _contents(texts: pa.ChunkedArray) -> pa.Table:
    """What the JSON of snapshots holds; nothing for a null."""
    lines = [_NOTHING if one is None else one for one in texts.cast(pa.binary()).to_pylist()]
    if not lines:
        return SNAPSHOT.empty_table()
    data = b"\n".join(lines)
    return pyarrow.json.read_json(
        io.BytesIO(data),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=SNAPSHOT, unexpected_field_behavior="error"),
    )


def _refused_rows(table: pa.Table) -> pa.Table:
    code = -1 - _numbers(table, "when")
    columns = {"user_id": table.column("user_id"), "t": table.column("event_id"), "text": table.column("text")}
    numbers = {"src": (code & MAX_SOURCES) - 1, "status": code >> SLOT_BITS}
    return _packed_rows(REFUSED, 0, len(table), **columns, **{k: v.astype(np.int32) for k, v in numbers.items()})


def _numbers(table: pa.Table, name: str) -> Ints:
    """A column as int64, nulls as 0."""
    column = table.column(name)
    if column.null_count:
        column = pc.fill_null(column, 0)
    return np.asarray(column.to_numpy()).astype(np.int64, copy=False)


def _lists(matrix: npt.NDArray[Any]) -> pa.ListArray:
    width = matrix.shape[1]
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(matrix).ravel()))


def _packed_rows(kind: int, moment: int | Sequence[int], rows: int, **columns: Any) -> pa.Table:
    """A table of `PACKED_ROWS` with nulls for what is not given."""
    given = {"kind": np.full(rows, kind, np.int32), "moment": np.full(rows, moment, np.int32), **columns}
    arrays = [
        pa.nulls(rows, field.type) if field.name not in given else _as(given[field.name], field.type)
        for field in PACKED_ROWS
    ]
    return pa.Table.from_arrays(arrays, schema=PACKED_ROWS)


def _as(values: Any, kind: pa.DataType) -> Any:
    return values.cast(kind) if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)

"""The newest row of every user in the Parquet files behind a feature view, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from instructue_feast.errors import InvalidEmbeddingError, SchemaError, StorageError
from instructue_feast.runs.audit import vector_matrix

# U = users, D = numbers in a vector
Micros = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Columns:
    """Names in the files; `created` is `None` where the source has no such column."""

    user: str
    event: str
    created: str | None
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Newest rows: ids, times in microseconds, and for each feature `[U, D]` float32 or a list of bytes."""

    ids: pa.Array
    event: Micros
    created: Micros | None
    values: dict[str, npt.NDArray[np.float32] | list[bytes]]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Some of the rows, in that order."""
        values = {
            name: [one[row] for row in rows] if isinstance(one, list) else one[rows]
            for name, one in self.values.items()
        }
        created = None if self.created is None else self.created[rows]
        return Batch(self.ids.take(pa.array(rows)), self.event[rows], created, values)


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    rows: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Picked:
    """Rows of a file that are the newest of their user; `rows` is `None` for all."""

    file: _File
    rows: pa.Array | None
    index: pa.Table


class Scan:
    """Finds the newest row of each user by event time, then by the created time; then reads those rows alone.

    The keys of every file in the window are read, vectors only of the rows that win: memory grows with the number of
    users, not with the size of their vectors or the number of runs.

    Args:
        location: A folder of Parquet files, or one file; a path or an fsspec URL.
        columns: What the files call their columns.
        first, last: The window of event times, both included, in microseconds since 1970.
        where: The view, for error messages.

    Raises:
        StorageError: A file cannot be read.
        SchemaError: A file lacks a column, or a user id or a time is null.
    """

    def __init__(self, location: str, columns: Columns, first: int, last: int, where: str) -> None:
        self.columns, self.where = columns, where
        self._window = first, last
        try:
            self._fs, path = fsspec.core.url_to_fs(location)
            self._picked = self._pick(self._files(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise StorageError(
                f"cannot read the files of view {where}: {type(error).__name__}",
                "was the publication removed? Publish again, then `feast apply`",
            ) from error
        self.rows = sum(one.index.num_rows for one in self._picked)

    def batches(self, size: int) -> Iterator[Batch]:
        """Reads the newest rows in batches of `size`, the last one smaller.

        Raises:
            InvalidEmbeddingError: A vector holds NaN, infinity or null, or has another length than the rest.
            StorageError: An erasure has replaced a file since its keys were read.
        """
        held: list[Batch] = []
        count = 0
        for picked in self._picked:
            for batch in self._read(picked, size):
                held.append(batch)
                count += len(batch)
                while count >= size:
                    whole = _joined(held)
                    yield _slice(whole, 0, size)
                    held, count = ([_slice(whole, size, count)], count - size) if count > size else ([], 0)
        if count:
            yield _joined(held)

    def _files(self, path: str) -> list[_File]:
        if self._fs.isdir(path):
            paths = sorted(str(one) for one in self._fs.glob(f"{path.rstrip('/')}/**/*.parquet"))
        else:
            paths = [path]
        if not paths:
            raise FileNotFoundError(path)
        first, last = self._window
        files = []
        for one in paths:
            with self._fs.open(one, "rb") as stream:
                metadata = pq.read_metadata(stream)
            lowest, highest = _range(metadata, self.columns.event)
            if metadata.num_rows and highest >= first and lowest <= last:
                files.append(_File(one, metadata.num_rows, lowest, highest))
        return files

    def _pick(self, files: list[_File]) -> list[_Picked]:
        """Goes from the latest files to the earliest and takes from each the users not seen before."""
        seen: list[pa.Array] = []
        picked = []
        for group in _disjoint_in_time(files):
            index = pa.concat_tables([self._index(number, file) for number, file in enumerate(group)])
            if pc.count_distinct(index["user"]).as_py() < index.num_rows:
                index = _newest(index)
            if seen:
                index = index.filter(pc.invert(pc.is_in(index["user"], value_set=pa.concat_arrays(seen))))
            if not index.num_rows:
                continue
            seen.append(index["user"].combine_chunks())
            for number, file in enumerate(group):
                mine = index if len(group) == 1 else index.filter(pc.equal(index["file"], number))
                if mine.num_rows:
                    rows = None if mine.num_rows == file.rows else mine["row"].combine_chunks()
                    picked.append(_Picked(file, rows, mine.select(["user", "event", "created"])))
        return picked

    def _index(self, number: int, file: _File) -> pa.Table:
        names = [self.columns.user, self.columns.event, *filter(None, [self.columns.created])]
        table = self._table(file, names)
        user, event = table[self.columns.user], _micros(table[self.columns.event])
        if user.null_count or event.null_count:
            raise SchemaError(f"view {self.where} has rows without a user id or a time", "publish again without them")
        created = _micros(table[self.columns.created]) if self.columns.created else event
        if created.null_count:
            raise SchemaError(f"view {self.where} has rows without a created time", "publish again without them")
        rows = pa.array(np.arange(table.num_rows, dtype=np.int64))
        index = pa.table(
            {
                "user": user.cast(pa.string()),
                "event": event,
                "created": created,
                "file": pa.array(np.full(table.num_rows, number, dtype=np.int32)),
                "row": rows,
            }
        )
        first, last = self._window
        if file.first >= first and file.last <= last:
            return index
        return index.filter(pc.and_(pc.greater_equal(event, first), pc.less_equal(event, last)))

    def _opened(self, stream: Any, file: _File) -> pq.ParquetFile:
        """Only an erasure replaces a published file, and by one with fewer rows: then row numbers are wrong."""
        parquet = pq.ParquetFile(stream)
        if parquet.metadata.num_rows != file.rows:
            raise StorageError(
                f"a file of view {self.where} was replaced while it was read", "was somebody erased? Materialize again"
            )
        return parquet

    def _table(self, file: _File, names: list[str]) -> pa.Table:
        with self._fs.open(file.path, "rb") as stream:
            parquet = self._opened(stream, file)
            missing = [one for one in names if one not in parquet.schema_arrow.names]
            if missing:
                raise SchemaError(f"a file of view {self.where} has no column {missing[0]}", "publish again")
            return parquet.read(columns=names)

    def _read(self, picked: _Picked, size: int) -> Iterator[Batch]:
        features = list(self.columns.features)
        index = picked.index.combine_chunks()
        if picked.rows is None:
            with self._fs.open(picked.file.path, "rb") as stream:
                start = 0
                for part in self._opened(stream, picked.file).iter_batches(size, columns=features):
                    yield self._batch(index.slice(start, len(part)), pa.Table.from_batches([part]))
                    start += len(part)
            return
        table = self._table(picked.file, features)
        for start in range(0, index.num_rows, size):
            yield self._batch(index.slice(start, size), table.take(picked.rows.slice(start, size)))

    def _batch(self, index: pa.Table, table: pa.Table) -> Batch:
        values: dict[str, npt.NDArray[np.float32] | list[bytes]] = {}
        for name in self.columns.features:
            kind = table.schema.field(name).type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                values[name] = table[name].to_pylist()
                continue
            vectors = vector_matrix(table, name, f"view {self.where}").astype(np.float32, copy=False)
            # A sum is finite exactly when every number is, unless it overflows: then the numbers are looked at.
            if not np.isfinite(vectors.sum(dtype=np.float64)) and not np.isfinite(vectors).all():
                raise InvalidEmbeddingError(f"view {self.where} holds NaN or infinity", "publish a run without them")
            values[name] = vectors
        created = index["created"].to_numpy() if self.columns.created else None
        return Batch(index["user"].combine_chunks(), index["event"].to_numpy(), created, values)


def _disjoint_in_time(files: list[_File]) -> Iterator[list[_File]]:
    """Groups of files whose event times overlap, the latest group first. Usually a group is one run."""
    group: list[_File] = []
    for file in sorted(files, key=lambda one: (-one.last, one.path)):
        if group and file.last < min(one.first for one in group):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _newest(index: pa.Table) -> pa.Table:
    order = [("event", "descending"), ("created", "descending")]
    ranked = index.take(pc.sort_indices(index, sort_keys=order))
    codes = ranked["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return ranked.take(pa.array(first)).sort_by([("file", "ascending"), ("row", "ascending")])


def _range(metadata: Any, column: str) -> tuple[int, int]:
    """The lowest and highest event time that the file's statistics promise, in microseconds."""
    names = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    lowest, highest = [], []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(names.index(column)).statistics if column in names else None
        if statistics is None or not statistics.has_min_max:
            return np.iinfo(np.int64).min, np.iinfo(np.int64).max
        kind = metadata.schema.to_arrow_schema().field(column).type
        bounds = _micros(pa.array([statistics.min, statistics.max], kind)).to_pylist()
        lowest.append(bounds[0])
        highest.append(bounds[1])
    return min(lowest, default=0), max(highest, default=0)


def _micros(times: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Times of any unit as microseconds since 1970; without a zone they are in UTC."""
    zone = getattr(times.type, "tz", None)
    return times.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    values: dict[str, npt.NDArray[np.float32] | list[bytes]] = {}
    for name, first in batches[0].values.items():
        parts = [one.values[name] for one in batches]
        if isinstance(first, list):
            values[name] = [value for part in parts for value in part]
        else:
            values[name] = np.concatenate(parts)
    created = [one.created for one in batches if one.created is not None]
    return Batch(
        pa.concat_arrays([one.ids for one in batches]),
        np.concatenate([one.event for one in batches]),
        np.concatenate(created) if created else None,
        values,
    )


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(
        batch.ids.slice(start, stop - start),
        batch.event[start:stop],
        None if batch.created is None else batch.created[start:stop],
        {name: values[start:stop] for name, values in batch.values.items()},
    )

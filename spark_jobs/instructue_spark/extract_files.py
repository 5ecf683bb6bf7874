"""What the tasks of an extraction write: histories where they are packed, phrasebook and quarantine after a shuffle.

A file counts when the driver hears of it in the result of the job. A task that fails, is repeated or runs twice at once
writes under another name, and what nobody has named is removed before the manifest is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import TaskContext

from instructue_feast import schema
from instructue_feast.errors import RunConflictError
from instructue_feast.history.packer import REFUSED, TEXT, USER, PackLayout
from instructue_feast.runs.ownership import still_owned
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import write_parquet
from instructue_spark.sources import ROSTER_NAME, STATUSES

FILE, SAME_ID = 3, 4
"""Kinds of rows beside those of a packer: a file that was written, two texts with one id."""

TASK_ROWS = pa.schema(
    [
        pa.field("kind", pa.int32(), nullable=False),
        pa.field("moment", pa.int32(), nullable=False),
        pa.field("src", pa.int32()),
        pa.field("status", pa.int32()),
        pa.field("t", pa.int64()),
        pa.field("id", pa.int64()),
        pa.field("user_id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("numbers", pa.list_(pa.int64())),
    ]
)
"""What tasks hand on: texts and refused rows as in `packer.PACKED_ROWS`, and files: the position of their table in
`src`, their name in `text`, in `numbers` their rows and, of histories, their tokens and the rows of each slot."""

_HELD_BYTES = 128 << 20
_QUARANTINE_ROWS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractFiles:
    """The folders of M extracts, one for each `as_of`.

    Attributes:
        root: The output.
        extract_ids: M names.
        tokens: M tokens of the leases; nobody writes into a folder that somebody else has taken.
    """

    root: str
    extract_ids: tuple[str, ...]
    tokens: tuple[str, ...]

    tables = ("history", "phrasebook", "quarantine")


class _Writer:
    """Names and writes the files of a task."""

    def __init__(self, files: ExtractFiles) -> None:
        context = TaskContext.get()
        assert context is not None
        self._files, self._store = files, OutputStore(files.root)
        self._name, self._number = f"part-{context.partitionId():05d}-{context.taskAttemptId()}", 0

    def write(self, content: pa.Table, moment: int, table: str, folder: str, numbers: list[int]) -> pa.Table:
        """Writes a file and returns the row that tells of it."""
        files = self._files
        place = ("extracts", files.extract_ids[moment])
        if not still_owned(self._store, files.tokens[moment], *place):
            raise RunConflictError(
                f"{self._store.url(*place)} was taken over by another process", "leave it to that one"
            )
        self._number += 1
        name = f"{folder}{self._name}-{self._number}.parquet"
        write_parquet(self._store, content, *place, table, *name.split("/"), repeats=True)
        return task_rows(FILE, 1, moment=[moment], src=[files.tables.index(table)], text=[name], numbers=[numbers])


class HistoryFiles:
    """Writes packed histories, each bucket's sorted by user.

    What is held until a bucket is complete is bounded: a bucket larger than that has several files.

    Args:
        files: Where to.
        layout: The project.
    """

    def __init__(self, files: ExtractFiles, layout: PackLayout) -> None:
        self._writer, self._layout = _Writer(files), layout
        self._held: dict[tuple[int, int], list[pa.Table]] = {}
        self._bytes = 0

    def write(self, packed: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Writes users; yields, as `TASK_ROWS`, the files and all else.

        Args:
            packed: `packer.PACKED_ROWS`, every table of one kind and `as_of`, users bucket by bucket.
        """
        for table in packed:
            kind = table.column("kind")[0].as_py()
            if kind != USER:
                yield task_rows(kind, len(table), **{name: table.column(name) for name in TASK_ROWS.names[1:8]})
                continue
            moment = table.column("moment")[0].as_py()
            bucket = table.column("bucket").to_numpy()
            edges = np.flatnonzero(np.diff(bucket, prepend=-1, append=-1))
            for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                part = table.slice(first, end - first)
                self._held.setdefault((moment, int(bucket[first])), []).append(part)
                self._bytes += part.nbytes
            full = self._bytes > _HELD_BYTES
            yield from self._flush([one for one in self._held if full or (one[0] == moment and one[1] < bucket[-1])])
        yield from self._flush(list(self._held))

    def _flush(self, which: list[tuple[int, int]]) -> Iterator[pa.Table]:
        for moment, bucket in which:
            table = pa.concat_tables(self._held.pop((moment, bucket))).sort_by("user_id")
            self._bytes -= table.nbytes
            as_of = pa.repeat(pa.scalar(self._layout.as_of_us[moment], pa.int64()), len(table)).cast(schema.TIMESTAMP)
            content = table.append_column("as_of", as_of).select(schema.PACKED_HISTORY.names)
            kept = table.column("kept").combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            tokens = pc.sum(pc.list_value_length(table.column("text_id"))).as_py()
            yield self._writer.write(
                content.cast(schema.PACKED_HISTORY), moment, "history", f"bucket={bucket}/",
                [len(table), tokens, *kept.sum(axis=0, dtype=np.int64).tolist()],
            )  # fmt: skip


class Finisher:
    """Writes phrasebooks, each text once, and quarantine tables.

    Args:
        files: Where to.
        names: The sources.
    """

    def __init__(self, files: ExtractFiles, names: tuple[str, ...]) -> None:
        self._writer, self._moments, self._names = _Writer(files), range(len(files.extract_ids)), names
        self._texts = TASK_ROWS.empty_table().select(["moment", "src", "id", "text"])
        self._refused: list[pa.Table] = []

    def finish(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        """Takes all rows of a text id; yields, as `TASK_ROWS`, the files."""
        for batch in batches:
            table = pa.Table.from_batches([batch])
            kind = table.column("kind")
            yield table.filter(pc.equal(kind, FILE))
            texts = table.filter(pc.equal(kind, TEXT)).select(self._texts.column_names)
            self._texts = pa.concat_tables([self._texts, texts]).group_by(self._texts.column_names).aggregate([])
            self._refused.append(table.filter(pc.equal(kind, REFUSED)))
            if sum(map(len, self._refused)) >= _QUARANTINE_ROWS:
                yield from self._quarantine()
        yield from self._quarantine()
        yield from self._phrasebook()

    def _phrasebook(self) -> Iterator[pa.Table]:
        texts = self._texts
        # Over all sources, because event vectors are found by the id alone.
        if pc.count_distinct(texts.column("id")).as_py() < len(texts.group_by(["src", "text"]).aggregate([])):
            yield task_rows(SAME_ID, 1, moment=[0])
            return
        for moment in self._moments:
            mine = texts.filter(pc.equal(texts.column("moment"), moment))
            if len(mine):
                source = pa.array(self._names).take(mine.column("src").combine_chunks())
                columns = [source, mine.column("id"), mine.column("text")]
                content = pa.table(columns, schema=schema.PHRASEBOOK).sort_by("text_id")
                yield self._writer.write(content, moment, "phrasebook", "", [len(mine)])

    def _quarantine(self) -> Iterator[pa.Table]:
        rows = pa.concat_tables(self._refused) if self._refused else TASK_ROWS.empty_table()
        self._refused = []
        if not len(rows):
            return
        source = pa.array([ROSTER_NAME, *self._names]).take(pc.add(rows.column("src"), 1).combine_chunks())
        reason = pa.array(STATUSES).take(rows.column("status").combine_chunks())
        time = rows.column("t").cast(schema.TIMESTAMP)
        columns = [source, reason, rows.column("user_id"), time, rows.column("text")]
        content = pa.table(columns, schema=schema.QUARANTINE)
        for moment in self._moments:
            yield self._writer.write(content, moment, "quarantine", "", [len(rows)])


def task_rows(kind: int, rows: int, **columns: pa.ChunkedArray | list[object]) -> pa.Table:
    """A table of `TASK_ROWS` with nulls for what is not given."""
    given = {"kind": [kind] * rows, **columns}
    arrays = []
    for one in TASK_ROWS:
        value = given.get(one.name)
        if value is None:
            arrays.append(pa.nulls(rows, one.type))
        else:
            arrays.append(value.cast(one.type) if isinstance(value, pa.ChunkedArray) else pa.array(value, one.type))
    return pa.Table.from_arrays(arrays, schema=TASK_ROWS)

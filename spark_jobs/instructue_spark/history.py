"""Canonical rows to packed histories, the phrasebook and the quarantine table, in one job with one long shuffle.

The shape of the work: rows are shuffled by user and sorted inside a task by one number (`packer.ROWS`), which spills to
disk, and which Spark sorts without looking at the rows. `instructue_feast.history.packer` then walks over them and the
task writes the histories itself, so that they need not travel back. Only texts and refused rows are shuffled once more,
texts by id, to be written once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from instructue_feast.config import EventSourceConfig, InstructueConfig, TabularSourceConfig
from instructue_feast.errors import ConfigError, DataError
from instructue_feast.history import packer
from instructue_feast.history.packer import KEY_BITS, KEY_EVENT_BITS, SLOT_BITS, Packer, PackLayout
from instructue_feast.history.render import text_id
from instructue_feast.template import parse_template
from instructue_spark.extract_files import FILE, TASK_ROWS, ExtractFiles, Finisher, HistoryFiles
from instructue_spark.io import emit, spark_schema
from instructue_spark.sources import FIRST_QUARANTINED, QUARANTINE_ROW_CHARS
from instructue_spark.windows import Windows

_OUTSIDE = (1, 2)  # at or after as_of, before the window
_MAX_BYTES = "spark.sql.execution.arrow.maxBytesPerBatch"
_BATCH_BYTES = 256 << 20
TASKS_PER_CORE = 8
"""A task sorts what it gets in memory when it is small enough."""


@dataclass(slots=True)
class Totals:
    """What the job wrote for one `as_of`: users, tokens, distinct texts; by `src` how many rows count."""

    users: int = 0
    tokens: int = 0
    texts: int = 0
    kept: Counter[int] = field(default_factory=Counter)
    files: dict[str, set[str]] = field(default_factory=dict)
    """Names, by table, of the files that count; a task that failed or ran twice may have left others."""


def write(rows: DataFrame, config: InstructueConfig, windows: Windows, files: ExtractFiles) -> list[Totals]:
    """Packs canonical rows and writes histories, phrasebooks and quarantine tables.

    Args:
        rows: `sources.canonical_events` and `canonical_snapshots` of all sources.
        config: The project.
        windows: The `as_of`s.
        files: Where to.

    Returns:
        One for each `as_of`.

    Raises:
        ConfigError: More sources than fit.
        DataError: Two different texts have the same 64-bit id.
        StorageError: A file cannot be written.
    """
    session = rows.sparkSession
    texts = int(session.conf.get("spark.sql.shuffle.partitions") or 200)
    packed = _placed(rows, config).mapInArrow(
        _packing(_layout(config, windows), text_id, files), spark_schema(TASK_ROWS)
    )
    where = F.when(F.col("kind") == packer.TEXT, F.col("id")).when(F.col("kind") == packer.REFUSED, F.xxhash64("text"))
    made = (
        packed.repartition(texts, F.coalesce(where, F.lit(0)))
        .mapInArrow(_finishing(config.source_names, files), spark_schema(TASK_ROWS))
        .select("kind", "moment", "src", "text", "numbers")
    )
    totals = [Totals() for _ in windows.as_of_us]
    with _batches_bounded_by_rows(session, config):
        rows_of_files = made.collect()
    for kind, moment, src, name, numbers in rows_of_files:
        if kind != FILE:
            raise DataError(
                "two different event texts have the same 64-bit id", "change a word in one of the templates"
            )
        one, table = totals[moment], files.tables[src]
        one.files.setdefault(table, set()).add(name)
        if table == "history":
            one.users, one.tokens = one.users + numbers[0], one.tokens + numbers[1]
            one.kept.update({slot - 1: number for slot, number in enumerate(numbers[2:])})
        elif table == "phrasebook":
            one.texts += numbers[0]
    return totals


def _placed(rows: DataFrame, config: InstructueConfig) -> DataFrame:
    """The rows that matter as `packer.ROWS`, where and in the order they are packed in."""
    session, buckets = rows.sparkSession, config.output.buckets
    if len(config.sources) > packer.MAX_SOURCES:
        raise ConfigError(f"{len(config.sources)} sources", f"declare at most {packer.MAX_SOURCES}")
    wanted = int(session.conf.get("spark.sql.shuffle.partitions") or 200)
    partitions = min(buckets, max(wanted, TASKS_PER_CORE * session.sparkContext.defaultParallelism))
    # Not `status == 0 or status >= 3`: pushed down to the table, it would work out the verdict twice.
    inside = rows.where(~F.col("status").isin(*_OUTSIDE))
    refused = F.col("status") >= FIRST_QUARANTINED
    slot = F.col("src") + 1
    code = F.shiftleft(F.col("status").cast("long"), SLOT_BITS).bitwiseOR(slot)
    narrow = inside.select(
        _key(buckets).alias("key"),
        "user_id",
        F.when(refused, -1 - code).otherwise(F.shiftleft("t", SLOT_BITS).bitwiseOR(slot)).alias("when"),
        F.when(refused, F.col("t")).otherwise(F.col("event_id")).alias("event_id"),
        "text",
    )
    bucket = F.shiftright("key", KEY_BITS - packer.bucket_bits(buckets))
    place = F.pmod(bucket, F.lit(partitions)).cast("int")
    if hasattr(DataFrame, "repartitionById"):  # 4.1: hashing so few numbers would leave some partitions empty
        placed = narrow.repartitionById(partitions, place)
    else:
        placed = narrow.repartition(partitions, place)
    return placed.sortWithinPartitions("key").select(*packer.ROWS.names)


@contextmanager
def _batches_bounded_by_rows(session: SparkSession, config: InstructueConfig) -> Iterator[None]:
    """Takes the bound in bytes off the batches for Python, where the one in rows is enough.

    To keep it Spark adds up the sizes of all buffers after every single row.
    """
    rows = int(session.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") or 0)
    widest = max(_text_bytes(one, config.history.max_text_chars) for one in config.sources.values())
    bounded = 0 < rows <= _BATCH_BYTES // max(widest, 4 * QUARANTINE_ROW_CHARS)  # all columns but the text are narrow
    if not bounded or session.conf.get(_MAX_BYTES, None) is not None:  # an operator has set it
        yield
        return
    session.conf.set(_MAX_BYTES, str(2**31 - 1))
    try:
        yield
    finally:
        session.conf.unset(_MAX_BYTES)


def _text_bytes(source: EventSourceConfig | TabularSourceConfig, max_text_chars: int) -> int:
    """How long the text of a row may be on its way to Python; of a snapshot, its JSON, which escapes what it must."""
    if isinstance(source, EventSourceConfig):
        parts = parse_template(source.text)
        return 4 * sum(len(one) if isinstance(one, str) else max_text_chars for one in parts)
    return 6 * max_text_chars * len(source.categorical) + 32 * sum(map(len, source.numeric_groups.values()))


def _key(buckets: int) -> Column:
    bits = packer.bucket_bits(buckets)
    bucket = F.shiftleft(F.pmod("user_hash", F.lit(buckets)).cast("long"), KEY_BITS - bits)
    user = F.shiftrightunsigned(F.shiftrightunsigned("user_hash", bits + 1), KEY_EVENT_BITS)
    event = F.coalesce(F.col("event_id").bitwiseAND(F.lit((1 << KEY_EVENT_BITS) - 1)), F.lit(0))
    return bucket.bitwiseOR(F.shiftleft(user, KEY_EVENT_BITS)).bitwiseOR(event)


def _packing(
    layout: PackLayout, identify: Callable[[str, str], int], files: ExtractFiles
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in HistoryFiles(files, layout).write(Packer(layout, identify).pack(batches)):
            yield from emit(table, TASK_ROWS)

    return run


def _finishing(
    names: tuple[str, ...], files: ExtractFiles
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in Finisher(files, names).finish(batches):
            yield from emit(table, TASK_ROWS)

    return run


def _layout(config: InstructueConfig, windows: Windows) -> PackLayout:
    sources = list(config.sources.values())
    events = [one if isinstance(one, EventSourceConfig) else None for one in sources]
    return PackLayout(
        names=config.source_names,
        is_event=tuple(one is not None for one in events),
        caps=tuple(one.max_texts if one else 0 for one in events),
        by_frequency=tuple(one is not None and one.rank == "frequency" for one in events),
        numeric_widths=tuple(
            0 if isinstance(one, EventSourceConfig) else sum(map(len, one.numeric_groups.values())) for one in sources
        ),
        as_of_us=windows.as_of_us,
        start_us=windows.start_us,
        buckets=config.output.buckets,
        max_text_chars=config.history.max_text_chars,
    )

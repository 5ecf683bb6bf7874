"""Canonical rows to packed histories, the phrasebook and the quarantine table.

The shape of the work: rows are shuffled once, by user, and sorted inside a task by user, source and event, which spills
to disk. `instructue_feast.history.packer` then walks over them; no user needs more memory than a chunk of rows and the
distinct texts of that user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from instructue_feast.config import EventSourceConfig, InstructueConfig
from instructue_feast.errors import DataError
from instructue_feast.history.packer import PACKED_ROWS, REFUSED, TEXT, USER, Packer, PackLayout
from instructue_feast.history.render import text_id
from instructue_spark.io import emit, spark_schema
from instructue_spark.sources import FIRST_QUARANTINED, IN_WINDOW, STATUSES
from instructue_spark.windows import Windows

_ROWS = ("user_hash", "user_id", "src", "status", "t", "event_id", "text", "numeric", "words")


def pack(rows: DataFrame, config: InstructueConfig, windows: Windows) -> DataFrame:
    """Packs canonical rows.

    Args:
        rows: `sources.canonical_events` and `canonical_snapshots` of all sources.
        config: The project.
        windows: The `as_of`s.

    Returns:
        `packer.PACKED_ROWS`.
    """
    session, buckets = rows.sparkSession, config.output.buckets
    wanted = int(session.conf.get("spark.sql.shuffle.partitions") or 200)
    partitions = min(buckets, max(wanted, 4 * session.sparkContext.defaultParallelism))
    inside = rows.where((F.col("status") == IN_WINDOW) | (F.col("status") >= FIRST_QUARANTINED)).select(*_ROWS)
    place = F.pmod(F.pmod("user_hash", F.lit(buckets)), F.lit(partitions)).cast("int")
    if hasattr(DataFrame, "repartitionById"):  # 4.1: hashing so few numbers would leave some partitions empty
        placed = inside.repartitionById(partitions, place)
    else:
        placed = inside.repartition(partitions, place)
    # The hash first, because the sort compares eight bytes of the first column before it looks at a row.
    ordered = placed.sortWithinPartitions("user_hash", "user_id", "src", "event_id")
    return ordered.mapInArrow(_packing(_layout(config, windows), text_id), spark_schema(PACKED_ROWS))


def _packing(
    layout: PackLayout, identify: Callable[[str, str], int]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in Packer(layout, identify).pack(batches):
            yield from emit(table, PACKED_ROWS)

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
        first_refused=FIRST_QUARANTINED,
    )


def histories(packed: DataFrame, windows: Windows) -> DataFrame:
    """`moment, bucket` and the columns of `schema.PACKED_HISTORY`."""
    moments = F.array(*[F.lit(one) for one in windows.as_of_us])
    return packed.where(F.col("kind") == USER).select(
        "moment", "bucket", "user_id", F.timestamp_micros(F.get(moments, F.col("moment"))).alias("as_of"),
        "source_index", "text_id", "count_bucket", "age_bucket", "num_events", "tabular_numeric",
    )  # fmt: skip


def totals(packed: DataFrame, slots: int) -> dict[int, tuple[int, int, dict[int, int]]]:
    """By `moment`: users, tokens, and by `src` how many rows count."""
    sums = [F.sum(F.get("kept", slot).cast("bigint")) for slot in range(slots)]
    users = packed.where(F.col("kind") == USER)
    rows = users.groupBy("moment").agg(F.count("*"), F.sum(F.size("text_id")), *sums).collect()
    return {int(row[0]): (int(row[1]), int(row[2]), {i - 1: int(row[3 + i]) for i in range(slots)}) for row in rows}


def phrasebook(packed: DataFrame, config: InstructueConfig) -> DataFrame:
    """`moment` and the columns of `schema.PHRASEBOOK`, each text once per `moment`."""
    names = F.array(*[F.lit(name) for name in config.source_names])
    return (
        packed.where(F.col("kind") == TEXT)
        .select("moment", "src", F.col("id").alias("text_id"), "text")
        .distinct()
        .select("moment", F.get(names, F.col("src")).alias("source"), "text_id", "text")
    )


def check_ids(book: DataFrame) -> dict[int, int]:
    """Texts by `moment`.

    Raises:
        DataError: Two different texts have the same 64-bit id.
    """
    # Over all sources, because event vectors are found by the id alone.
    ids, texts = book.agg(F.count_distinct("text_id"), F.count_distinct("source", "text")).collect()[0]
    if ids != texts:
        raise DataError("two different event texts have the same 64-bit id", "change a word in one of the templates")
    return {int(moment): int(number) for moment, number in book.groupBy("moment").count().collect()}


def quarantine(packed: DataFrame, names: tuple[str, ...]) -> DataFrame:
    """The quarantine table (`schema.QUARANTINE`); roster rows have the source `(roster)`."""
    return packed.where(F.col("kind") == REFUSED).select(
        F.get(F.array(*[F.lit(one) for one in ("(roster)", *names)]), F.col("src") + 1).alias("source"),
        F.get(F.array(*[F.lit(one) for one in STATUSES]), F.col("status")).alias("reason"),
        "user_id",
        F.timestamp_micros("t").alias("event_time"),
        F.col("text").alias("row"),
    )

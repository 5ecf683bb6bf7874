"""Canonical rows to packed histories and the phrasebook.

The shape of the work: events are shuffled once, by bucket, without their texts; duplicates, counts and caps are
aggregations inside a bucket that spill to disk. Raw events of one user are never collected into a list, so a user with
a million events needs no more memory than any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import reduce

from pyspark.sql import Column, DataFrame, Window, WindowSpec
from pyspark.sql import functions as F

from instructue_feast.config import EventSourceConfig, InstructueConfig
from instructue_feast.errors import DataError
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES
from instructue_spark import render
from instructue_spark.io import spark_schema
from instructue_spark.sources import IN_WINDOW, to_micros

_DAY_US = 86_400_000_000
_TOKENS = "array<struct<src:int,place:bigint,text_id:bigint,count_bucket:int,age_bucket:int>>"
_BROADCAST_ROWS = 1_000_000
_USER = ("bucket", "user_id")


@dataclass(frozen=True, slots=True)
class Texts:
    """The distinct texts of an extract.

    Attributes:
        phrasebook: `source, text_id, text`, one row per text.
        num_texts: Rows of the phrasebook.
        changed: `raw_id, text_id` of the rendered texts that `normalise` changed; `None` when there is none.
    """

    phrasebook: DataFrame
    num_texts: int
    changed: DataFrame | None


def select_snapshots(snapshots: DataFrame) -> DataFrame:
    """One row per user and snapshot source: the latest; at the same time the one with the smallest row hash."""
    newest_first = F.struct("t", F.bitwise_not("row_hash"))
    return (
        snapshots.where(F.col("status") == IN_WINDOW)
        .groupBy(*_USER, "src")
        .agg(F.max_by(F.struct("numeric", "texts", "present"), newest_first).alias("best"))
        .select(*_USER, "src", "best.*")
    )


def snapshot_tokens(selected: DataFrame, config: InstructueConfig) -> DataFrame:
    """The categorical values of selected snapshots: `bucket, user_id, src, place, text, raw_id`."""
    names = F.array(*[F.lit(name) for name in config.source_names])
    return (
        selected.where(F.size("texts") > 0)
        .select(*_USER, "src", F.posexplode("texts").alias("place", "text"))
        .where(F.col("text").isNotNull())
        .withColumn("raw_id", render.raw_text_id(F.get(names, F.col("src")), F.col("text")))
    )


def rendered_texts(events: DataFrame | None, tokens: DataFrame | None, config: InstructueConfig) -> DataFrame:
    """Every distinct rendered text, normalised once: `raw_id, source, text_id, text` (`render.NORMALISED_TEXTS`).

    Args:
        events: Canonical events.
        tokens: `snapshot_tokens`.
        config: The project.
    """
    columns = ("src", "raw_id", "text")
    parts = [] if events is None else [events.where(F.col("status") == IN_WINDOW).select(*columns)]
    parts += [] if tokens is None else [tokens.select(*columns)]
    raw = reduce(DataFrame.union, parts).distinct()
    return raw.mapInArrow(render.normaliser(config.source_names), spark_schema(render.NORMALISED_TEXTS))


def build_texts(normalised: DataFrame) -> Texts:
    """The phrasebook, and which rendered texts have another id in it.

    Args:
        normalised: `rendered_texts`, cached, because it is read three times.

    Raises:
        DataError: Two different texts have the same 64-bit id.
    """
    row = normalised.agg(
        F.count("*"),
        F.count_distinct("raw_id"),
        F.count_distinct("text_id"),
        F.count_distinct("source", "text"),
        F.count_if(F.col("raw_id") != F.col("text_id")),
    ).collect()[0]
    num_rendered, num_raw_ids, num_ids, num_texts, num_changed = (int(value) for value in row)
    # Over all sources, because event vectors are found by the id alone.
    if num_raw_ids != num_rendered or num_ids != num_texts:
        raise DataError("two different event texts have the same 64-bit id", "change a word in one of the templates")
    changed = normalised.where("raw_id != text_id").select("raw_id", "text_id")
    if num_changed <= _BROADCAST_ROWS:
        changed = F.broadcast(changed)
    book = normalised.select("source", "text_id", "text").distinct()
    return Texts(book, num_texts, changed if num_changed else None)


def with_text_ids(frame: DataFrame, texts: Texts) -> DataFrame:
    """Adds `text_id`: `raw_id`, unless normalising changed the text."""
    if texts.changed is None:
        return frame.withColumnRenamed("raw_id", "text_id")
    joined = frame.join(texts.changed, "raw_id", "left")
    return joined.withColumn("text_id", F.coalesce("text_id", "raw_id")).drop("raw_id")


def pack_events(events: DataFrame, texts: Texts, config: InstructueConfig, as_of: datetime) -> DataFrame:
    """Deduplicates, counts and caps events.

    Args:
        events: Canonical events.
        texts: The distinct texts.
        config: The project.
        as_of: Exclusive upper bound of event times.

    Returns:
        One row per user: `bucket, user_id, events` (the tokens) and per event source `n<src>`, events before capping.
    """
    session = events.sparkSession
    partitions = min(config.output.buckets, int(session.conf.get("spark.sql.shuffle.partitions") or 200))
    window = events.where(F.col("status") == IN_WINDOW).select(*_USER, "src", "event_id", "t", "raw_id")
    # The only shuffle of events. Every aggregation below groups by the bucket first, so Spark adds no other.
    placed = with_text_ids(window, texts).repartition(partitions, "bucket")
    # The greatest time wins, then the smallest text id: bitwise-not turns its order round without overflow.
    newest = F.max(F.struct("t", F.bitwise_not("text_id").alias("inverse"))).alias("newest")
    unique = placed.groupBy(*_USER, "src", "event_id").agg(newest)
    seen = (
        unique.select(*_USER, "src", F.col("newest.t").alias("t"), F.bitwise_not("newest.inverse").alias("text_id"))
        .groupBy(*_USER, "src", "text_id")
        .agg(F.count("*").alias("n"), F.max("t").alias("t"))
    )
    ranked = seen.withColumn("rank", F.row_number().over(_ranking(config))).withColumn(
        "cap", _by_source(config, "max_texts")
    )
    token = F.struct(
        "src",
        F.col("t").alias("place"),
        "text_id",
        render.bucketize(F.col("n"), COUNT_EDGES).alias("count_bucket"),
        _age_bucket(as_of).alias("age_bucket"),
    )
    totals = [
        F.sum(F.when(F.col("src") == index, F.col("n")).otherwise(F.lit(0))).alias(f"n{index}")
        for index in _event_indexes(config)
    ]
    kept = F.collect_list(F.when(F.col("rank") <= F.col("cap"), token)).cast(_TOKENS)
    return ranked.groupBy(*_USER).agg(kept.alias("events"), *totals)


def pack_snapshots(selected: DataFrame, tokens: DataFrame, texts: Texts, config: InstructueConfig) -> DataFrame:
    """Gathers the snapshots of each user, roster included.

    Returns:
        One row per user: `bucket, user_id, words` (the tokens), and per tabular source `n<src>` and `numeric<src>`.
    """
    zero = F.lit(0)
    token = F.struct("src", F.col("place").cast("bigint"), "text_id", zero.alias("c"), zero.alias("a"))
    words = with_text_ids(tokens, texts).select(*_USER, token.alias("token"))
    rows = selected.select(*_USER, "src", "numeric", "present").unionByName(words, allowMissingColumns=True)
    columns = [F.collect_list("token").cast(_TOKENS).alias("words")]
    for index in _tabular_indexes(config):
        mine = F.col("src") == index
        columns.append(F.max(F.when(mine, F.col("present"))).alias(f"n{index}"))
        columns.append(F.max(F.when(mine, F.col("numeric"))).alias(f"numeric{index}"))
    return rows.groupBy(*_USER).agg(*columns)


def packed_history(
    events: DataFrame | None, snapshots: DataFrame | None, config: InstructueConfig, as_of: datetime
) -> DataFrame:
    """Joins both halves of each user.

    Args:
        events: `pack_events`, `None` without event sources.
        snapshots: `pack_snapshots`, `None` without tabular sources and roster.
        config: The project.
        as_of: The `as_of` of every row.

    Returns:
        `bucket` and the columns of `schema.PACKED_HISTORY`.
    """
    if events is not None and snapshots is not None:
        users = events.join(snapshots, list(_USER), "full_outer")
    else:
        users = events if events is not None else snapshots  # type: ignore[assignment]
    halves = [F.coalesce(F.col(one), F.array().cast(_TOKENS)) for one in ("events", "words") if one in users.columns]
    users = users.withColumn("tokens", F.array_sort(F.concat(*halves)))
    num_events = [
        F.coalesce(F.col(f"n{index}"), F.lit(0)).cast("int") if f"n{index}" in users.columns else F.lit(0)
        for index in range(len(config.source_names))
    ]
    numeric = [F.array().cast("array<float>")]
    for index, columns in zip(_tabular_indexes(config), _numeric_widths(config), strict=True):
        missing = F.array_repeat(F.lit(float("nan")).cast("float"), columns)
        numeric.append(F.coalesce(F.col(f"numeric{index}"), missing))
    return users.select(
        "bucket",
        "user_id",
        F.timestamp_micros(F.lit(to_micros(as_of))).alias("as_of"),
        F.col("tokens")["src"].alias("source_index"),
        F.col("tokens")["text_id"].alias("text_id"),
        F.col("tokens")["count_bucket"].alias("count_bucket"),
        F.col("tokens")["age_bucket"].alias("age_bucket"),
        F.array(*num_events).alias("num_events"),
        F.concat(*numeric).alias("tabular_numeric"),
    )


def _ranking(config: InstructueConfig) -> WindowSpec:
    """Orders the texts of a user and source by how much they deserve to be kept."""
    frequent = [index for index in _event_indexes(config) if _source(config, index).rank == "frequency"]
    by_count = F.col("src").isin(frequent) if frequent else F.lit(False)
    first = F.when(by_count, F.col("n")).otherwise(F.col("t"))
    second = F.when(by_count, F.col("t")).otherwise(F.col("n"))
    return Window.partitionBy(*_USER, "src").orderBy(first.desc(), second.desc(), F.col("text_id").asc())


def _age_bucket(as_of: datetime) -> Column:
    """Compares microseconds instead of dividing, so that a whole number of days is exact."""
    age = F.lit(to_micros(as_of)) - F.col("t")
    return render.bucketize(age, tuple(edge * _DAY_US for edge in AGE_EDGES_DAYS))


def _by_source(config: InstructueConfig, setting: str) -> Column:
    result = F.lit(None).cast("int")
    for index in _event_indexes(config):
        result = F.when(F.col("src") == index, F.lit(getattr(_source(config, index), setting))).otherwise(result)
    return result


def _source(config: InstructueConfig, index: int) -> EventSourceConfig:
    return config.event_sources[config.source_names[index]]


def _event_indexes(config: InstructueConfig) -> list[int]:
    return [index for index, name in enumerate(config.source_names) if name in config.event_sources]


def _tabular_indexes(config: InstructueConfig) -> list[int]:
    return [index for index, name in enumerate(config.source_names) if name in config.tabular_sources]


def _numeric_widths(config: InstructueConfig) -> list[int]:
    return [
        sum(len(columns) for columns in source.numeric_groups.values()) for source in config.tabular_sources.values()
    ]

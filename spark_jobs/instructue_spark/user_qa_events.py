"""Raw tables as the questions see them: user, time, and the columns the question families name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BooleanType, NumericType

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, SchemaError
from instructue_feast.question_specs import AttributeSpec, FavouriteSpec, OccursSpec, QuestionSpec
from instructue_feast.user_qa.questions import PARTS_OF_DAY, WEEKDAYS, WEEKEND
from instructue_spark import render, sources
from instructue_spark.render import column
from instructue_spark.sources import FIRST_QUARANTINED, STATUSES, RawTable
from instructue_spark.windows import to_micros

DAY_US = 86_400_000_000
MAX_SUBJECT_CHARS = 120


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of `Events.frame` a family reads; `None` for what it does not need.

    Attributes:
        subject: Lower-case text.
        value: Finite number or null.
        key: Hash of the value whose distinct ones count, null for null.
    """

    subject: str | None = None
    value: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Events:
    """The usable events of a source before the cut.

    Attributes:
        frame: `user_id, t, event_id` and the named columns, persisted; exact copies removed.
        columns: What each family reads, by its id.
        copies: Whether an event id stands there more than once, with different times or values.
        first_us: Time of the first event; `None` without events.
        last_us: Time of the last event.
        skipped: Rows that cannot be used, by reason.
    """

    frame: DataFrame
    columns: dict[str, Columns]
    copies: bool
    first_us: int | None
    last_us: int | None
    skipped: dict[str, int]


class _Wanted:
    """The columns that the families of a source need, each once."""

    def __init__(self) -> None:
        self._made: dict[str, Column] = {}

    def add(self, purpose: str, value: Column) -> str:
        """Notes a column; returns its name in the frame, which is harmless whatever the raw column is called."""
        self._made.setdefault(purpose, value)
        return f"c{list(self._made).index(purpose)}"

    def columns(self) -> list[Column]:
        """All of them, named."""
        return [value.alias(f"c{number}") for number, value in enumerate(self._made.values())]


def read_events(
    spark: SparkSession, name: str, config: InstructueConfig, specs: Sequence[QuestionSpec], cut: datetime
) -> Events:
    """Reads one event source for all families that ask about it.

    Rows that the extract would quarantine are skipped and counted. Rows at or after `cut` are not looked at.

    Raises:
        DataError: The table is missing or unreadable; as `SchemaError`: a missing column or one of a wrong type.
        ConfigError: A condition is not a boolean expression.
    """
    source = config.event_sources[name]
    raw, columns, wanted = _open(spark, name, config, specs)
    user = sources._user_column(raw, source.user_id)
    time = sources._time_column(raw, source.time, source.time_zone)
    broken = render.broken_value(source.text, raw.types)
    status = sources._quarantine_status(user, time, broken).otherwise(F.lit(0))
    judged = sources._judged(raw, config, status, user, time)
    # A broken clock has no time to compare with the cut; such rows are counted whenever they were written.
    judged = judged.where(F.col(sources._TIME).isNull() | (F.col(sources._TIME) < F.lit(to_micros(cut))))
    rows = judged.select(
        F.col(sources._STATUS).alias("status"),
        F.col(sources._USER).alias("user_id"),
        F.col(sources._TIME).alias("t"),
        sources._event_id(raw, source).alias("event_id"),
        *wanted.columns(),
    )
    counts = {int(code): int(number) for code, number in rows.groupBy("status").count().collect()}
    frame = rows.where("status = 0").drop("status").persist(StorageLevel.MEMORY_AND_DISK)
    number, first, last = frame.agg(F.count("*"), F.min("t"), F.max("t")).collect()[0]
    unique = frame.select("user_id", "event_id").distinct().count()
    if unique < number:  # most lakes hold every event once, and need no shuffle of whole rows
        every, frame = frame, frame.distinct().persist(StorageLevel.MEMORY_AND_DISK)
        number = frame.count()
        every.unpersist()
    return Events(
        frame=frame,
        columns=columns,
        copies=unique < number,
        first_us=first,
        last_us=last,
        skipped={STATUSES[code]: counts[code] for code in sorted(counts) if code >= FIRST_QUARANTINED},
    )


def check_columns(spark: SparkSession, config: InstructueConfig, specs: Sequence[QuestionSpec]) -> None:
    """Opens every table that a family asks about, without reading a row, so that a wrong name costs no waiting.

    Raises:
        DataError: A table is missing or unreadable; as `SchemaError`: a missing column or one of a wrong type.
        ConfigError: A condition is not a boolean expression.
    """
    for name in config.event_sources:
        mine = [spec for spec in specs if spec.source == name]
        if mine:
            _open(spark, name, config, mine)
    for spec in specs:
        if isinstance(spec, AttributeSpec):
            read_snapshots(spark, config, spec, sources.LATEST)


def _open(
    spark: SparkSession, name: str, config: InstructueConfig, specs: Sequence[QuestionSpec]
) -> tuple[RawTable, dict[str, Columns], _Wanted]:
    source = config.event_sources[name]
    raw = sources.open_source(spark, f"source {name}", source)
    raw.require(source.columns)
    wanted = _Wanted()
    return raw, {spec.id: _columns(spec, raw, source.time_zone, wanted) for spec in specs}, wanted


def in_windows(events: Events, spans: Sequence[tuple[int, int, int]], names: Columns) -> DataFrame:
    """The events of some windows.

    Args:
        events: The source.
        spans: `(i, start, end)` in microseconds; `i` numbers the `as_of`s.
        names: What to keep of the events.

    Returns:
        `user_id, i` and `subject, value, key` as far as named, one row per event and window it lies in. Of an event
        that is there more than once, the latest copy inside the window counts.
    """
    named = ("subject", "value", "key")
    kept = {one: str(getattr(names, one)) for one in named if getattr(names, one) is not None}
    t = F.col("t")
    start, end = min(span[1] for span in spans), max(span[2] for span in spans)
    near = events.frame.where((t >= F.lit(start)) & (t < F.lit(end)))
    rows = near.select("user_id", "t", "event_id", *[F.col(at).alias(one) for one, at in kept.items()])
    rows = _spread(rows, spans)
    if events.copies:
        last = F.max(F.struct("t", *kept)).alias("last")
        rows = rows.groupBy("user_id", "i", "event_id").agg(last).select("user_id", "i", "last.*")
    return rows.select("user_id", "i", *kept)


def read_snapshots(spark: SparkSession, config: InstructueConfig, spec: AttributeSpec, cut: datetime) -> DataFrame:
    """A column of a tabular source.

    Returns:
        `user_id, t, row_hash, value` of the usable rows before `cut`; blank values are null.
    """
    source = config.tabular_sources[spec.source]
    raw = sources.open_source(spark, f"source {spec.source}", source)
    raw.require(source.columns)
    _require(spec, raw, spec.column)
    user = sources._user_column(raw, source.user_id)
    start = F.lit(to_micros(sources.EARLIEST))
    time = sources._time_column(raw, source.time, source.time_zone) if source.time else start
    status = sources._quarantine_status(user, time, F.lit(False)).otherwise(F.lit(0))
    text = render._as_text(spec.column, raw.types[spec.column], MAX_SUBJECT_CHARS, f"question family {spec.id}")
    text = F.btrim(F.make_valid_utf8(text), F.lit(sources.BLANK))
    judged = sources._judged(raw, config, status, user, time).where(F.col(sources._STATUS) == 0)
    return judged.where(F.col(sources._TIME) < F.lit(to_micros(cut))).select(
        F.col(sources._USER).alias("user_id"),
        F.col(sources._TIME).alias("t"),
        sources._row_hash(raw, source.columns).alias("row_hash"),
        F.when(text != "", text).alias("value"),
    )


def latest(snapshots: DataFrame, spans: Sequence[tuple[int, int, int]]) -> DataFrame:
    """`user_id, i, value`: what the last row of each window says; the same choice as `history.select_snapshots`."""
    newest_first = F.struct("t", F.bitwise_not("row_hash"))
    rows = _spread(snapshots, spans)
    return rows.groupBy("user_id", "i").agg(F.max_by("value", newest_first).alias("value"))


def _spread(rows: DataFrame, spans: Sequence[tuple[int, int, int]]) -> DataFrame:
    """Every row once per window that its `t` lies in, with the window's `i`."""
    windows = rows.sparkSession.createDataFrame(list(spans), "i int, start bigint, end bigint")
    inside = (F.col("t") >= F.col("start")) & (F.col("t") < F.col("end"))
    return rows.join(F.broadcast(windows), inside).drop("start", "end")


def _columns(spec: QuestionSpec, raw: RawTable, zone: str, wanted: _Wanted) -> Columns:
    """Notes what a family needs in `wanted`, by a name that families share."""
    subject = value = key = None
    if isinstance(spec, OccursSpec | FavouriteSpec) and spec.subject is not None:
        subject = wanted.add(f"subject {spec.subject}", _subject(spec, raw))
    if isinstance(spec, FavouriteSpec) and spec.clock is not None:
        subject = wanted.add(f"clock {spec.clock} {spec.zone}", _clock(spec.clock, spec.zone or zone))
    measure = getattr(spec, "measure", "count")
    if measure in ("sum", "mean", "sum_per"):
        value = wanted.add(f"value {spec.column}", _value(spec, raw))  # type: ignore[union-attr]
    if measure == "share":
        value = wanted.add(f"condition {spec.condition}", _condition(spec, raw))  # type: ignore[union-attr]
    if measure in ("distinct", "sum_per"):
        name = spec.per if measure == "sum_per" else spec.column  # type: ignore[union-attr]
        key = wanted.add(f"key {name}", _key(spec, raw, str(name)))
    return Columns(subject, value, key)


def _require(spec: QuestionSpec, raw: RawTable, name: str) -> None:
    try:
        raw.require((name,))
    except SchemaError as error:
        raise SchemaError(f"question family {spec.id}: {error.message}", error.hint) from None


def _subject(spec: OccursSpec | FavouriteSpec, raw: RawTable) -> Column:
    assert spec.subject is not None
    _require(spec, raw, spec.subject)
    text = render._as_text(spec.subject, raw.types[spec.subject], MAX_SUBJECT_CHARS, f"question family {spec.id}")
    text = F.lower(F.btrim(F.make_valid_utf8(text), F.lit(sources.BLANK)))
    return F.when(text != "", text)


def _value(spec: QuestionSpec, raw: RawTable) -> Column:
    name = str(getattr(spec, "column", ""))
    _require(spec, raw, name)
    if not isinstance(raw.types[name], NumericType):
        raise SchemaError(
            f"question family {spec.id}: column {name} has type {raw.types[name].simpleString()}, not a number",
            "measure `count` or `distinct`, or convert it to a number",
        )
    value = column(name).cast("double")
    return F.when(render.is_finite(value), value)


def _key(spec: QuestionSpec, raw: RawTable, name: str) -> Column:
    _require(spec, raw, name)
    return F.when(column(name).isNotNull(), sources._row_hash(raw, (name,)))


def _condition(spec: QuestionSpec, raw: RawTable) -> Column:
    text = str(getattr(spec, "condition", ""))
    try:
        kind = raw.frame.select(F.expr(text).alias("x")).schema["x"].dataType
    except PySparkException as error:
        name = error.getCondition() or type(error).__name__
        message = f"question family {spec.id}: condition {text!r} is not usable: {name}"
        raise ConfigError(message, f"write a boolean SQL expression over the columns {sorted(raw.types)}") from None
    if not isinstance(kind, BooleanType):
        message = f"question family {spec.id}: condition {text!r} is {kind.simpleString()}, not boolean"
        raise ConfigError(message, "compare the value with something")
    return F.coalesce(F.expr(text), F.lit(False)).cast("double")


def _clock(clock: str, zone: str) -> Column:
    """Made of the judged rows' time, which is known by the time this is evaluated."""
    local = F.timestamp_micros(sources._TIME)
    local = local if zone == "UTC" else F.from_utc_timestamp(local, zone)
    if clock == "part_of_day":
        return F.get(F.array(*[F.lit(one) for one in PARTS_OF_DAY]), F.floor(F.hour(local) / 6).cast("int"))
    if clock == "weekday":
        return F.get(F.array(*[F.lit(one) for one in WEEKDAYS]), F.weekday(local))
    return F.when(F.weekday(local) >= 5, F.lit(WEEKEND[1])).otherwise(F.lit(WEEKEND[0]))

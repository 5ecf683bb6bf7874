"""Raw tables to canonical rows: user, time, text, and a verdict on every row, as native column expressions.

*Events* (one row per event) and *snapshots* (one row per row of a tabular source, and of the roster, which is a
snapshot without columns) come out of here in one shape:

    src, status, cell, user_hash, user_id, t, event_id, text

`t` is in microseconds, `cell` numbers the piece of time it lies in (`windows`). Of a snapshot, `event_id` is the hash
of its row and `text` JSON (`packer.SNAPSHOT`): its numbers, null for what is missing or infinite, and its rendered
categorical values; null for the roster. Every row has a `status`. One that is outside all windows carries nulls
elsewhere, a quarantined one its user, its time, and in `text` the JSON of the columns the source names.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from functools import reduce
from zoneinfo import ZoneInfo

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    DateType,
    DoubleType,
    FloatType,
    MapType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from instructue_feast.config import EventSourceConfig, InstructueConfig, TabularSourceConfig, UsersConfig
from instructue_feast.errors import ConfigError, SchemaError, did_you_mean
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import HASH_CHARS, Tombstones
from instructue_spark import render
from instructue_spark.io import read_table
from instructue_spark.render import column
from instructue_spark.windows import ROSTER, Windows, to_micros

STATUSES = (
    "in_window", "at_or_after_as_of", "before_window", "null_user", "null_time", "impossible_time", "broken_value",
)  # fmt: skip
"""What can become of a row, by code; those from `FIRST_QUARANTINED` on go to the quarantine table."""

ROSTER_NAME = "(roster)"
"""What the roster is called among sources; no source can have that name."""

IN_WINDOW = 0
FIRST_QUARANTINED = STATUSES.index("null_user")
EARLIEST = datetime(1971, 1, 1, tzinfo=UTC)
"""Times before this are impossible: zero and near-zero epochs, the usual broken clocks, fall into 1970."""
LATEST = datetime(2201, 1, 1, tzinfo=UTC)
"""Times from here on are impossible."""

# What a verdict is called beside the raw columns: no table of a user has such names.
_STATUS, _USER, _TIME = "__instructue_status", "__instructue_user", "__instructue_time"
_HASH = "__instructue_hash"

BLANK = " \t\n\r\x0b\x0c"
_QUARANTINE_VALUE_CHARS = 256
QUARANTINE_ROW_CHARS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class RawTable:
    """A raw table after its `where` conditions.

    Attributes:
        frame: Its rows.
        types: Type of each column.
        where: What to call it in a message.
    """

    frame: DataFrame
    types: dict[str, DataType]
    where: str

    def require(self, columns: tuple[str, ...]) -> None:
        """Raises a `SchemaError` unless the columns are there, by their exact names."""
        for name in columns:
            if name not in self.types:
                raise SchemaError(f"{self.where}: column {name!r} not found", did_you_mean(name, self.types))


def open_source(
    spark: SparkSession, where: str, source: EventSourceConfig | TabularSourceConfig | UsersConfig
) -> RawTable:
    """Opens a raw table and applies its conditions.

    Raises:
        DataError: The table is missing or unreadable.
        ConfigError: A condition is not a boolean expression over the table's columns.
    """
    frame = read_table(spark, source.table, where)
    types = {one.name: one.dataType for one in frame.schema}
    for condition in source.where:
        try:
            frame = frame.where(F.expr(condition))
        except PySparkException as error:
            name = error.getCondition() or type(error).__name__
            raise ConfigError(
                f"{where}: condition {condition!r} is not usable: {name}",
                f"write a boolean SQL expression over the columns {sorted(types)}",
            ) from None
    return RawTable(frame, types, where)


def canonical_events(spark: SparkSession, name: str, config: InstructueConfig, windows: Windows) -> DataFrame:
    """The rows of an event source.

    Args:
        spark: The session.
        name: Name of the source.
        config: The project.
        windows: When events count.

    Raises:
        DataError: Missing or unreadable table; as `SchemaError`: a missing column or one of a wrong type.
        ConfigError: A wrong condition or time zone.
    """
    source = config.event_sources[name]
    raw = open_source(spark, f"source {name}", source)
    raw.require(source.columns)
    user, time = _user_column(raw, source.user_id), _time_column(raw, source.time, source.time_zone)
    src = config.source_names.index(name)
    status = (
        _quarantine_status(user, time, render.broken_value(source.text, raw.types))
        .when(time >= F.lit(windows.end_us), F.lit(1))
        .when(time < F.lit(windows.first_us(src)), F.lit(2))
        .otherwise(F.lit(IN_WINDOW))
    )
    text = render.template_column(source.text, raw.types, config.history.max_text_chars, raw.where)
    return _canonical(
        _judged(raw, config, status, user, time),
        src,
        windows,
        event_id=_event_id(raw, source),
        text=text,
        row=_row_json(raw, source.columns),
    )


def canonical_snapshots(spark: SparkSession, name: str, config: InstructueConfig, windows: Windows) -> DataFrame:
    """The rows of a tabular source.

    Raises:
        DataError: Missing or unreadable table; as `SchemaError`: a missing column or one of a wrong type.
        ConfigError: A wrong condition or time zone.
    """
    source = config.tabular_sources[name]
    raw = open_source(spark, f"source {name}", source)
    raw.require(source.columns)
    user = _user_column(raw, source.user_id)
    time = _time_column(raw, source.time, source.time_zone) if source.time else F.lit(to_micros(EARLIEST))
    status = (
        _quarantine_status(user, time, F.lit(False))
        .when(F.lit(source.time is not None) & (time >= F.lit(windows.end_us)), F.lit(1))
        .otherwise(F.lit(IN_WINDOW))
    )
    numbers = [_numeric(raw, one) for columns in source.numeric_groups.values() for one in columns]
    words = [
        render.categorical_column(one, raw.types[one], config.history.max_text_chars, raw.where)
        for one in source.categorical
    ]
    # A text and not two arrays: a column that is null in all events still costs as much as a number on its way.
    content = F.to_json(
        F.struct(
            F.array(*numbers).cast("array<float>").alias("numeric"),
            F.array(*words).cast("array<string>").alias("words"),
        )
    )
    judged = _judged(raw, config, status, user, time)
    return _snapshots(raw, judged, config.source_names.index(name), windows, source.columns, content)


def canonical_roster(spark: SparkSession, users: UsersConfig, config: InstructueConfig, windows: Windows) -> DataFrame:
    """The roster, as snapshots without content and `ROSTER` as `src`."""
    raw = open_source(spark, "users", users)
    raw.require((users.user_id,))
    user, time = _user_column(raw, users.user_id), F.lit(to_micros(EARLIEST))
    status = _quarantine_status(user, time, F.lit(False)).otherwise(F.lit(IN_WINDOW))
    return _snapshots(
        raw, _judged(raw, config, status, user, time), ROSTER, windows, (users.user_id,), F.lit(None).cast("string")
    )


def _snapshots(
    raw: RawTable,
    judged: DataFrame,
    src: int,
    windows: Windows,
    columns: tuple[str, ...],
    content: Column,
) -> DataFrame:
    return _canonical(
        judged,
        src,
        windows,
        event_id=_row_hash(raw, columns),
        text=content,
        row=_row_json(raw, columns),
    )


def _canonical(
    judged: DataFrame,
    src: int,
    windows: Windows,
    *,
    event_id: Column,
    text: Column,
    row: Column,
) -> DataFrame:
    """Judged rows in the common shape."""
    kept, refused = F.col(_STATUS) == IN_WINDOW, F.col(_STATUS) >= FIRST_QUARANTINED
    user, time = F.col(_USER), F.col(_TIME)
    edges = windows.edges_us(src)
    cell = F.when(kept, render.bucketize(time, edges)).otherwise(F.lit(0)) if edges else F.lit(0)
    return judged.select(
        F.lit(src).alias("src"),
        F.col(_STATUS).alias("status"),
        cell.alias("cell"),
        # A quarantined row may have no user; they are spread by what else they hold.
        F.when(kept, F.xxhash64(user)).when(refused, F.xxhash64(row)).alias("user_hash"),
        F.when(kept, user).when(refused, F.make_valid_utf8(user)).alias("user_id"),
        F.when(kept | refused, time).alias("t"),
        F.when(kept, event_id).alias("event_id"),
        F.when(kept, text).when(refused, row).alias("text"),
    )


def _judged(raw: RawTable, config: InstructueConfig, status: Column, user: Column, time: Column) -> DataFrame:
    """The verdict and what it was based on, beside the raw columns; rows of erased users are not read."""
    frame = raw.frame.select("*", status.alias(_STATUS), user.alias(_USER), time.alias(_TIME))
    return without_erased(frame, _USER, config)


def without_erased(frame: DataFrame, user: str, config: InstructueConfig) -> DataFrame:
    """Drops the rows of erased users (`runs.tombstones`); `user` is the column with their ids as strings."""
    erased = Tombstones(OutputStore(config.output.path))
    if erased.salt is None or not len(erased):
        return frame  # nothing is hashed where nobody was ever erased
    hashes = frame.sparkSession.createDataFrame([(one,) for one in sorted(erased.user_hashes)], f"{_HASH} string")
    hashed = frame.withColumn(_HASH, F.substring(F.sha2(F.concat(F.lit(erased.salt), F.col(user)), 256), 1, HASH_CHARS))
    return hashed.join(F.broadcast(hashes), _HASH, "left_anti").drop(_HASH)


def _quarantine_status(user: Column, time: Column, broken: Column) -> Column:
    """The first matching reason; callers add the statuses of sound rows."""
    codes = {name: F.lit(code) for code, name in enumerate(STATUSES)}
    impossible = (time < F.lit(to_micros(EARLIEST))) | (time >= F.lit(to_micros(LATEST)))
    # All blanks come before "!", so one comparison spares nearly every id the slow trimming.
    blank = (user < F.lit("!")) & (F.btrim(user, F.lit(BLANK)) == "")
    return (
        F.when(user.isNull() | blank, codes["null_user"])
        .when(time.isNull(), codes["null_time"])
        .when(impossible, codes["impossible_time"])
        .when(broken | ~F.is_valid_utf8(user), codes["broken_value"])
    )


def _user_column(raw: RawTable, name: str) -> Column:
    kind = raw.types[name]
    if isinstance(kind, FloatType | DoubleType | BinaryType | ArrayType | MapType | StructType):
        raise SchemaError(
            f"{raw.where}: user column {name} has type {kind.simpleString()}",
            "use a string or integer column: 1.0 and 1 would be two users",
        )
    return column(name).cast("string")


def _time_column(raw: RawTable, name: str, zone: str) -> Column:
    """Microseconds since the epoch; relies on the session's time zone being UTC."""
    kind, value = raw.types[name], column(name)
    if isinstance(kind, TimestampType):
        return F.unix_micros(value)
    if isinstance(kind, DateType):
        # Dates reach further than timestamps; what is cut off here is quarantined either way.
        value = F.greatest(F.least(value, F.lit("9999-12-31").cast("date")), F.lit("0001-01-01").cast("date"))
        value = F.when(column(name).isNotNull(), value)
    elif not isinstance(kind, TimestampNTZType):
        raise SchemaError(
            f"{raw.where}: time column {name} has type {kind.simpleString()}, not timestamp",
            "convert it where the table is written, or name a view that does (to_timestamp, timestamp_seconds)",
        )
    local = value.cast("timestamp")
    if zone == "UTC":
        return F.unix_micros(local)
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"{raw.where}: unknown time zone {zone!r}", "write it like Europe/Berlin or UTC") from None
    return F.unix_micros(F.to_utc_timestamp(local, zone))


def _numeric(raw: RawTable, name: str) -> Column:
    kind = raw.types[name]
    if not isinstance(kind, NumericType):
        raise SchemaError(
            f"{raw.where}: numeric column {name} has type {kind.simpleString()}",
            "list it under `categorical`, or convert it to a number",
        )
    value = column(name).cast("float")
    return F.when(render.is_finite(value), value)


def _event_id(raw: RawTable, source: EventSourceConfig) -> Column:
    """Hash of the declared id columns; of the whole row when none is declared.

    Events whose id columns are all null must not be taken for one and the same event: they are told apart by the
    columns the source names, and not by all, so that Spark need not read the rest of a wide table.
    """
    declared = source.event_id_columns
    if not declared:
        return _row_hash(raw, tuple(raw.types))
    nothing = reduce(Column.__and__, [column(name).isNull() for name in declared])
    return F.when(nothing, _row_hash(raw, source.columns)).otherwise(_row_hash(raw, declared))


def _row_hash(raw: RawTable, names: tuple[str, ...]) -> Column:
    """64-bit hash of some columns. `xxhash64` skips nulls, so each column brings whether it is null."""
    pieces: list[Column] = []
    for name in names:
        value = column(name)
        if isinstance(raw.types[name], ArrayType | MapType | StructType):
            value = value.cast("string")
        pieces += [value, value.isNull()]
    return F.xxhash64(*pieces)


def _row_json(raw: RawTable, names: tuple[str, ...]) -> Column:
    """JSON of the named columns of a row, for whoever mends the table."""
    values = []
    for name in names:
        text = F.left(column(name).cast("string"), F.lit(_QUARANTINE_VALUE_CHARS))
        values.append(
            (F.make_valid_utf8(text) if isinstance(raw.types[name], StringType | BinaryType) else text).alias(name)
        )
    return F.left(F.to_json(F.struct(*values), {"ignoreNullFields": "false"}), F.lit(QUARANTINE_ROW_CHARS))


def count_statuses(frame: DataFrame) -> dict[tuple[int, int, int], int]:
    """Rows by `(src, status, cell)`."""
    rows = frame.groupBy("src", "status", "cell").count().collect()
    return {(int(src), int(status), int(cell)): int(number) for src, status, cell, number in rows}

"""Reading raw tables, handing Arrow batches back to Spark, and what Spark's errors mean in our words."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pyarrow as pa
from py4j.protocol import Py4JError, Py4JNetworkError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_type
from pyspark.sql.types import StructField, StructType

from instructue_feast.config import TableConfig
from instructue_feast.errors import (
    ConfigError,
    DataError,
    InstructueError,
    SchemaError,
    StorageError,
    error_from_name,
    listed,
)


def read_table(spark: SparkSession, table: TableConfig, what: str = "table") -> DataFrame:
    """Opens a raw table; nothing but its schema is read.

    Args:
        spark: The session.
        table: Where it lives.
        what: What to call it in a message, for example `source bill`.

    Raises:
        DataError: It is missing, holds no file, or its footer cannot be read.
        SchemaError: It has a column type Spark cannot read.
        ConfigError: Its format is unknown to Spark.
    """
    where = f"{what}: table {table.location}"
    try:
        if table.catalog is not None:
            return spark.table(table.catalog)
        return spark.read.format(table.format).options(**table.options).load(table.path)
    except (PySparkException, Py4JError) as error:
        conditions = _conditions(error)
        if "PATH_NOT_FOUND" in conditions:
            raise DataError(f"{where} does not exist", _beside(table.path or "")) from None
        if conditions & {"TABLE_OR_VIEW_NOT_FOUND", "SCHEMA_NOT_FOUND", "REQUIRES_SINGLE_PART_NAMESPACE"}:
            raise DataError(f"{where} is not in the catalog", "check the name, or use `path`") from None
        if "UNABLE_TO_INFER_SCHEMA" in conditions:
            raise DataError(f"{where} holds no {table.format} file", "is the job that writes it done?") from None
        if conditions & {"DATA_SOURCE_NOT_FOUND", "_LEGACY_ERROR_TEMP_1138"}:
            raise ConfigError(
                f"{where}: Spark knows no format {table.format!r}", "try parquet, orc, csv or json"
            ) from None
        explained = explain_spark_error(error)
        if explained is not None:
            raise type(explained)(f"{where}: {explained.message}", explained.hint) from None
        names = ", ".join(sorted(conditions)) or type(error).__name__
        raise DataError(f"{where} cannot be read: {names}", "check `format` and `options`") from error


def spark_schema(schema: pa.Schema) -> StructType:
    """An Arrow schema as Spark's, with the same order and nullability."""
    return StructType([StructField(one.name, from_arrow_type(one.type), one.nullable) for one in schema])


def emit(table: pa.Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Hands a table to Spark out of `mapInArrow`, which takes columns by position and checks nothing.

    Args:
        table: Rows to hand over; columns in any order, more than needed or not.
        schema: What Spark was told the function returns.

    Yields:
        Batches with exactly the columns and types of `schema`.

    Raises:
        SchemaError: A column is missing, does not fit its type without loss, or holds nulls where none may be.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            raise SchemaError(f"column {field.name} is missing", f"the table has {listed(table.column_names)}")
        column = table.column(field.name)
        try:
            column = column.cast(field.type, safe=True)
        except pa.ArrowException:
            message = f"column {field.name} of type {column.type} does not fit {field.type} without loss"
            raise SchemaError(message, "convert it before") from None
        if not field.nullable and column.null_count:
            raise SchemaError(f"column {field.name} has {column.null_count} nulls", "no null is allowed there")
        columns.append(column)
    yield from pa.Table.from_arrays(columns, schema=schema).to_batches()


@contextmanager
def spark_errors() -> Iterator[None]:
    """Turns what Spark raises inside the block into our errors, where we know what it means."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        explained = explain_spark_error(error)
        if explained is None:
            raise
        raise explained from None


_CONDITION = re.compile(r"\[([A-Z][A-Z0-9_]{3,}(?:\.[A-Z0-9_]+)*)\]")
_FILE = re.compile(
    r"(?:reading file|footer for file:?|Could not read footer for file|file)\s*:?\s*\"?((?:\w+:)?/[^\s\"]+)"
)
_OURS = re.compile(r"^instructue_feast\.errors\.(\w+): (.*?)(?:\nHint: (.*?))?$", re.MULTILINE)
# The last line of a Python traceback. The class is named alone, because a message may hold anything.
_STORAGE_LOST = re.compile(
    r"^(?:[\w.]+\.)?((?:OS|IO|Connection\w*|BrokenPipe|Timeout|ReadTimeout|ConnectTimeout|EndpointConnection|Http|Client|"
    r"ServerDisconnected|PermissionDenied|Permission)Error)\b",
    re.MULTILINE,
)
_REWRITE = "write the file again, or restore it from its origin"


def explain_spark_error(error: BaseException) -> InstructueError | None:
    """Says what an exception of Spark or of its Python workers means; `None` when we do not know.

    The message never quotes a value out of the data.
    """
    if isinstance(error, InstructueError):
        return error
    text = str(error)
    ours = _OURS.search(text)
    if ours:
        return error_from_name(ours.group(1), ours.group(2), ours.group(3) or "")
    file = _FILE.search(text)
    which = file.group(1).rstrip(".,;)") if file else "a file"
    conditions = _conditions(error)
    if "Python worker exited unexpectedly" in text or "Python worker failed" in text:
        return StorageError(
            "a Python worker died, most likely out of memory",
            "use fewer --cores, a smaller `model.max_batch_tokens` or a machine with more memory",
        )
    if "No space left on device" in text:
        return StorageError("the disk is full", "free disk space, or point spark.local.dir and output.path elsewhere")
    lost = _STORAGE_LOST.search(text)
    if lost:
        return StorageError(
            f"a worker could not reach its storage: {lost.group(1)}",
            "is the network up, and may the workers read and write there? A backfill can be resumed",
        )
    if "OutOfMemoryError" in text:
        return StorageError(
            "Spark ran out of memory",
            "raise `output.buckets`, or submit the job with more driver memory",
        )
    if isinstance(error, Py4JNetworkError) or "Connection refused" in text:
        return StorageError("the Spark process is gone", "was it killed, or did the machine run out of memory?")
    if "TIMESTAMP(NANOS" in text:
        return SchemaError(
            "a timestamp column has nanoseconds, which Spark cannot read",
            "write it in microseconds, with pandas: to_parquet(..., coerce_timestamps='us')",
        )
    if "PARQUET_TYPE_ILLEGAL" in text or "PARQUET_TYPE_NOT_SUPPORTED" in text:
        return SchemaError("a column has a type Spark cannot read from Parquet", "convert the column")
    if "PARQUET_COLUMN_DATA_TYPE_MISMATCH" in text or "SchemaColumnConvertNotSupported" in text:
        return SchemaError(f"{which} has a column of another type than the rest of its table", _REWRITE)
    if "FILE_NOT_EXIST" in text or "FAILED_READ_FILE.FILE_NOT_EXIST" in conditions:
        return DataError(f"{which} disappeared while it was read", "run again once its writer is done")
    if any(one.startswith(("FAILED_READ_FILE", "CANNOT_READ_FILE_FOOTER")) for one in conditions) or re.search(
        r"is not a Parquet file|Could not read footer|CorruptRecord", text
    ):
        return DataError(f"{which} is truncated or corrupt", _REWRITE)
    runtime = conditions & {"CAST_INVALID_INPUT", "CAST_OVERFLOW", "DIVIDE_BY_ZERO", "ARITHMETIC_OVERFLOW"}
    if runtime:
        return DataError(
            f"a row breaks an expression of a view or a `where` condition: {min(runtime)}",
            "use try_cast, try_divide or nullif there",
        )
    return None


def _conditions(error: BaseException) -> set[str]:
    found = set(_CONDITION.findall(str(error)))
    if isinstance(error, PySparkException) and error.getCondition():
        found.add(str(error.getCondition()))
    return found


def _beside(path: str) -> str:
    """What there is beside a missing path."""
    parent = posixpath.dirname(path.rstrip("/"))
    try:
        fs, folder = fsspec.core.url_to_fs(parent)
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=False)]
    except (OSError, ValueError, ImportError):
        return f"its folder {parent} does not exist either"
    return f"in {parent} there is {listed(names)}"

"""Batches go back to Spark by name, never by luck; Spark's errors come out as ours; the session is the right one."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType, LongType, StringType, TimestampType

from instructue_feast import schema
from instructue_feast.errors import DataError, MissingDependencyError, SchemaError, StorageError
from instructue_feast.java import require_java
from instructue_spark.io import emit, explain_spark_error, spark_errors, spark_schema
from instructue_spark.session import get_session

pytestmark = pytest.mark.spark

PAIR = pa.schema([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.int64())])


def emitted(table: pa.Table, to: pa.Schema = PAIR) -> list[dict]:
    return [row for batch in emit(table, to) for row in batch.to_pylist()]


def test_columns_are_handed_over_by_name_not_by_place():
    assert emitted(pa.table({"b": [2], "extra": ["x"], "a": [1]})) == [{"a": 1, "b": 2}]


def test_a_missing_column_is_named_with_what_there_is():
    with pytest.raises(SchemaError, match=r"column a is missing[\s\S]*\[b\]"):
        emitted(pa.table({"b": [1]}))


def test_a_cast_that_would_lose_something_is_refused():
    with pytest.raises(SchemaError, match="does not fit int64"):
        emitted(pa.table({"a": [1.5], "b": [1]}))
    assert emitted(pa.table({"a": pa.array([3], pa.int8()), "b": [1.0]})) == [{"a": 3, "b": 1}]


def test_a_null_is_refused_only_where_none_may_be():
    assert emitted(pa.table({"a": [1], "b": pa.array([None], pa.int64())})) == [{"a": 1, "b": None}]
    with pytest.raises(SchemaError, match="column a has 1 nulls"):
        emitted(pa.table({"a": pa.array([None], pa.int64()), "b": [1]}))


def test_an_arrow_schema_keeps_order_types_and_nullability_in_spark():
    fields = spark_schema(schema.PACKED_HISTORY).fields
    assert [field.name for field in fields] == schema.PACKED_HISTORY.names
    by_name = {field.name: field for field in fields}
    assert isinstance(by_name["user_id"].dataType, StringType)
    assert isinstance(by_name["as_of"].dataType, TimestampType)
    assert by_name["text_id"].dataType == ArrayType(LongType())
    assert by_name["tabular_numeric"].dataType == ArrayType(FloatType())
    assert not by_name["user_id"].nullable
    assert spark_schema(schema.QUARANTINE)["row"].nullable


def test_an_error_of_ours_survives_the_way_out_of_a_python_worker(spark: SparkSession):
    def run(batches):
        for batch in batches:
            yield from emit(pa.Table.from_batches([batch]).rename_columns(["wrong"]), PAIR)

    with pytest.raises(SchemaError) as caught, spark_errors():
        spark.range(3).mapInArrow(run, spark_schema(PAIR)).collect()
    assert caught.value.message == "column a is missing"
    assert caught.value.hint == "the table has [wrong]"


def test_errors_of_others_pass_unchanged():
    with pytest.raises(KeyError), spark_errors():
        raise KeyError("x")
    assert explain_spark_error(ValueError("something else")) is None


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("java.io.IOException: No space left on device", StorageError, "disk is full"),
        ("java.lang.OutOfMemoryError: Java heap space", StorageError, "out of memory"),
        (
            "[FAILED_READ_FILE.NO_HINT] Encountered error while reading file file:///a/b.parquet.",
            DataError,
            "/a/b.parquet",
        ),
        ("[FAILED_READ_FILE.FILE_NOT_EXIST] reading file file:///a/b.parquet", DataError, "disappeared"),
        ("[CAST_INVALID_INPUT] The value 'secret' of the type", DataError, "CAST_INVALID_INPUT"),
    ],
)
def test_known_failures_of_spark_are_explained_without_quoting_data(text: str, error: type, said: str):
    explained = explain_spark_error(RuntimeError(text))
    assert type(explained) is error
    assert said in str(explained)
    assert explained.hint
    assert "secret" not in str(explained)


def test_an_active_session_is_used_and_settled(spark: SparkSession):
    spark.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
    assert get_session("another", cores=1) is spark
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"


def test_a_machine_without_java_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"Java 17[\s\S]*install"):
        require_java()


@pytest.mark.parametrize(("version", "major"), [("11.0.2", 11), ("1.8.0_392", 8)])
def test_a_java_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, major: int):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=f"is Java {major}, Spark needs 17"):
        require_java()


def test_the_java_of_this_machine_is_accepted(spark: SparkSession):
    assert require_java() >= 17

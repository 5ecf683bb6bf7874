"""What must not change an extract: the order, copies and files of rows, Spark's partitions, and the future."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from instructue_feast.config import InstructueConfig
from instructue_feast.history.buckets import COUNT_EDGES
from instructue_feast.history.render import text_id
from instructue_feast.runs.manifest import ExtractManifest
from instructue_spark.extract import main, run_extract
from instructue_spark.history import _batches_bounded_by_rows
from instructue_spark.report import Reporter
from tests.oracles.extracts import comparable, read_extract
from tests.oracles.history import Expected
from tests.oracles.lake import (
    AS_OF,
    Tables,
    event_source,
    random_events,
    random_snapshots,
    tabular_source,
    write_config,
    write_lake,
)

pytestmark = pytest.mark.spark

SOURCES = {
    "bill": event_source("bill", max_texts=3),
    "search": event_source("search", "{word}", rank="frequency", max_texts=2),
    "profile": tabular_source("profile"),
}
ROSTER = {"users": {"table": {"path": "raw/users"}, "user_id": "id"}}


def make_tables() -> Tables:
    rng = random.Random(11)
    return {
        "bill": random_events(rng, 250),
        "search": random_events(rng, 150),
        "profile": random_snapshots(rng, 60),
        "users": pa.table({"id": ["1", "2", "silent", "silent", " ", None]}),
    }


def extract(spark: SparkSession, folder: Path, tables: Tables, *, files: int = 1, buckets: int = 3) -> Expected:
    write_lake(folder, tables, files=files)
    output = {"path": "output", "buckets": buckets, "min_free_gib": 0}
    config = write_config(folder, SOURCES, output=output, **ROSTER)
    run_extract(spark, config, AS_OF, extract_id="x", reporter=Reporter(stream=None))
    return read_extract(config, "x")


@pytest.fixture(scope="module")
def base(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return extract(spark, tmp_path_factory.mktemp("base"), make_tables())


def assert_same_features(actual: Expected, expected: Expected) -> None:
    assert comparable(actual.users) == comparable(expected.users)
    assert actual.phrasebook == expected.phrasebook


@pytest.mark.parametrize(("partitions", "buckets", "files"), [(1, 7, 5), (7, 1, 2)])
def test_row_order_files_partitions_and_buckets_change_nothing(
    spark: SparkSession, base: Expected, tmp_path: Path, partitions: int, buckets: int, files: int
):
    rng = np.random.default_rng(partitions)
    shuffled = {name: table.take(rng.permutation(len(table))) for name, table in make_tables().items()}
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    try:
        other = extract(spark, tmp_path, shuffled, files=files, buckets=buckets)
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)
    assert_same_features(other, base)
    assert other.counts == base.counts
    assert other.quarantine == base.quarantine


def test_copies_of_rows_change_only_how_many_are_read(spark: SparkSession, base: Expected, tmp_path: Path):
    doubled = {name: pa.concat_tables([table, table]) for name, table in make_tables().items()}
    other = extract(spark, tmp_path, doubled)
    assert_same_features(other, base)
    for name, counts in base.counts.items():
        assert other.counts[name].read == 2 * counts.read
        assert other.counts[name].kept == counts.kept
        assert other.counts[name].duplicates == 2 * counts.duplicates + counts.kept


def test_the_future_changes_only_how_many_rows_are_refused(spark: SparkSession, base: Expected, tmp_path: Path):
    tables = make_tables()
    rng = random.Random(99)
    future = {"bill": random_events(rng, 90), "search": random_events(rng, 90), "profile": random_snapshots(rng, 40)}
    added = {}
    for name, table in future.items():
        column = "since" if name == "profile" else "at"
        times = [AS_OF + dt.timedelta(microseconds=rng.choice([0, 1, 10**6, 10**12])) for _ in range(len(table))]
        position = table.schema.get_field_index(column)
        table = table.set_column(position, table.schema.field(column), pa.array(times, table.schema.field(column).type))
        table = table.set_column(0, table.schema.field("user"), pa.array(["1", "only-later"] * (len(table) // 2)))
        if name != "profile":  # what is broken is refused as broken, whenever it happened
            table = table.set_column(4, table.schema.field("amount"), pa.array([1.0] * len(table)))
        added[name] = len(table)
        tables[name] = pa.concat_tables([table, tables[name]])
    other = extract(spark, tmp_path, tables)
    assert_same_features(other, base)
    assert other.quarantine == base.quarantine
    for name, number in added.items():
        late = base.counts[name].at_or_after_as_of + number
        assert other.counts[name] == dataclasses.replace(
            base.counts[name], read=base.counts[name].read + number, at_or_after_as_of=late
        )


def test_a_user_with_a_million_events_fits(spark: SparkSession, tmp_path: Path):
    count, texts = 1_000_000, 20_000
    rows = spark.range(count).select(
        F.lit("heavy").alias("user"),
        F.timestamp_micros(F.lit(int((AS_OF - dt.timedelta(days=1)).timestamp() * 1e6)) + F.col("id")).alias("at"),
        "id",
        F.concat(F.lit("thing "), (F.col("id") % texts).cast("string")).alias("word"),
    )
    rows.write.parquet(str(tmp_path / "raw" / "bill"))
    config = write_config(tmp_path, {"bill": event_source("bill", "{word}", max_texts=5)})
    manifest = run_extract(spark, config, AS_OF, extract_id="x", reporter=Reporter(stream=None))
    assert (manifest.users, manifest.events, manifest.tokens) == (1, count, 5)
    assert manifest.distinct_texts == texts
    row = read_extract(config, "x").users["heavy"]
    assert row["num_events"] == [count]
    assert row["text_id"] == [text_id("bill", f"thing {texts - left}") for left in (5, 4, 3, 2, 1)]
    fifty_each = sum(count // texts >= edge for edge in COUNT_EDGES)
    assert row["count_bucket"] == [fifty_each] * 5


WIDE = tabular_source("profile", categorical=[f"column_{number}" for number in range(50)])


@pytest.mark.parametrize(
    ("source", "max_text_chars", "own", "expected"),
    [
        (event_source("bill"), 256, None, str(2**31 - 1)),
        (event_source("bill"), 4096, None, None),
        (WIDE, 256, None, None),
        (event_source("bill"), 256, "1234", "1234"),
    ],
)
def test_batches_for_python_are_bounded_in_bytes_where_texts_may_be_long_or_somebody_wants_it(
    spark, tmp_path, source, max_text_chars, own, expected
):
    config = write_config(tmp_path, {"one": source}, history={"max_text_chars": max_text_chars})
    bound = "spark.sql.execution.arrow.maxBytesPerBatch"
    if own:
        spark.conf.set(bound, own)
    try:
        with _batches_bounded_by_rows(spark, config):
            assert spark.conf.get(bound, None) == expected
        assert spark.conf.get(bound, None) == own
    finally:
        spark.conf.unset(bound)


def test_the_command_line_job_reports_stages_and_the_manifest(
    spark: SparkSession, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    write_lake(tmp_path, make_tables())
    config = write_config(tmp_path, SOURCES, **ROSTER)
    arguments = ["--config", str(tmp_path / "instructue.yaml"), "--as-of", AS_OF.isoformat(), "--extract-id", "job"]
    with capfd.disabled():  # the job redirects standard output itself, which only a real one can take
        code, lines = _run(tmp_path, arguments)
    assert code == 0
    done = [line["name"] for line in lines if line["event"] == "stage_done"]
    assert done == ["sources", "history", "phrasebook"]
    assert lines[-1]["event"] == "result"
    assert ExtractManifest(**lines[-1]["value"]).extract_id == "job"
    _check_finished(config)
    with capfd.disabled():
        code, lines = _run(tmp_path, arguments)
    assert code == 7
    assert lines[-1]["type"] == "RunConflictError"
    _check_finished(config)
    with capfd.disabled():
        code, lines = _run(tmp_path, [*arguments[:2], "--as-of", "2025-03-20T12:30:00"])
    assert code == 2
    assert lines[-1]["event"] == "error"


def _run(folder: Path, arguments: list[str]) -> tuple[int, list[dict]]:
    """Runs `main` in this process with standard output in a file."""
    file = folder / "stdout.jsonl"
    kept, handler = os.dup(1), signal.getsignal(signal.SIGTERM)
    try:
        with file.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            code = main(arguments)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        signal.signal(signal.SIGTERM, handler)
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def _check_finished(config: InstructueConfig) -> None:
    folder = Path(config.output.path) / "extracts" / "job"
    names = {one.name for one in folder.iterdir()}
    assert {"history", "phrasebook", "quarantine", "manifest.json"} <= names
    assert "owner.json" not in names

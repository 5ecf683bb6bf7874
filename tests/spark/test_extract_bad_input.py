"""Every bad input gets an error that says what, where and how to mend it, and leaves nothing half-written."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, DataError, InstructueError, RunConflictError, SchemaError, StorageError
from instructue_feast.runs.manifest import ExtractManifest
from instructue_spark import history
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from tests.oracles.extracts import read_extract
from tests.oracles.lake import (
    AS_OF,
    event_source,
    random_events,
    random_snapshots,
    tabular_source,
    write_config,
    write_lake,
)

pytestmark = pytest.mark.spark


def extract(spark: SparkSession, config: InstructueConfig, as_of: dt.datetime = AS_OF) -> ExtractManifest:
    return run_extract(spark, config, as_of, extract_id="x", reporter=Reporter(stream=None))


def refused(spark: SparkSession, config: InstructueConfig, error: type[InstructueError]) -> str:
    """The message and hint of the error; the extract's folder must be gone."""
    with pytest.raises(error) as caught:
        extract(spark, config)
    assert not (Path(config.output.path) / "extracts" / "x").exists()
    assert caught.value.hint
    return str(caught.value)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good tables, for configs that are wrong about them."""
    folder = Path(tmp_path_factory.mktemp("lake"))
    rng = random.Random(5)
    tables = {"bill": random_events(rng, 40), "profile": random_snapshots(rng, 20)}
    tables["floats"] = tables["bill"].set_column(0, "user", pa.array([1.0] * 40))
    tables["none"] = tables["bill"].slice(0, 0)
    write_lake(folder, tables)
    nanos = pa.table(
        {"user": ["a"], "at": pa.array([1], pa.timestamp("ns")), "id": [1], "word": ["x"], "amount": [1.0]}
    )
    (folder / "raw" / "nanos").mkdir()
    pq.write_table(nanos, folder / "raw" / "nanos" / "part-0.parquet", version="2.6")
    (folder / "raw" / "text").mkdir()
    (folder / "raw" / "text" / "part-0.parquet").write_text("user,at\n1,2\n" * 20)
    (folder / "raw" / "hollow").mkdir()
    return folder


NO_AMOUNT = {"text": "{word}"}


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (event_source("bil"), DataError, ["source bill", "raw/bil", "does not exist", "bill, floats"]),
        (event_source("bill") | {"table": {"catalog": "no.such.table"}}, DataError, ["source bill", "no.such.table"]),
        (event_source("text"), DataError, ["source bill", "truncated or corrupt"]),
        (event_source("hollow"), DataError, ["source bill", "holds no parquet file"]),
        (event_source("none"), DataError, ["source bill", "raw/none", "has no rows", "allow_empty"]),
        (event_source("nanos"), SchemaError, ["source bill", "nanoseconds", "microseconds"]),
        (event_source("bill") | {"table": {"path": "raw/bill", "format": "parkett"}}, ConfigError, ["parkett"]),
        (event_source("bill", "{wrod}"), SchemaError, ["source bill", "'wrod'", "did you mean word?", "amount"]),
        (event_source("bill", time="word"), SchemaError, ["time column word", "type string", "to_timestamp"]),
        (event_source("bill", time="level"), SchemaError, ["time column level", "type bigint", "timestamp_seconds"]),
        (event_source("bill", "{amount}"), SchemaError, ["column amount", "double", "{amount|bucket:1,2,5}"]),
        (event_source("bill", "{word|bucket:1}"), SchemaError, ["column word", "string", "cannot be bucketed"]),
        (event_source("bill", "{at}"), SchemaError, ["column at", "timestamp", "convert it to a string"]),
        (event_source("floats"), SchemaError, ["user column user", "double"]),
        (event_source("bill", where=["amount >"]), ConfigError, ["source bill", "'amount >'", "PARSE_SYNTAX_ERROR"]),
        (event_source("bill", where=["price > 1"]), ConfigError, ["'price > 1'", "UNRESOLVED_COLUMN", "'amount'"]),
        (event_source("bill", where=["level + 1"]), ConfigError, ["'level + 1'", "boolean"]),
        (event_source("bill", where=["1 / 0 > level"]), DataError, ["DIVIDE_BY_ZERO", "try_divide"]),
        (event_source("bill", days=1, where=["false"]), DataError, ["no source has a row", "history.days"]),
        (tabular_source("profile", numeric=["city"]), SchemaError, ["numeric column city", "string", "categorical"]),
        (tabular_source("profile", categorical=["spend"]), SchemaError, ["column spend", "double"]),
        (tabular_source("profile", numeric=["spent"]), SchemaError, ["'spent'", "did you mean spend?"]),
        (tabular_source("profile", time="city"), SchemaError, ["time column city"]),
    ],
)
def test_a_wrong_source_is_refused_with_what_and_where(spark, lake: Path, source, error, said):
    message = refused(spark, write_config(lake, {"bill": source}), error)
    for piece in said:
        assert piece in message


def test_an_unknown_time_zone_is_refused(spark, tmp_path: Path):
    table = random_events(random.Random(1), 5, time_type=pa.timestamp("us"))
    write_lake(tmp_path, {"bill": table})
    config = write_config(tmp_path, {"bill": event_source("bill", time_zone="Mars/Base")})
    assert "Mars/Base" in refused(spark, config, ConfigError)


def test_a_roster_with_a_wrong_column_is_refused(spark, lake: Path):
    users = {"table": {"path": "raw/profile"}, "user_id": "usr"}
    message = refused(spark, write_config(lake, {"bill": event_source("bill")}, users=users), SchemaError)
    assert "users: column 'usr'" in message
    assert "did you mean user?" in message


def test_an_empty_source_is_accepted_when_the_config_says_so(spark, lake: Path, tmp_path: Path):
    sources = {"bill": event_source("bill"), "search": event_source("none", allow_empty=True)}
    config = write_config(lake, sources, output={"path": str(tmp_path), "buckets": 2, "min_free_gib": 0})
    manifest = extract(spark, config)
    assert manifest.counts["search"].read == 0
    assert all(row["num_events"][1] == 0 for row in read_extract(config, "x").users.values())


def test_one_truncated_file_among_good_ones_is_refused_and_named(spark, tmp_path: Path):
    write_lake(tmp_path, {"bill": random_events(random.Random(1), 400)}, files=4)
    file = tmp_path / "raw" / "bill" / "part-2.parquet"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refused(spark, write_config(tmp_path, {"bill": event_source("bill")}), DataError)
    assert "part-2.parquet is truncated or corrupt" in message


def test_a_column_overwritten_with_garbage_is_refused(spark, tmp_path: Path):
    write_lake(tmp_path, {"bill": random_events(random.Random(1), 400)})
    file = tmp_path / "raw" / "bill" / "part-0.parquet"
    data = bytearray(file.read_bytes())
    data[20 : len(data) // 2] = bytes(len(data) // 2 - 20)
    file.write_bytes(bytes(data))
    message = refused(spark, write_config(tmp_path, {"bill": event_source("bill")}), DataError)
    assert "truncated or corrupt" in message


def test_as_of_needs_a_time_zone(spark, lake: Path):
    config = write_config(lake, {"bill": event_source("bill")})
    with pytest.raises(ConfigError, match="time zone"):
        extract(spark, config, dt.datetime(2025, 1, 1))


def test_too_little_disk_is_refused_before_anything_is_written(spark, lake: Path, tmp_path: Path):
    output = {"path": str(tmp_path / "out"), "min_free_gib": 10**9}
    with pytest.raises(StorageError, match="GiB are free"):
        extract(spark, write_config(lake, {"bill": event_source("bill")}, output=output))
    assert not (tmp_path / "out").exists()


def test_a_second_writer_is_refused_and_the_first_stays(spark, lake: Path, tmp_path: Path):
    output = {"path": str(tmp_path), "buckets": 2, "min_free_gib": 0}
    config = write_config(lake, {"bill": event_source("bill")}, output=output)
    extract(spark, config)
    before = read_extract(config, "x")
    with pytest.raises(RunConflictError, match="extracts/x"):
        extract(spark, config)
    after = read_extract(config, "x")
    assert after.phrasebook == before.phrasebook
    assert after.counts == before.counts


def test_an_extract_id_that_leaves_its_folder_is_refused(spark, lake: Path):
    config = write_config(lake, {"bill": event_source("bill")})
    with pytest.raises(ConfigError, match="extract id"):
        run_extract(spark, config, AS_OF, extract_id="../x", reporter=Reporter(stream=None))


def test_an_interrupted_extract_leaves_nothing_and_a_usable_session(spark, lake: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(history, "write", interrupt)
    config = write_config(lake, {"bill": event_source("bill")})
    with pytest.raises(KeyboardInterrupt):
        extract(spark, config)
    assert not (Path(config.output.path) / "extracts" / "x").exists()
    assert spark.range(3).count() == 3


def test_two_texts_with_the_same_id_are_refused(spark, lake: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history, "text_id", lambda source, text: len(text))
    message = refused(spark, write_config(lake, {"bill": event_source("bill")}), DataError)
    assert "same 64-bit id" in message


def test_bytes_that_are_not_utf8_neither_pass_nor_break_anything(spark, tmp_path: Path):
    (tmp_path / "raw").mkdir()
    rows = spark.sql(
        "SELECT user, TIMESTAMP '2025-03-19 00:00:00' AS at, id, CAST(word AS STRING) AS word FROM VALUES"
        " ('a', 1, X'66FF6F'), (CAST(X'61FE' AS STRING), 2, X'6869') AS t(user, id, word)"
    )
    rows.write.parquet(str(tmp_path / "raw" / "bill"))
    config = write_config(tmp_path, {"bill": event_source("bill", "{word}")})
    manifest = extract(spark, config)
    found = read_extract(config, "x")
    assert [text for _, text in found.phrasebook.values()] == ["f\ufffdo"]
    assert set(found.users) == {"a"}
    assert manifest.counts["bill"].quarantined == {"broken_value": 1}


def test_the_quarantine_shows_the_refused_row_cut_to_size(spark, tmp_path: Path):
    table = random_events(random.Random(1), 1)
    row = table.to_pylist()[0] | {"user": None, "word": "y" * 100_000, "at": AS_OF}
    good = row | {"user": "a", "at": AS_OF - dt.timedelta(days=1), "amount": 1.0}
    write_lake(tmp_path, {"bill": pa.Table.from_pylist([row, good], schema=table.schema)})
    config = write_config(tmp_path, {"bill": event_source("bill")})
    extract(spark, config)
    refused_row = ds.dataset(Path(config.output.path) / "extracts" / "x" / "quarantine").to_table().to_pylist()
    assert len(refused_row) == 1
    assert '"word":"yyy' in refused_row[0]["row"]
    assert '"user":null' in refused_row[0]["row"]
    assert len(refused_row[0]["row"]) <= 4096
    assert refused_row[0]["event_time"] == AS_OF

"""The extract equals its plain-Python restatement, on random tables that hold everything a lake can throw at it."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig
from instructue_feast.runs.manifest import ExtractManifest
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from tests.oracles.extracts import assert_same, read_extract
from tests.oracles.history import expected_extract
from tests.oracles.lake import (
    AS_OF,
    LOCAL_TIME,
    Tables,
    event_source,
    random_events,
    random_snapshots,
    tabular_source,
    write_config,
    write_lake,
)

pytestmark = pytest.mark.spark


def extract(spark: SparkSession, config: InstructueConfig) -> ExtractManifest:
    return run_extract(spark, config, AS_OF, extract_id="x", reporter=Reporter(stream=None))


def test_two_event_sources_without_roster_equal_the_oracle(spark, tmp_path: Path):
    rng = random.Random(1)
    events = random_events(rng, 400)
    huge = events.slice(0, 2).to_pylist()
    for row in huge:
        row |= {"user": "huge", "at": AS_OF.replace(hour=1), "word": "x" * 1_000_000, "amount": 1.0}
    events = pa.concat_tables([events, pa.Table.from_pylist(huge, schema=events.schema)])
    write_lake(tmp_path, {"bill": events, "search": random_events(rng, 300)}, files=2)
    config = write_config(
        tmp_path,
        {
            "bill": event_source("bill", max_texts=4, rank="frequency"),
            "search": event_source("search", "{word} {level} {flag} {level|bucket:0,100}", event_id=[], max_texts=3),
        },
    )
    manifest = extract(spark, config)
    expected = expected_extract(config, AS_OF)
    assert_same(read_extract(config, "x"), expected)
    assert {"null_user", "null_time", "impossible_time", "broken_value"} <= set(manifest.counts["bill"].quarantined)
    assert manifest.users == len(expected.users)
    assert manifest.tokens == sum(len(row["text_id"]) for row in expected.users.values())
    assert manifest.events == sum(counts.kept for counts in manifest.counts.values())
    assert manifest.distinct_texts == len(expected.phrasebook)


def test_nine_sources_with_two_snapshots_a_roster_and_time_zones_equal_the_oracle(spark, tmp_path: Path):
    rng = random.Random(2)
    tables: Tables = {f"e{number}": random_events(rng, 120) for number in range(5)}
    tables["local"] = random_events(rng, 200, time_type=LOCAL_TIME)
    tables["daily"] = random_events(rng, 120, time_type=pa.date32())
    tables["profile"], tables["score"] = random_snapshots(rng, 60), random_snapshots(rng, 60, timed=False)
    numbers = [None, *range(8, 20), 8, 900]
    tables["users"] = pa.table({"id": pa.array(numbers, pa.int32())})
    write_lake(tmp_path, tables)
    sources = {f"e{number}": event_source(f"e{number}", max_texts=1 + number) for number in range(3)}
    sources["profile"] = tabular_source("profile")
    sources["e3"] = event_source("e3", event_id=["user", "word"], where=["amount > 0", "level is not null"], days=5)
    sources["local"] = event_source("local", time_zone="America/New_York", rank="frequency", max_texts=2)
    sources["e4"] = event_source("e4", "{flag}", rank="frequency")
    sources["score"] = tabular_source("score", time=None, numeric=["years"], categorical=["city"])
    sources["daily"] = event_source("daily", time_zone="Asia/Tokyo", days=400)
    config = write_config(tmp_path, sources, users={"table": {"path": "raw/users"}, "user_id": "id"})
    extract(spark, config)

    def kept(row) -> bool:
        return row["amount"] is not None and not row["amount"] <= 0 and row["level"] is not None  # NaN is the largest

    expected = expected_extract(config, AS_OF, {"e3": kept})
    assert_same(read_extract(config, "x"), expected)
    silent = [row for user, row in expected.users.items() if user == "900"]
    assert silent[0]["text_id"] == []
    assert silent[0]["num_events"] == [0] * 9


def test_snapshots_alone_equal_the_oracle(spark, tmp_path: Path):
    rng = random.Random(3)
    write_lake(tmp_path, {"profile": random_snapshots(rng, 80), "score": random_snapshots(rng, 50, timed=False)})
    sources = {
        "score": tabular_source("score", time=None, numeric=[], categorical=["member", "tier"]),
        "profile": tabular_source("profile", categorical=[]),
    }
    config = write_config(tmp_path, sources)
    extract(spark, config)
    assert_same(read_extract(config, "x"), expected_extract(config, AS_OF))


def test_a_raw_table_may_have_columns_of_any_name(spark, tmp_path: Path):
    table = random_events(random.Random(3), 60)
    names = {"flag": "Status", "level": "src", "amount": "user_id", "word": "text", "id": "t"}
    write_lake(tmp_path, {"bill": table.rename_columns([names.get(one, one) for one in table.column_names])})
    text = "{text} {Status} {src} {user_id|bucket:1,5}"
    config = write_config(tmp_path, {"bill": event_source("bill", text, event_id="t")})
    extract(spark, config)
    assert_same(read_extract(config, "x"), expected_extract(config, AS_OF))

"""The synthetic data set has the properties its truth table and documentation promise."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from instructue_feast.config import load_config
from instructue_feast.datasets import write_project
from instructue_feast.errors import ConfigError
from instructue_feast.schema import TIMESTAMP
from instructue_spark.report import Reporter
from instructue_spark.synthetic import END, RHYTHMS, SHARES, write_synthetic
from instructue_spark.synthetic_words import INTERESTS, NOISE

pytestmark = pytest.mark.spark

USERS, DAYS = 3_000, 120
Tables = dict[str, pa.Table]


def read(folder: Path) -> Tables:
    return {path.name: pq.read_table(path) for path in sorted((folder / "raw").iterdir())}


@pytest.fixture(scope="module")
def project(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tmp_path_factory.mktemp("synthetic"))
    write_synthetic(spark, folder, users=USERS, seed=7, days=DAYS)
    return folder


@pytest.fixture(scope="module")
def tables(project: Path) -> Tables:
    return read(project)


def sorted_rows(table: pa.Table, first_users: int) -> list[str]:
    """Rows as text (NaN equals NaN) of the users `u00000000` up to the given number; rows without user by event id."""
    rows = table.to_pylist()
    owners = [row["user_id"] or row["event_id"].split("-")[1] for row in rows]
    return sorted(str(row) for row, owner in zip(rows, owners, strict=True) if int(owner[1:]) < first_users)


def test_the_same_seed_gives_the_same_rows_however_spark_cuts_the_work(
    spark: SparkSession, tmp_path: Path, tables: Tables
) -> None:
    write_synthetic(spark, tmp_path, users=200, seed=7, days=DAYS, partitions=7)
    found = read(tmp_path)
    assert found.pop("vocabulary").equals(tables["vocabulary"])
    for name, table in found.items():
        assert sorted_rows(table, USERS) == sorted_rows(tables[name], 200), name
        assert table.num_rows > 150


@pytest.fixture(scope="module")
def other(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Another seed, written over older tables: the folder, the summary and the progress lines."""
    folder = Path(tmp_path_factory.mktemp("other"))
    (folder / "raw").mkdir()
    (folder / "raw" / "old").touch()
    stream = io.StringIO()
    summary = write_synthetic(spark, folder, users=200, seed=8, days=DAYS, reporter=Reporter(stream))
    return folder, summary, stream.getvalue()


def test_another_seed_gives_other_rows(tables: Tables, other: tuple[Path, dict[str, Any], str]) -> None:
    for name, table in read(other[0]).items():
        if name not in ("users", "vocabulary"):
            assert not set(sorted_rows(table, 200)) & set(sorted_rows(tables[name], 200)), name


def test_progress_is_reported_and_old_tables_are_replaced(other: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, progress = other
    lines = [json.loads(line) for line in progress.splitlines()]
    done = {line["name"]: line["rows_out"] for line in lines if line["event"] == "stage_done"}
    assert done == summary["rows"] == {name: table.num_rows for name, table in read(folder).items()}
    assert done["users"] == 200
    assert summary["as_of"] == "2025-06-01T00:00:00Z"
    assert [path.name for path in folder.iterdir()] == ["raw"]


def test_the_config_loads_and_all_its_columns_exist(project: Path, tables: Tables) -> None:
    config = load_config(write_project(project, "synthetic"))
    assert config.source_names == (*SHARES, "tabular")
    for name, source in config.sources.items():
        assert set(source.columns) <= set(tables[name].column_names), name
        assert source.time is not None
        assert tables[name].schema.field(source.time).type == TIMESTAMP
    assert "truth" not in config.source_names
    assert sorted(tables["users"]["user_id"].to_pylist()) == [f"u{i:08d}" for i in range(USERS)]


def test_users_have_about_thirty_events_with_a_heavy_tail(tables: Tables) -> None:
    counts = Counter(user for name in SHARES for user in tables[name]["user_id"].to_pylist() if user)
    per_user = sorted(counts.values())
    assert 20 < sum(per_user) / USERS < 40
    median, top = per_user[len(per_user) // 2], per_user[-1]
    assert 8 < median < 25
    assert top > 2_000 * 0.9  # a whale
    assert sum(count > 1_500 for count in per_user) < USERS * 0.01


def test_cold_users_are_in_the_roster_and_have_no_event(tables: Tables) -> None:
    cold = {row["user_id"] for row in tables["truth"].to_pylist() if row["cold"]}
    active = {user for name in SHARES for user in tables[name]["user_id"].to_pylist()}
    roster = set(tables["users"]["user_id"].to_pylist())
    assert 0.02 < len(cold) / USERS < 0.04
    assert not cold & active
    assert cold < roster
    assert len(roster - cold - active) < 5  # those whose only event lost its user


def interest_of(name: str, row: dict[str, Any]) -> str | None:
    """The one interest whose vocabulary an event uses; `None` when that is not clear."""
    field, word = {
        "bill": ("merchants", lambda: row["merchant_category"]),
        "mini_program": ("services", lambda: row["service"]),
        "app": ("apps", lambda: row["app_name"]),
    }[name]
    found = [one for one, words in INTERESTS.items() if word() in getattr(words, field)]
    return "noise" if word() in getattr(NOISE, field) else found[0] if len(found) == 1 else None


def test_what_users_do_follows_their_interests(tables: Tables) -> None:
    top = {row["user_id"]: row["top_interest"] for row in tables["truth"].to_pylist()}
    for name in ("bill", "mini_program", "app"):
        kinds = Counter[str]()
        for row in tables[name].to_pylist():
            if row["user_id"]:
                interest = interest_of(name, row)
                assert interest is not None, row
                kinds["top" if interest == top[row["user_id"]] else interest] += 1
        total = sum(kinds.values())
        assert 0.25 < kinds["noise"] / total < 0.35
        assert kinds["top"] / total > 0.35  # chance would be .7 / 12
    sites = Counter(
        top[row["user_id"]] == row["page_path"].split(".")[0] for row in tables["spm"].to_pylist() if row["user_id"]
    )
    assert sites[True] / sites.total() > 0.35


def test_the_vocabulary_says_what_an_event_is_about(tables: Tables) -> None:
    rows = tables["vocabulary"].to_pylist()
    words: dict[str, list[str]] = {}
    for row in rows:
        words.setdefault(row["interest"], []).append(row["word"])
    assert list(words) == list(INTERESTS)
    assert all(len(own) == len(set(own)) > 20 for own in words.values())
    assert all(row["word"] == row["word"].lower() for row in rows)

    @cache
    def about(text: str) -> set[str]:
        return {interest for interest, own in words.items() if any(word in text for word in own)}

    for row in tables["bill"].to_pylist():
        interest = interest_of("bill", row)
        assert (interest in about(row["merchant_category"])) == (interest != "noise"), row
    for row in tables["spm"].to_pylist():
        site = row["page_path"].split(".")[0]
        assert about(row["page_path"]) == ({site} if site != "main" else set()), row
    # Whatever somebody does has words for it; a hotel for pets is a hotel, so a few texts are about two interests.
    for name, column in (("mini_program", "service"), ("app", "app_name"), ("search", "query")):
        found = Counter(len(about(text)) for text in tables[name][column].to_pylist())
        assert set(found) <= {0, 1, 2}
        assert 0.25 < found[0] / found.total() < 0.35  # noise
        assert found[2] / found.total() < 0.05


def test_strengths_say_how_often_an_interest_shows(tables: Tables) -> None:
    truth = {row["user_id"]: row for row in tables["truth"].to_pylist()}
    names = list(INTERESTS)
    shown: dict[float, list[int]] = {1.0: [], 0.6: [], 0.4: [], 0.0: []}
    by_user: dict[str, Counter[str]] = {}
    for row in tables["spm"].to_pylist():
        if row["user_id"]:
            by_user.setdefault(row["user_id"], Counter())[row["page_path"].split(".")[0]] += 1
    for user, sites in by_user.items():
        strengths = truth[user]["strengths"]
        assert names[strengths.index(1.0)] == truth[user]["top_interest"]
        assert 1 <= sum(value > 0 for value in strengths) <= 3
        if sum(value > 0 for value in strengths) == 3:
            for name, value in zip(names, strengths, strict=True):
                shown[value].append(sites[name])
    means = {value: sum(counts) / len(counts) for value, counts in shown.items()}
    assert means[1.0] > means[0.6] > means[0.4] > 3 * means[0.0]


def test_events_keep_the_users_hours(tables: Tables) -> None:
    rhythm = {row["user_id"]: row["rhythm"] for row in tables["truth"].to_pylist()}
    assert set(rhythm.values()) == set(RHYTHMS)
    hours: dict[str, list[int]] = {one: [] for one in RHYTHMS}
    weekend = dict.fromkeys(RHYTHMS, 0)
    for row in tables["search"].to_pylist():
        if row["user_id"] and row["event_time"] and row["event_time"].year == 2025:
            hours[rhythm[row["user_id"]]].append(row["event_time"].hour)
            weekend[rhythm[row["user_id"]]] += row["event_time"].weekday() >= 5
    share = {one: sum(5 <= hour < 11 for hour in hours[one]) / len(hours[one]) for one in RHYTHMS}
    assert share["morning"] > 0.8
    assert share["evening"] < 0.1
    assert sum(hour >= 17 for hour in hours["evening"]) / len(hours["evening"]) > 0.8
    assert weekend["weekend"] / len(hours["weekend"]) > 0.75
    assert weekend["morning"] / len(hours["morning"]) < 0.4


def test_the_part_of_the_day_is_that_of_the_event(tables: Tables) -> None:
    for row in tables["mini_program"].to_pylist():
        if row["event_time"] and row["event_time"].year == 2025:
            kind, part = row["day_part"].split()
            assert (kind == "weekend") == (row["event_time"].weekday() >= 5)
            assert (part == "morning") == (5 <= row["event_time"].hour < 11)


def test_good_events_happen_inside_the_window(tables: Tables) -> None:
    for name in SHARES:
        times = [time for time in tables[name]["event_time"].to_pylist() if time and time.year > 1900]
        assert END - timedelta(days=DAYS) <= min(times)
        assert max(times) < END


def test_some_events_are_late_twice_or_broken(tables: Tables) -> None:
    total = sum(tables[name].num_rows for name in SHARES)
    late = duplicates = no_user = bad_time = 0
    for name in SHARES:
        table = tables[name]
        ids = table.group_by("event_id").aggregate([([], "count_all"), ("event_time", "count_distinct")])
        assert set(ids["count_all"].to_pylist()) == {1, 2}
        assert set(ids["event_time_count_distinct"].to_pylist()) <= {0, 1}
        duplicates += table.num_rows - ids.num_rows
        no_user += table["user_id"].null_count
        for time, arrived in zip(table["event_time"].to_pylist(), table["arrived_at"].to_pylist(), strict=True):
            if time is None or time.year == 1900:
                bad_time += 1
            else:
                assert time <= arrived < time + timedelta(days=5, seconds=6)
                late += arrived > time + timedelta(minutes=2)
    assert 0.015 < duplicates / total < 0.025
    assert 0.04 < late / total < 0.06
    assert 0 < no_user / total < 0.002
    assert 0 < bad_time / total < 0.002
    broken = [amount for amount in tables["bill"]["amount"].to_pylist() if not math.isfinite(amount)]
    assert 0 < len(broken) / tables["bill"].num_rows < 0.002


def test_snapshots_are_dated_and_some_users_and_values_are_missing(tables: Tables) -> None:
    tabular = tables["tabular"]
    stamps = sorted(set(tabular["snapshot_time"].to_pylist()))
    assert stamps == [END - timedelta(days=30 * i, seconds=1) for i in reversed(range(DAYS // 30))]
    present = len(pc.unique(tabular["user_id"])) / USERS
    assert 0.87 < present < 0.93
    assert 0 < tabular["balance"].null_count < 0.05 * tabular.num_rows
    assert min(tabular["tenure_days"].to_pylist()) >= 0
    assert set(tabular["membership_level"].to_pylist()) == {"gold", "silver", "basic"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"users": 0}, "0 users"),
        ({"days": 0}, "0 days"),
        ({"end": datetime(2025, 6, 1)}, "not midnight UTC"),
        ({"end": datetime(2025, 6, 1, 5, tzinfo=UTC)}, "not midnight UTC"),
    ],
)
def test_impossible_requests_are_refused(
    spark: SparkSession, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_synthetic(spark, tmp_path, **{"users": 1, "seed": 0, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_old_tables_stay_when_writing_fails(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "old").touch()

    class Failing(Reporter):
        def emit(self, event: str, **values: Any) -> None:
            if event == "stage_done":
                raise RuntimeError("stopped after the first table")

    with pytest.raises(RuntimeError):
        write_synthetic(spark, tmp_path, users=1, seed=0, reporter=Failing(None))
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", "old"]

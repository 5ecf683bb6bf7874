"""An incremental backfill equals a full one, and embeds only who changed."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from instructue_feast.runs.reader import read_run
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_spark.backfill import Backfill, BackfillRequest
from instructue_spark.report import Reporter
from tests.projects import AS_OF, NUM_USERS, load, make_project, write_table

pytestmark = pytest.mark.spark

NEXT_DAY = AS_OF + dt.timedelta(days=1)
TOLERANCE = 1e-6
"""Float32 vectors change in their last bits with the users they share a batch with."""


@pytest.fixture(scope="module")
def nights(spark, tmp_path_factory):
    """A full night, then a night with one new event, one new user and one erased user, incremental and in full."""
    folder = Path(tmp_path_factory.mktemp("nights"))
    make_project(folder, folder / "models")
    config = load(folder)
    store = OutputStore(config.output.path)

    def backfill(**values) -> Backfill:
        job = Backfill(spark, BackfillRequest(config=config, **values), Reporter(stream=None))
        job.run()
        return job

    backfill(as_of=AS_OF, run_id="first", incremental=True)
    rows = pq.read_table(folder / "raw" / "search").to_pylist()
    rows += [{"customer": "u1", "at": AS_OF + dt.timedelta(hours=3), "words": "an unheard-of thing"}]
    rows += [{"customer": "newcomer", "at": AS_OF, "words": "milk"}]
    write_table(folder, "search", rows)
    Tombstones(store).add(["u5"])
    backfill(as_of=NEXT_DAY, run_id="second", incremental=True)
    extract = store.read_json("runs", "second", "manifest.json")["extract_id"]
    backfill(as_of=NEXT_DAY, run_id="full", extract_id=extract, publish=False)
    return store


def manifest(store: OutputStore, run: str) -> dict:
    return store.read_json("runs", run, "manifest.json")


def vectors(store: OutputStore, run: str) -> dict[str, np.ndarray]:
    return {
        row["user_id"]: np.array([row["churn"], row["taste"]], np.float32) for row in read_run(store, run).to_pylist()
    }


def test_the_first_one_is_full_and_says_why(nights):
    assert manifest(nights, "first")["base_run"] is None
    assert nights.read_json("runs", "first", "ledger.json")["plan"]["full_reason"] == "nothing is published yet"


def test_it_equals_a_full_backfill(nights):
    ours, full = vectors(nights, "second"), vectors(nights, "full")
    assert set(ours) == set(full) == {f"u{user}" for user in range(NUM_USERS) if user != 5} | {"newcomer"}
    assert max(np.abs(ours[user] - full[user]).max() for user in full) < TOLERANCE
    assert np.abs(ours["u1"] - vectors(nights, "first")["u1"]).max() > 100 * TOLERANCE


def test_only_changed_users_are_embedded_and_the_others_keep_every_bit(nights):
    second = manifest(nights, "second")
    assert second["base_run"] == "first"
    assert 0 < second["carried"] < second["users"] - 1
    assert second["tokens"] < manifest(nights, "full")["tokens"]
    before, after = vectors(nights, "first"), vectors(nights, "second")
    identical = sum(np.array_equal(before[user], after[user]) for user in after if user in before)
    assert identical >= second["carried"]


def test_only_the_new_text_is_encoded(nights):
    assert manifest(nights, "second")["texts_encoded"] == 1


def test_carried_rows_have_the_new_as_of(nights):
    assert set(read_run(nights, "second").column("event_timestamp").to_pylist()) == {NEXT_DAY}

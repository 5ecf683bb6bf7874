"""The command line from raw tables to an online lookup, as a user runs it, with tiny models."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.projects import NUM_USERS, make_project, write_table

ROOT = Path(__file__).parents[2]
AS_OF = "2025-03-01T00:00:00Z"
SECRET_TEXT = "zanzibar vacation"
SECRET_USER = "user-4711-secret"

pytestmark = pytest.mark.spark


def instructue(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from instructue_feast.cli.main import run; run()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A project that is a Feast repo, with one secret user and one secret text."""
    folder = tmp_path_factory.mktemp("shop")
    make_project(folder, tmp_path_factory.mktemp("models"), buckets=2)
    at = dt.datetime(2025, 2, 20, tzinfo=dt.UTC)
    write_table(folder, "search", [{"customer": SECRET_USER, "at": at, "words": SECRET_TEXT}])
    for name in ("feature_store.yaml", "definitions.py"):
        shutil.copy(ROOT / "feature_repo" / name, folder)
    return folder


@pytest.fixture(scope="module")
def backfilled(shop) -> dict:
    done = instructue(
        "backfill", "--as-of", AS_OF, "--run-id", "night-1", "--no-publish", "--cores", "2", "--json", cwd=shop
    )
    assert done.returncode == 0, done.stderr
    assert SECRET_TEXT not in done.stdout + done.stderr
    assert SECRET_USER not in done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_backfill_reports_its_run_and_stages(backfilled):
    assert backfilled["run"]["run_id"] == "night-1"
    assert backfilled["run"]["users"] == NUM_USERS + 1
    names = [stage["name"] for stage in backfilled["stages"]]
    assert names == ["sources", "history", "phrasebook", "encode", "soft_tokens", "embed", "audit"]
    assert all(stage["seconds"] > 0 for stage in backfilled["stages"])


def test_neither_texts_nor_user_ids_reach_the_log(shop, backfilled):
    log = (shop / "output" / "logs" / "backfill.log").read_text()
    assert log
    assert SECRET_TEXT not in log
    assert SECRET_USER not in log


def test_a_second_backfill_of_the_run_is_a_conflict(shop, backfilled):
    done = instructue("backfill", "--as-of", AS_OF, "--run-id", "night-1", "--cores", "2", cwd=shop)
    assert done.returncode == 7
    assert "night-1" in done.stderr
    assert "Hint:" in done.stderr


def test_publish_materialize_get(shop, backfilled):
    unserved = instructue("get", "u3", cwd=shop)
    assert unserved.returncode == 2
    assert "publish" in unserved.stderr
    published = instructue("publish", "night-1", "--json", cwd=shop)
    assert published.returncode == 0, published.stderr
    assert json.loads(published.stdout)["run_id"] == "night-1"
    materialized = instructue("materialize", "--json", cwd=shop)
    assert materialized.returncode == 0, materialized.stderr
    assert {view["rows"] for view in json.loads(materialized.stdout)} == {NUM_USERS + 1}
    got = instructue("get", "u3", "nobody", "--json", cwd=shop)
    assert got.returncode == 0, got.stderr
    known, unknown = json.loads(got.stdout)
    assert set(known["embeddings"]) == {"churn", "taste"}
    assert np.linalg.norm(known["embeddings"]["churn"]) == pytest.approx(1, abs=1e-4)
    assert known["as_of"]["churn"].startswith("2025-03-01")
    assert unknown["embeddings"] == {"churn": None, "taste": None}
    table = instructue("get", "u3", "--instruction", "taste", cwd=shop)
    assert "taste" in table.stdout
    assert "churn" not in table.stdout
    wrong = instructue("get", "u3", "--instruction", "tast", cwd=shop)
    assert wrong.returncode == 2
    assert "did you mean taste" in wrong.stderr


def test_a_missing_column_is_named_with_those_that_exist(shop):
    config = (shop / "instructue.yaml").read_text().replace('"looked for {words}"', '"looked for {wordz}"')
    (shop / "wrong.yaml").write_text(config)
    done = instructue("extract", "--config", "wrong.yaml", "--as-of", AS_OF, "--json", cwd=shop)
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert "wordz" in error["message"]
    assert "words" in error["message"] + error["hint"]

"""The stock `feast` command line works in the repo, from any folder and in any time zone, and exits cleanly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.session import open_store
from instructue_feast.runs.publish import publish
from tests.fake_runs import unit_vectors, write_fake_run, write_feast_repo

ROOT = Path(__file__).parents[2]
TOKYO = {**os.environ, "TZ": "Asia/Tokyo"}


def feast(repo, *arguments):
    command = [Path(sys.executable).with_name("feast"), "-c", str(repo), *arguments]
    done = subprocess.run(command, cwd="/", env=TOKYO, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert "nanobind" not in said
    return said


def test_the_project_applies_with_nothing_published(tmp_path):
    repo = tmp_path / "feature_repo"
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("data"))
    (repo / "data").mkdir()
    (repo / "data" / "not_ours.py").write_text("raise RuntimeError('.feastignore keeps this out')\n")
    said = feast(repo, "apply")
    assert [one.name for one in open_store(repo).list_entities()] == ["user"]
    assert "Nothing is published" in said


SCRIPT = """
import json, sys
import pandas as pd
from instructue_feast.feature_store.lookup import UserEmbeddings
embeddings = UserEmbeddings(sys.argv[1])
found = embeddings.get(["user-0001"], ["churn"])
store = embeddings.store
times = ["2017-09-30T23:59:59Z", "2017-10-01T00:00:00Z"]
asked = pd.DataFrame({"user_id": ["user-0001"] * 2, "event_timestamp": pd.to_datetime(times, utc=True)})
frame = store.get_historical_features(asked, store.get_feature_service("user_embeddings")).to_df()
known = [value is not None for value in frame.sort_values("event_timestamp")["churn"]]
print(json.dumps({"as_of": str(found.as_of["churn"][0]), "history": known}))
"""


def test_stock_apply_and_materialize_far_from_utc_serve_the_right_times(tmp_path):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo)
    publication = publish(store, write_fake_run(store))
    feast(repo, "apply")
    assert {one.name for one in open_store(repo).list_feature_views()} == set(publication.current.values())
    # Wide enough in UTC only: nine hours off would leave the rows out.
    said = feast(repo, "materialize", "2017-09-30T23:00:00", "2017-10-01T01:00:00")
    assert f"{publication.current['churn']}: 12 rows written" in said
    assert "12/12" in said  # the progress bar
    found = UserEmbeddings(repo).get(["user-0001"], ["churn"])
    np.testing.assert_array_equal(found.vectors["churn"], unit_vectors(0, ["user-0001"], "churn"))
    # Written in Tokyo, read here and there.
    assert found.as_of["churn"][0] == np.datetime64("2017-10-01T00:00:00")
    command = [sys.executable, "-c", SCRIPT, str(repo)]
    done = subprocess.run(command, env=TOKYO, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"as_of": "2017-10-01T00:00:00.000000", "history": [False, True]}

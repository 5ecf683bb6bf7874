"""An erasure that is killed between writing a file and moving it into place."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pytest

from instructue_feast.runs.erase import erase_files, find_in_files, matching
from instructue_feast.runs.manifest import parse_as_of
from instructue_feast.runs.publish import publish
from instructue_feast.runs.reader import read_run, run_manifest
from instructue_feast.runs.rollback import rollback
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_feast.runs.writer import finish_run, finished_buckets, write_bucket
from tests.fake_runs import bucket_table, fake_manifest, write_fake_run
from tests.runs.test_rollback import DAYS, write_histories

USERS = ["anna", "otto"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("area", ["extracts", "runs", "published"])
def test_what_it_leaves_is_no_data_and_goes_with_the_next_one(tmp_path, monkeypatch, area):
    store = OutputStore(str(tmp_path))
    write_histories(store, USERS)
    first, second = (write_fake_run(store, day, users=USERS, buckets=1) for day in DAYS[:2])
    publish(store, first)
    publish(store, second)
    with monkeypatch.context() as patched:
        patched.setattr("instructue_feast.runs.erase._AREAS", (area,))
        patched.setattr(Path, "replace", interrupted)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            erase_files(store, matching(["anna"]))
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    (left,) = [path for path in files if ".parquet." in path.name]
    assert left.relative_to(tmp_path).parts[0] == area
    history = ds.dataset(store.path("extracts", "extract", "history", "bucket=0"), format="parquet")
    assert history.count_rows() == len(USERS)
    assert read_run(store, second).num_rows == len(USERS)
    publish(store, write_fake_run(store, DAYS[2], users=USERS, buckets=1))
    Tombstones(store).add(["stranger"])
    rollback(store)
    erase_files(store, matching(["anna"]))
    assert not left.exists()
    assert find_in_files(store, matching(["anna"])).erased == 0


def test_what_a_killed_worker_left_in_a_finished_run_holds_nobody_afterwards(tmp_path, monkeypatch):
    store = OutputStore(str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupted)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_fake_run(store, DAYS[0], users=USERS, buckets=1)
    run = write_fake_run(store, DAYS[0], users=USERS, buckets=1)
    (left,) = tmp_path.rglob("*.tmp")
    assert left.parts[-3] == run
    erase_files(store, matching(["anna"]))
    assert not left.exists()
    assert read_run(store, run).column("user_id").to_pylist() == ["otto"]


def test_counts_of_who_was_carried_or_empty_never_exceed_who_is_left(tmp_path):
    store = OutputStore(str(tmp_path))
    as_of = parse_as_of(DAYS[0])
    write_bucket(store, "run", 0, bucket_table(USERS, as_of), tokens=1, seconds=0, carried=2, empty=2)
    write_bucket(store, "run", 1, bucket_table(["eve", "ida"], as_of), tokens=1, seconds=0, carried=1)
    finish_run(store, fake_manifest(store, "run", DAYS[0], carried=3, empty=2))
    erase_files(store, matching(["anna"]))
    manifest = run_manifest(store, "run")
    assert [(one.rows, one.carried, one.empty) for one in manifest.buckets] == [(1, 1, 1), (2, 1, 0)]
    assert (manifest.users, manifest.carried, manifest.empty) == (3, 2, 1)
    assert manifest.buckets == finished_buckets(store, "run")

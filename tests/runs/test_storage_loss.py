"""The storage fails at one operation after the other: readers see the old run or the new one, and a retry helps."""

from __future__ import annotations

import dataclasses

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from instructue_feast.errors import InstructueError
from instructue_feast.runs.ledger import Ledger, RunState, read_ledger, write_ledger
from instructue_feast.runs.publish import POINTER, current_publication, publish
from instructue_feast.runs.reader import finished_runs, read_run, run_manifest
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import write_fake_run
from tests.runs.test_ledger import PLAN

DAYS = ("2017-10-01T00:00:00Z", "2017-10-02T00:00:00Z")
LIMIT = 200


class FailingFileSystem(MemoryFileSystem):
    """A memory file system whose n-th write, copy or removal raises, and every one after it: the network is gone."""

    protocol = "failing"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    left = LIMIT

    def _count(self) -> None:
        FailingFileSystem.left -= 1
        if FailingFileSystem.left < 0:
            raise ConnectionResetError(104, "Connection reset by peer")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._count()
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def open(self, path, mode="rb", **kwargs):
        if "w" in mode:
            self._count()
        return super().open(path, mode, **kwargs)

    def cp_file(self, path1, path2, **kwargs):
        self._count()
        return super().cp_file(path1, path2, **kwargs)


@pytest.fixture
def store(monkeypatch, request) -> OutputStore:
    fs = FailingFileSystem(skip_instance_cache=True)
    monkeypatch.setattr(FailingFileSystem, "store", {})
    monkeypatch.setattr(FailingFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(FailingFileSystem, "left", LIMIT)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda root, **_: (fs, root.removeprefix("failing://")))
    return OutputStore("failing:///output")


def test_publishing_survives_the_loss_of_the_storage_at_every_operation(store):
    old = write_fake_run(store, DAYS[0], users=4, buckets=2, instructions=["taste"])
    publish(store, old)
    new = write_fake_run(store, DAYS[1], users=4, buckets=2, instructions=["taste"], seed=1)
    document = store.read_json(POINTER)
    failures = 0
    while True:
        FailingFileSystem.left = failures
        try:
            publish(store, new)
        except (InstructueError, OSError):
            failures += 1
            assert store.read_json(POINTER) == document
            FailingFileSystem.left = LIMIT
            assert current_publication(store).run_id == old
            continue
        break
    assert failures >= 5  # four files and two documents
    assert current_publication(store).run_id == new
    FailingFileSystem.left = LIMIT
    for view in current_publication(store).views:
        assert len(store.names("published", current_publication(store).id, view.name)) == 4


def test_a_run_whose_writing_was_interrupted_anywhere_is_complete_when_written_again(store):
    FailingFileSystem.left = LIMIT
    failures, seen = 0, set()
    while True:
        FailingFileSystem.left = failures
        try:
            run = write_fake_run(store, DAYS[0], users=4, buckets=2, instructions=["taste"])
        except (InstructueError, OSError):
            FailingFileSystem.left = LIMIT
            assert finished_runs(store) == []  # no reader takes a part for the whole
            seen.update(store.names("runs"))
            failures += 1
            continue
        break
    assert failures >= 5
    assert seen == {run}
    FailingFileSystem.left = LIMIT
    assert read_run(store, run).num_rows == run_manifest(store, run).users == 4


def test_a_ledger_is_the_old_one_or_the_new_one(store):
    ledger = Ledger(run_id="one", created=DAYS[0], plan=dataclasses.replace(PLAN)).with_state(RunState.PLANNED)
    write_ledger(store, ledger)
    FailingFileSystem.left = 0
    with pytest.raises((InstructueError, OSError)):
        write_ledger(store, ledger.with_state(RunState.RUNNING))
    FailingFileSystem.left = LIMIT
    assert read_ledger(store, "one") == ledger

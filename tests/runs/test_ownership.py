"""One live owner at a time; a dead one is succeeded at once here, and after its heartbeat is old elsewhere."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from instructue_feast.errors import RunConflictError, StorageError
from instructue_feast.runs import ownership
from instructue_feast.runs.ownership import STALE_AFTER_SECONDS, Owner, owner_of, still_owned, take
from instructue_feast.runs.store import OutputStore

FOLDER = ("runs", "one")


@pytest.fixture(params=["{tmp}", "memory://owner-{name}"])
def store(request, tmp_path) -> OutputStore:
    return OutputStore(request.param.format(tmp=tmp_path, name=tmp_path.name))


def owned_by(store: OutputStore, *, beat_ago: float | None = None, **changes: object) -> Owner:
    owner = dataclasses.replace(Owner.of_this_process(), **changes)
    store.write_json(dataclasses.asdict(owner), *FOLDER, "owner.json")
    if beat_ago is not None:
        at = datetime.now(UTC) - timedelta(seconds=beat_ago)
        store.write_json({"token": owner.token, "at": at.isoformat()}, *FOLDER, "heartbeat.json")
    return owner


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_has_one_owner_until_it_is_released(store):
    lease = take(store, *FOLDER)
    assert still_owned(store, lease.token, *FOLDER)
    with pytest.raises(RunConflictError, match=r"belongs to another process: process \d+ on .*, since 2"):
        take(store, *FOLDER)
    lease.release()
    assert owner_of(store, *FOLDER) is None
    assert take(store, *FOLDER).previous is None


def test_a_dead_process_of_this_machine_is_succeeded_at_once(store):
    dead = owned_by(store, pid=dead_pid(), beat_ago=0)
    lease = take(store, *FOLDER)
    assert lease.previous == dead
    lease.check()


def test_another_process_with_the_pid_of_the_dead_one_does_not_bring_it_back(store):
    owned_by(store, born="1", beat_ago=0)
    take(store, *FOLDER).check()


@pytest.mark.parametrize(("ago", "live"), [(STALE_AFTER_SECONDS / 2, True), (STALE_AFTER_SECONDS * 2, False)])
def test_an_owner_elsewhere_lives_as_long_as_its_heartbeat_is_young(store, ago, live):
    owned_by(store, place="another machine", host="worker-7", beat_ago=ago)
    if live:
        with pytest.raises(RunConflictError, match="worker-7"):
            take(store, *FOLDER)
    else:
        take(store, *FOLDER).check()


def test_an_owner_elsewhere_lives_before_its_first_heartbeat(store):
    owned_by(store, place="another machine", host="worker-7")
    with pytest.raises(RunConflictError, match="worker-7"):
        take(store, *FOLDER)


def test_a_read_that_fails_once_is_no_takeover(store, monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.01)
    lease = take(store, *FOLDER)
    with monkeypatch.context() as patched:
        patched.setattr(store, "read_json", failing)
        with pytest.raises(StorageError, match="cannot read"):
            lease.check()
        time.sleep(0.1)
    before = store.read_json(*FOLDER, "heartbeat.json")
    for _ in range(500):
        if store.read_json(*FOLDER, "heartbeat.json") != before:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("its heart has stopped")
    lease.check()
    lease.release()


def failing(*parts: str) -> dict:
    raise StorageError(f"cannot read {parts[-1]}", "mend it")


def test_who_was_taken_over_notices_and_does_not_release_the_other_one(store):
    first = take(store, *FOLDER)
    second = owned_by(store)
    with pytest.raises(RunConflictError, match="taken over"):
        first.check()
    first.release()
    assert owner_of(store, *FOLDER) == second


def test_workers_of_a_revoked_lease_may_not_write_and_nobody_else_gets_the_folder(store):
    lease = take(store, *FOLDER)
    token = lease.token
    lease.revoke()
    assert not still_owned(store, token, *FOLDER)
    lease.check()
    with pytest.raises(RunConflictError, match="belongs to another process"):
        take(store, *FOLDER)


def test_on_a_full_disk_a_lease_cannot_be_revoked_but_its_folder_goes(store, monkeypatch):
    lease = take(store, *FOLDER)
    store.write_json({}, *FOLDER, "ledger.json")

    def full(*_: object) -> None:
        raise StorageError("no space left", "free some")

    monkeypatch.setattr(store, "write_json", full)
    lease.revoke()
    lease.check()
    lease.remove()
    assert store.names(*FOLDER) == []


def test_a_removal_that_fails_once_is_tried_again_and_one_that_never_works_gives_the_folder_up(store, monkeypatch):
    remove, failures = store.remove, [OSError(39, "Directory not empty")]

    def flaky(*parts: str) -> None:
        if failures:
            raise failures.pop()
        remove(*parts)

    lease = take(store, *FOLDER)
    store.write_json({}, *FOLDER, "bucket=00000", "marker.json")
    monkeypatch.setattr(store, "remove", flaky)
    assert lease.remove()
    lease = take(store, *FOLDER)
    store.write_json({}, *FOLDER, "bucket=00000", "marker.json")
    failures += [OSError(39, "Directory not empty")] * 10
    assert not lease.remove()
    assert owner_of(store, *FOLDER) is None
    assert store.exists(*FOLDER, "bucket=00000", "marker.json")


def test_nobody_gets_a_folder_that_is_being_removed(store, monkeypatch):
    lease = take(store, *FOLDER)
    store.write_json({}, *FOLDER, "bucket=00000", "marker.json")
    refused = []
    remove = store.remove

    def removing(*parts: str) -> None:
        with pytest.raises(RunConflictError):
            take(store, *FOLDER)
        refused.append(parts)
        remove(*parts)

    monkeypatch.setattr(store, "remove", removing)
    lease.remove()
    assert refused == [(*FOLDER, "bucket=00000")]
    assert store.names(*FOLDER) == []
    assert not (store.is_local and store.exists(*FOLDER))
    take(store, *FOLDER).check()


def test_who_was_taken_over_does_not_remove_what_is_another_ones(store):
    lease = take(store, *FOLDER)
    store.write_json({}, *FOLDER, "ledger.json")
    other = owned_by(store)
    lease.remove()
    assert store.exists(*FOLDER, "ledger.json")
    assert owner_of(store, *FOLDER) == other


def test_who_waits_for_a_folder_that_is_removed_gets_a_new_one(tmp_path):
    store = OutputStore(str(tmp_path))
    first = take(store, *FOLDER)
    taken, waiting = [], threading.Event()

    def wait() -> None:
        waiting.set()
        while not taken:
            with suppress(RunConflictError):
                taken.append(take(store, *FOLDER))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    first.remove()
    thread.join(10)
    taken[0].check()


def test_a_folder_that_vanishes_while_its_owner_is_noted_is_an_error_and_not_tried_for_ever(store, monkeypatch):
    def vanished(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(store, "write_json", vanished)
    with pytest.raises(FileNotFoundError):
        take(store, *FOLDER)


def test_an_owner_that_died_while_it_wrote_its_name_is_dead(tmp_path):
    store = OutputStore(str(tmp_path))
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "owner.json").write_text('{"pid": 1')
    take(store, *FOLDER).check()

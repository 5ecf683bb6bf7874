"""Garbage is what nobody needs: it is found by what refers to it, and nothing else is ever removed."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from instructue_feast.errors import ConfigError
from instructue_feast.runs.collect import CollectOptions, find_garbage, remove_garbage
from instructue_feast.runs.ledger import Ledger, RunState, write_ledger
from instructue_feast.runs.ownership import take
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.reader import read_run
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import INSTRUCTIONS, write_fake_run
from tests.runs.test_ledger import PLAN

DAYS = [f"2017-10-0{day}T00:00:00Z" for day in range(1, 6)]
OPTIONS = CollectOptions(grace=timedelta(days=7), keep_publications=1)


@pytest.fixture
def store(tmp_path) -> OutputStore:
    return OutputStore(str(tmp_path))


def age(store: OutputStore, *folder: str, days: float = 30) -> None:
    """Makes everything below a folder look old."""
    moment = (datetime.now(UTC) - timedelta(days=days)).timestamp()
    root = Path(store.path(*folder))
    for path in [root, *root.rglob("*")]:
        os.utime(path, (moment, moment))


def write_extract(store: OutputStore, name: str, *, finished: bool = True) -> None:
    store.write_json({}, "extracts", name, "history", "data.json")
    if finished:
        store.write_json({}, "extracts", name, "manifest.json")


def unfinished(store: OutputStore, run_id: str, **plan: object) -> None:
    """A run that failed while it embedded, with an extract of its own."""
    ledger = Ledger(run_id=run_id, created=DAYS[0], plan=dataclasses.replace(PLAN, **plan), extract_id=f"{run_id}-x")
    for state in (RunState.PLANNED, RunState.RUNNING, RunState.FAILED):
        ledger = ledger.with_state(state)
    write_ledger(store, ledger)
    write_extract(store, f"{run_id}-x")


def found(store: OutputStore, **options: object) -> dict[str, str]:
    return {one.name: one.reason for one in find_garbage(store, dataclasses.replace(OPTIONS, **options))}


def test_everything_of_a_published_project_stays(store):
    for day in DAYS[:3]:
        publish(store, write_fake_run(store, day))
    age(store)
    assert set(found(store)) == {f"published/{name}" for name in store.names("published")[:-1]}


def test_a_failed_run_goes_with_its_extract_once_it_is_old(store):
    unfinished(store, "night-1")
    assert found(store) == {}
    age(store)
    assert set(found(store)) == {"runs/night-1", "extracts/night-1-x"}
    removed = remove_garbage(store, find_garbage(store, OPTIONS), OPTIONS)
    assert len(removed) == 2
    assert store.names("runs") == store.names("extracts") == []


def test_a_run_somebody_works_on_stays_however_old_it_looks(store):
    unfinished(store, "night-1")
    lease = take(store, "runs", "night-1")
    age(store)
    assert found(store) == {}
    lease.release()
    age(store)
    garbage = find_garbage(store, OPTIONS)
    take(store, "runs", "night-1")  # resumed between the listing and the removal
    assert remove_garbage(store, garbage, OPTIONS) == []
    assert store.exists("runs", "night-1", "ledger.json")


def test_the_base_of_an_unfinished_incremental_run_stays(store):
    base = write_fake_run(store, DAYS[0])
    age(store)
    assert f"runs/{base}" in found(store, unpublished=True)
    unfinished(store, "night-2", base_run=base)
    assert f"runs/{base}" not in found(store, unpublished=True)


def test_unpublished_runs_and_lone_extracts_only_go_on_demand(store):
    run = write_fake_run(store, DAYS[0])
    write_extract(store, "lone")
    write_extract(store, "half", finished=False)
    age(store)
    assert set(found(store)) == {"extracts/half"}
    assert set(found(store, unpublished=True)) == {"extracts/half", f"runs/{run}"}
    assert set(found(store, extracts=True)) == {"extracts/half", "extracts/lone"}


def test_the_run_a_view_before_is_looked_up_with_keeps_its_folder(store):
    before = write_fake_run(store, DAYS[0])
    newer = [write_fake_run(store, day, versions=dict.fromkeys(INSTRUCTIONS, "v2")) for day in DAYS[1:3]]
    for run in (before, *newer):
        publish(store, run)
    age(store)
    assert {name for name in found(store, keep_folders=1) if name.startswith("runs/")} == {f"runs/{newer[0]}"}


def test_old_published_runs_can_do_without_their_folder(store):
    runs = [write_fake_run(store, day, seed=seed) for seed, day in enumerate(DAYS[:3])]
    for run in runs:
        publish(store, run)
    age(store)
    options = dataclasses.replace(OPTIONS, keep_folders=1)
    garbage = [one for one in find_garbage(store, options) if one.kind == "run"]
    assert {one.folder[1] for one in garbage} == set(runs[:2])
    remove_garbage(store, garbage, options)
    publication = current_publication(store)
    view = publication.current_views[0]
    assert [run.run_id for run in view.runs] == runs
    files = store.names("published", publication.id, view.name)
    assert len(files) == sum(run.files for run in view.runs)
    assert read_run(store, runs[2]).num_rows == 12


def test_a_grace_period_that_could_hit_a_running_job_is_refused():
    with pytest.raises(ConfigError, match="too short"):
        CollectOptions(grace=timedelta(0))


def test_vectors_of_a_writer_that_died_go_and_complete_ones_stay(store):
    store.write_json({}, "event_vectors", "v", "dead", "part.json")
    store.write_json({}, "event_vectors", "v", "done", "_SUCCESS")
    age(store)
    assert found(store) == {"event_vectors/v/dead": "its writer died"}

from __future__ import annotations

import dataclasses

import pytest

from instructue_feast.errors import ConfigError, RunConflictError, SchemaError
from instructue_feast.runs.ledger import (
    Ledger,
    Plan,
    RunState,
    note_published,
    read_ledger,
    resolve_run,
    unfinished_runs,
    write_ledger,
)
from instructue_feast.runs.manifest import RunInstruction
from instructue_feast.runs.store import OutputStore

PLAN = Plan(
    as_of="2025-03-01T00:00:00+00:00", project="shop", history_digest="h", model_version="m", trained=True,
    embedding_dim=8, buckets=4,
    instructions=[RunInstruction(id="churn", text="Leaving?", content_hash="c", embedding_version="e")],
)  # fmt: skip


def ledger(run_id: str, *states: RunState, **plan: object) -> Ledger:
    made = Ledger(run_id=run_id, created="2025-03-01T00:00:00+00:00", plan=dataclasses.replace(PLAN, **plan))
    for state in (RunState.PLANNED, *states):
        made = made.with_state(state)
    return made


FINISHED = (RunState.RUNNING, RunState.WRITTEN, RunState.AUDITED)


def test_a_ledger_comes_back_as_it_was_written(tmp_path):
    store = OutputStore(str(tmp_path))
    write_ledger(store, ledger("one", RunState.RUNNING, RunState.FAILED))
    found = read_ledger(store, "one")
    assert found is not None
    assert found.plan == PLAN
    assert found.state is RunState.FAILED
    assert [step.state for step in found.steps] == ["planned", "running", "failed"]
    assert read_ledger(store, "two") is None


def test_a_run_cannot_skip_the_audit():
    with pytest.raises(RunConflictError, match="written and cannot become published"):
        ledger("one", RunState.RUNNING, RunState.WRITTEN).with_state(RunState.PUBLISHED)


def test_publishing_a_run_supersedes_the_one_before(tmp_path):
    store = OutputStore(str(tmp_path))
    for name in ("one", "two"):
        write_ledger(store, ledger(name, *FINISHED))
    note_published(store, "one", None)
    note_published(store, "two", "one")
    assert [read_ledger(store, name).state for name in ("one", "two")] == ["superseded", "published"]
    note_published(store, "one", "two")
    assert [read_ledger(store, name).state for name in ("one", "two")] == ["published", "superseded"]


def test_a_run_whose_publisher_died_before_it_could_say_so_is_superseded_all_the_same(tmp_path):
    store = OutputStore(str(tmp_path))
    for name in ("one", "two"):
        write_ledger(store, ledger(name, *FINISHED))
    note_published(store, "two", "one")
    assert read_ledger(store, "one").state is RunState.SUPERSEDED
    assert unfinished_runs(store) == []


def test_latest_is_the_unfinished_run_that_was_touched_last(tmp_path):
    store = OutputStore(str(tmp_path))
    with pytest.raises(ConfigError, match="no run is unfinished"):
        resolve_run(store, "latest")
    write_ledger(store, ledger("b-first", RunState.RUNNING))
    write_ledger(store, ledger("a-second", RunState.RUNNING, RunState.FAILED))
    write_ledger(store, ledger("not-to-publish", *FINISHED, publish=False))
    write_ledger(store, ledger("done", *FINISHED, RunState.PUBLISHED))
    assert unfinished_runs(store) == ["b-first", "a-second"]
    assert resolve_run(store, "latest") == "a-second"
    with pytest.raises(ConfigError, match="did you mean a-second"):
        resolve_run(store, "a-secnd")


def test_a_ledger_of_another_release_says_so(tmp_path):
    store = OutputStore(str(tmp_path))
    store.write_json({"plan": {}, "steps": []}, "runs", "one", "ledger.json")
    with pytest.raises(SchemaError, match="not a ledger"):
        read_ledger(store, "one")

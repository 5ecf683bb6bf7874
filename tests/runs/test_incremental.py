"""An incremental backfill starts from the published run, or says why it cannot."""

from __future__ import annotations

import dataclasses

import pytest

from instructue_feast.runs.incremental import choose_base
from instructue_feast.runs.ledger import Plan
from instructue_feast.runs.manifest import ExtractManifest, to_json
from instructue_feast.runs.publish import publish
from instructue_feast.runs.reader import run_manifest
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import write_fake_run

DAY = "2017-10-01T00:00:00Z"
EXTRACT = ExtractManifest(
    extract_id="extract", as_of="2017-10-01T00:00:00+00:00", created=DAY, history_digest="history", sources=["app"],
    buckets=3, users=12, events=0, distinct_texts=0, tokens=0, counts={}, seconds=0.0,
)  # fmt: skip


@pytest.fixture
def published(tmp_path) -> tuple[OutputStore, str, Plan]:
    """A published run with its extract, and a plan for the next one with the same settings."""
    store = OutputStore(str(tmp_path))
    run = write_fake_run(store, DAY)
    publish(store, run)
    store.write_json(to_json(EXTRACT), "extracts", "extract", "manifest.json")
    manifest = run_manifest(store, run)
    plan = Plan(
        as_of="2017-10-02T00:00:00+00:00", project="tests", history_digest="history", model_version="model",
        trained=False, embedding_dim=8, buckets=3, instructions=manifest.instructions,
    )  # fmt: skip
    return store, run, plan


def test_the_published_run_is_the_base(published):
    store, run, plan = published
    assert choose_base(store, plan) == (run, None)
    assert choose_base(store, dataclasses.replace(plan, instructions=plan.instructions[:1])) == (run, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"history_digest": "other"}, "the history settings or sources have changed"),
        ({"model_version": "other"}, "the model has changed"),
        ({"buckets": 4}, "`output.buckets` has changed from 3 to 4"),
    ],
)
def test_changed_settings_make_it_a_full_one(published, change, reason):
    store, _, plan = published
    assert choose_base(store, dataclasses.replace(plan, **change)) == (None, reason)


def test_a_reworded_instruction_is_named(published):
    store, _, plan = published
    reworded = dataclasses.replace(plan.instructions[1], embedding_version="other")
    changed = dataclasses.replace(plan, instructions=[plan.instructions[0], reworded])
    assert choose_base(store, changed) == (None, "instructions are new or have changed: next_basket")


def test_what_is_not_there_cannot_be_carried_over(published, tmp_path):
    store, run, plan = published
    assert choose_base(OutputStore(str(tmp_path / "empty")), plan) == (None, "nothing is published yet")
    store.remove("extracts", "extract")
    assert "extract extract of the published run is not on disk" in str(choose_base(store, plan)[1])
    store.remove("runs", run)
    assert choose_base(store, plan)[1] == f"the published run {run} is not on disk any more"

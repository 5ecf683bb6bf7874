"""`instructue runs`: what people and programs see of it."""

from __future__ import annotations

import json

import pytest

from instructue_feast.cli.main import main
from instructue_feast.runs.publish import current_publication
from tests.fake_runs import write_fake_run, write_feast_repo

DAYS = ("2017-10-01T00:00:00Z", "2017-10-02T00:00:00Z")


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """Two runs, published one after the other by the command line."""
    store = write_feast_repo(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = [write_fake_run(store, day, seed=seed) for seed, day in enumerate(DAYS)]
    for run in runs:
        assert main(["publish", run]) == 0
    capsys.readouterr()
    return store, runs


def as_json(capsys, *arguments: str):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_says_what_is_published(project, capsys):
    _, runs = project
    listed = as_json(capsys, "runs", "list")
    assert {one["run_id"]: one["state"] for one in listed} == {runs[0]: "superseded", runs[1]: "published"}
    assert main(["runs", "list"]) == 0
    assert "superseded" in capsys.readouterr().out


def test_show_has_gates_and_views(project, capsys):
    _, runs = project
    shown = as_json(capsys, "runs", "show", runs[1])
    assert shown["quality"]["passed"] is True
    assert shown["manifest"]["users"] == 12
    assert main(["runs", "show", runs[1]]) == 0
    output = capsys.readouterr().out
    assert "rows_ratio" in output
    assert "report.html" in output
    assert main(["runs", "show", "nosuch"]) == 2


def test_compare_counts_identical_users(project, capsys):
    _, runs = project
    same = as_json(capsys, "runs", "compare", runs[0], runs[0])
    assert same["same_digest"] is True
    assert [one["identical"] for one in same["instructions"]] == [12, 12, 12]
    other = as_json(capsys, "runs", "compare", runs[0], runs[1])
    assert other["same_digest"] is False
    assert [(one["identical"], one["users"]) for one in other["instructions"]] == [(0, 12)] * 3
    assert all(one["largest"] > 0.1 for one in other["instructions"])
    assert main(["runs", "compare", runs[0], runs[1]]) == 0
    assert "mean cosine" in capsys.readouterr().out


def test_rollback_and_back(project, capsys):
    store, runs = project
    assert as_json(capsys, "runs", "rollback")["run_id"] == runs[0]
    assert current_publication(store).run_id == runs[0]
    assert {one["run_id"]: one["state"] for one in as_json(capsys, "runs", "list")}[runs[0]] == "published"
    assert main(["runs", "rollback", runs[1]]) == 0
    assert current_publication(store).run_id == runs[1]


def test_gc_removes_nothing_unless_told_to(project, capsys):
    store, _ = project
    store.write_json({}, "extracts", "half", "data.json")
    assert main(["runs", "gc", "--grace-days", "0"]) == 2
    capsys.readouterr()
    assert as_json(capsys, "runs", "gc") == {"removed": False, "garbage": []}
    assert store.exists("extracts", "half")


def test_a_failed_gate_has_its_own_exit_code(project, capsys):
    store, runs = project
    run = write_fake_run(store, "2017-10-03T00:00:00Z", users=2)
    assert main(["publish", run]) == 11
    assert "--accept" in capsys.readouterr().err
    assert current_publication(store).run_id == runs[1]
    assert main(["publish", run, "--accept", "a pilot"]) == 0
    assert current_publication(store).run_id == run

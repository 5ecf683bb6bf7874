from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from instructue_feast.cli.eval import DEFAULT_FOLDER, _journey_project, _warn_of_old_model
from instructue_feast.cli.main import main
from instructue_feast.cli.project import Project
from instructue_feast.datasets.project import CHECKPOINT, STAMP, is_current, write_project
from instructue_feast.errors import ConfigError
from instructue_feast.evaluation.journey_tasks import journey_tasks
from instructue_feast.inference.soft_prompts import save_soft_prompt
from instructue_feast.instructions import Instruction
from instructue_feast.training.instruction_tuning import untuned_prompt
from tests.evaluation.small import random_journey, small_history, small_project


@pytest.fixture
def project(tmp_path, llm, encoder):
    small_project(tmp_path, llm, encoder, users=90)
    return tmp_path


def labels(folder, ids, values):
    file = folder / "labels.csv"
    file.write_text("user_id,label\n" + "".join(f"{one},{value}\n" for one, value in zip(ids, values, strict=True)))
    return file


def run(folder, file, *more):
    arguments = ["eval", "--config", str(folder / "instructue.yaml"), "--task", "vip", "--labels", str(file)]
    return main(
        [*arguments, "--instruction", "Is this a big spender?", "--json", str(folder / "out" / "vip.json"), *more]
    )


def test_a_custom_task_writes_figures_tables_and_pictures(project, capsys):
    history = small_history(90)
    values = (history.num_events[:, 0] > np.median(history.num_events[:, 0])).astype(int)
    assert run(project, labels(project, history.user_ids, values), "--rows", "logreg,ours", "--jobs", "1") == 0
    document = json.loads((project / "out" / "vip.json").read_text())
    (task,) = document["tasks"]
    assert task["instruction"] == "Is this a big spender?"
    assert (task["users"], task["positives"]) == (90, values.sum())
    assert set(task["rows"]) == {"logreg", "ours"}
    assert (project / "out" / "vip.md").read_text().startswith("# Evaluation: task vip")
    assert (project / "out" / "vip-tasks.png").is_file()
    output = capsys.readouterr()
    assert "logreg" in output.out
    assert "untrained" in output.out
    assert "never trained on" not in output.out
    assert "never trained on" not in (project / "out" / "vip.md").read_text(), "nobody knows that of a task of yours"
    assert not any(user in output.out + output.err for user in history.user_ids)


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["u001", "stranger"], [1, 0], "1 of 2 users are not among the 90"),
        (["u001", "u002"], [1, 7], "1 of 2 labels in column label are not binary"),
        (["u001", "u002"], [1, 1], "all 2 labels are 1"),
        (["u001", "u002"], [1, 0], "1 positives and 1 negatives"),
        ([], [], "no rows"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_without_naming_anybody(project, ids, values, message, capsys):
    assert run(project, labels(project, ids, values)) == 3
    error = capsys.readouterr().err
    assert message in error
    assert "stranger" not in error
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --suite or --task"),
        (["--suite", "synthetic", "--task", "vip"], "either --suite or --task"),
        (["--task", "vip"], "needs --instruction and --labels"),
        (["--suite", "complete-journey", "--rows", "ours,gdbt"], "unknown row 'gdbt'"),
        (["--task", "vip", "--instruction", "<USER> leaks", "--labels", "x.csv"], "prompt markup"),
    ],
)
def test_a_call_that_makes_no_sense_is_a_usage_error(arguments, message, capsys):
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_suite_takes_the_soft_prompts_that_are_named_or_that_the_model_brings(project, monkeypatch, capsys):
    journey = random_journey(150, seed=1, lines=14)
    monkeypatch.setattr("instructue_feast.evaluation.journey.read_journey", lambda _config: journey)
    found = []

    def measured(*inputs):
        found.append(dict(inputs[5].soft_prompts))
        raise ConfigError("enough")

    monkeypatch.setattr("instructue_feast.evaluation.suite.run_journey_suite", measured)
    opened = Project.open(str(project / "instructue.yaml"))
    model, own, named = opened.load_model(), project / "model" / "soft_prompts", project / "named"
    model.save_pretrained(own.parent)
    task = next(one for one in journey_tasks(journey, opened.config).tasks if one.name == "high_spend")
    suite = ["eval", "--suite", "complete-journey", "--config", opened.file, "--model", str(own.parent)]

    def evaluate(*more):
        assert main([*suite, *more]) == 2
        return list(found.pop())

    assert evaluate() == []  # the model brings none
    prompt = untuned_prompt(Instruction(task.name, task.instruction), model)
    save_soft_prompt(prompt, own / "high_spend.safetensors")
    assert evaluate() == ["high_spend"]
    assert evaluate("--tasks", "inactive_14d") == []  # none for this one
    save_soft_prompt(dataclasses.replace(prompt, text="Something else?"), own / "high_spend.safetensors")
    assert evaluate("--rows", "ours") == []
    assert main(suite) == 5
    assert "was tuned for the words 'Something else?'" in capsys.readouterr().err
    save_soft_prompt(prompt, named / "high_spend.safetensors")
    assert evaluate("--soft-prompts", str(named)) == ["high_spend"]
    assert main([*suite, "--soft-prompts", str(named), "--tasks", "inactive_14d"]) == 3
    assert "no soft prompt of any of 1 tasks" in capsys.readouterr().err


@pytest.fixture
def writing(tmp_path, monkeypatch):
    """Makes the data set no more than a project, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def write(root):
        return SimpleNamespace(rows={"bill": 1}, config=write_project(root, "complete_journey"))

    monkeypatch.setattr("instructue_feast.datasets.complete_journey.write_complete_journey", write)


def test_the_suites_own_project_is_made_again_when_another_package_made_it(writing, capsys):
    root = DEFAULT_FOLDER / "complete_journey"
    file = Path(_journey_project(DEFAULT_FOLDER))
    assert file == root / "instructue.yaml"
    (root / "mine").touch()
    _journey_project(DEFAULT_FOLDER)
    assert (root / "mine").is_file()
    (root / STAMP).unlink()  # as an older package, or one that was interrupted, left it
    capsys.readouterr()
    assert _journey_project(DEFAULT_FOLDER) == str(file)
    assert is_current(root, "complete_journey")
    (old,) = (one for one in DEFAULT_FOLDER.iterdir() if one != root)
    assert (old / "mine").is_file()
    assert "another version of this package" in capsys.readouterr().err


def test_a_project_elsewhere_is_never_touched(writing, tmp_path, capsys):
    _journey_project(tmp_path)
    (tmp_path / "complete_journey" / STAMP).unlink()
    before = sorted(tmp_path.rglob("*"))
    _journey_project(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert "remove it for a new one" in capsys.readouterr().err


def test_an_old_copy_of_the_shipped_model_is_named_and_kept(tmp_path, capsys):
    project = Project.open(str(write_project(tmp_path, "complete_journey")))
    _warn_of_old_model(project)
    assert capsys.readouterr().err == ""
    weights = tmp_path / CHECKPOINT / "model.safetensors"
    weights.write_bytes(b"old")
    (tmp_path / STAMP).unlink()
    _warn_of_old_model(project)
    assert "is older than the model that comes with this package" in capsys.readouterr().err
    assert weights.read_bytes() == b"old"
    _warn_of_old_model(Project.open(project.file, model=str(tmp_path / "models/mine")))
    assert capsys.readouterr().err == ""


def test_help_shows_an_example(capsys):
    assert main(["eval", "--help"]) == 0
    assert "Example: instructue eval --suite complete-journey" in capsys.readouterr().out

from __future__ import annotations

import json

import numpy as np
import pytest

from instructue_feast.cli.main import main
from tests.evaluation.small import small_history, small_project


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


def test_help_shows_an_example(capsys):
    assert main(["eval", "--help"]) == 0
    assert "Example: instructue eval --suite complete-journey" in capsys.readouterr().out

"""`instructue tune-instruction`: from a label file, or from a suite, to files that backfill and evaluation read."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from instructue_feast.cli.main import main
from instructue_feast.cli.project import Project
from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, VersionMismatchError
from instructue_feast.evaluation.journey_tasks import CUT, END, journey_tasks
from instructue_feast.evaluation.ours import load_soft_prompts
from instructue_feast.inference.soft_prompts import soft_prompts_of
from instructue_feast.model.factory import load_model
from instructue_feast.soft_prompt_file import read_soft_prompt
from tests.evaluation.small import random_journey, small_book, small_config, small_history, small_project, write_extract

USERS = 60


@pytest.fixture
def project(tmp_path, llm, encoder):
    small_project(tmp_path, llm, encoder, users=USERS)
    return tmp_path


@pytest.fixture
def labels(project):
    history = small_history(USERS)
    values = (history.num_events[:, 0] > np.median(history.num_events[:, 0])).astype(int)
    file = project / "labels.csv"
    rows = "".join(f"{one},{value}\n" for one, value in zip(history.user_ids, values, strict=True))
    file.write_text("user_id,label\n" + rows)
    return file


def tune(folder, *arguments):
    return main(["tune-instruction", "--config", str(folder / "instructue.yaml"), "--steps", "3", *arguments])


def test_labels_become_a_file_that_the_config_takes(project, labels, capsys):
    arguments = ["churn", "--labels", str(labels), "--shots", "12", "--yes", "Yes.", "--no", "No.", "--tokens", "2"]
    assert tune(project, *arguments, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["instructions"]
    assert report["auc"] >= report["auc_untuned"]
    assert (report["positive"], report["negative"]) == (12, 12)
    prompt = read_soft_prompt(str(project / "soft_prompts" / "churn.safetensors"))
    assert prompt.digest == report["digest"]
    assert prompt.text == "Will the user stop coming"
    assert len(prompt.vectors) in (0, 2)

    file = project / "instructue.yaml"
    file.write_text(
        file.read_text().replace("stop coming}", "stop coming, soft_prompt: soft_prompts/churn.safetensors}")
    )
    config = load_config(file)
    instruction = config.registry()["churn"]
    assert instruction.soft_prompt == prompt.digest
    found = soft_prompts_of(config, [instruction], load_model(config))
    assert set(found) == {instruction.content_hash}
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, seed=5))
    with pytest.raises(VersionMismatchError, match="tuned with model"):
        soft_prompts_of(other, [instruction], load_model(other))
    assert tune(project, *arguments) == 0  # again, with the old one in the config
    shown = capsys.readouterr()
    assert "soft_prompt:" in shown.out
    assert not any(user in shown.out + shown.err for user in small_history(USERS).user_ids)


def test_a_soft_prompt_of_other_words_is_refused(project, labels):
    assert tune(project, "churn", "--labels", str(labels), "--shots", "12") == 0
    file = project / "instructue.yaml"
    file.write_text(file.read_text().replace("stop coming}", "come back, soft_prompt: soft_prompts/churn.safetensors}"))
    with pytest.raises(VersionMismatchError, match="tuned for the words 'Will the user stop coming'"):
        load_config(file).registry()


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        (["u001,1", "stranger,0"], 3, "1 of 2 users are not among the 60"),
        (["u001,1", "u002,1"], 3, "all 2 labels are 1"),
        (["u001,1", "u002,0"], 3, "1 positive and 1 negative labels, 12 of each are needed"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_without_naming_anybody(project, rows, code, message, capsys):
    file = project / "few.csv"
    file.write_text("\n".join(["user_id,label", *rows]))
    assert tune(project, "churn", "--labels", str(file), "--shots", "12") == code
    error = capsys.readouterr().err
    assert message in error
    assert "stranger" not in error
    assert not (project / "soft_prompts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either an instruction or a --suite"),
        (["churn", "--suite", "complete-journey"], "either an instruction or a --suite"),
        (["churn"], "--labels is missing"),
        (["chrun", "--labels", "x.csv"], "did you mean churn"),
        (["churn", "--labels", "x.csv", "--yes", "Yes."], "--yes and --no belong together"),
    ],
)
def test_a_call_that_makes_no_sense_is_a_usage_error(project, arguments, message, capsys):
    assert tune(project, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def trained_through(monkeypatch):
    """Makes the model that commands load one that was trained up to a moment."""

    def until(moment):
        load = Project.load_model

        def trained(project):
            model = load(project)
            model.config.trained_through = moment
            return model

        monkeypatch.setattr(Project, "load_model", trained)

    return until


def test_labels_the_model_may_have_been_trained_on_are_noted_and_tuned_all_the_same(
    project, labels, trained_through, capsys
):
    arguments = ["churn", "--labels", str(labels), "--shots", "12"]
    assert tune(project, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []  # an untrained model knows nothing
    trained_through("2017-10-01T00:00:00+00:00")
    assert tune(project, *arguments) == 0  # the histories end where the training ended
    assert "optimistic" not in capsys.readouterr().out
    trained_through("2017-10-02T00:00:00+00:00")
    assert tune(project, *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "trained on events up to 2017-10-02T00:00:00+00:00, later than the histories' as_of 2017-10-01" in shown
    assert "optimistic" in shown


def test_a_suite_is_tuned_on_the_quarter_before_its_cut(tmp_path, llm, encoder, trained_through, monkeypatch, capsys):
    trained_through("2017-10-01T00:00:00+00:00")
    config = load_config(small_config(tmp_path, llm, encoder))
    journey = random_journey(150, seed=1, lines=14)
    monkeypatch.setattr("instructue_feast.evaluation.journey.read_journey", lambda _config: journey)
    earlier = small_history(150).as_of_us - 92 * 86_400_000_000  # 2017-07-01
    history = dataclasses.replace(small_history(150), user_ids=list(journey.user_ids), as_of_us=earlier)
    write_extract(config, history, small_book())
    manifest = tmp_path / "output" / "extracts" / "small" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("2017-10-01", "2017-07-01"))
    out = tmp_path / "tuned"
    assert tune(tmp_path, "--suite", "complete-journey", "--out", str(out), "--shots", "16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    tasks = journey_tasks(journey, config).tasks
    assert {one["instruction"] for one in found["instructions"]} | set(found["without_labels"]) == {
        task.name for task in tasks
    }
    assert found["instructions"]
    (note,) = found["notes"]  # the quarter before the cut is one the model was trained on
    assert "both figures are optimistic" in note
    prompts = load_soft_prompts(out, tasks, load_model(config))
    assert set(prompts) == {task.name for task in tasks}
    assert all(prompts[name].is_plain for name in found["without_labels"])
    suite = ["--suite", "complete-journey", "--out", str(out)]
    late = [*suite, "--as-of", "2017-08-01T00:00:00Z"]
    assert tune(tmp_path, *late) == 2
    assert "no label looks behind the cut" in capsys.readouterr().err


def test_an_earlier_quarter_is_as_long_as_the_one_the_suite_asks_about(tmp_path, llm, encoder, monkeypatch, capsys):
    """Labels of half a year would teach something else."""
    small_config(tmp_path, llm, encoder)
    journey = random_journey(150, seed=1, lines=14)
    monkeypatch.setattr("instructue_feast.evaluation.journey.read_journey", lambda _config: journey)
    spans = []

    def spied(journey, config, *, cut=CUT, end=END):
        spans.append((cut, end))
        if cut < CUT:
            raise ConfigError("enough")
        return journey_tasks(journey, config, cut=cut, end=end)

    monkeypatch.setattr("instructue_feast.evaluation.journey_tasks.journey_tasks", spied)
    assert tune(tmp_path, "--suite", "complete-journey", "--out", "x", "--as-of", "2017-04-01T00:00:00Z") == 2
    assert "enough" in capsys.readouterr().err
    start, end = spans[-1]
    assert (start.isoformat(), end - start) == ("2017-04-01T00:00:00+00:00", END - CUT)

"""`instructue ablate`: one command, one table, and an interruption costs one row at most."""

from __future__ import annotations

import dataclasses
import json

import pytest

from instructue_feast.cli import ablation_judges
from instructue_feast.cli.ablation_judges import Suite, make_judge
from instructue_feast.cli.main import main
from instructue_feast.cli.project import Project
from instructue_feast.config import load_config
from instructue_feast.datasets.project import write_project
from instructue_feast.errors import ConfigError, DataError
from instructue_feast.evaluation import journey as journey_module
from instructue_feast.training import run as training_run
from instructue_feast.training.run import load_training_data
from tests.evaluation.small import random_journey, small_book, small_history, write_extract
from tests.training.conftest import settings
from tests.training.test_train_command import SMALL, config  # noqa: F401

TASKS = "high_spend,buys_vitamins"


def command(config, folder, *more, **changes):  # noqa: F811
    values = [f"--set={name}={value}" for name, value in (SMALL | {"steps": 2} | changes).items()]
    return main(
        ["ablate", "--config", str(config), "--qa", "tiny", "--out", str(folder), "--jobs", "1", *values, *more]
    )


def read(folder):
    return json.loads((folder / "ablations.json").read_text())


@pytest.fixture
def journey(config, monkeypatch):  # noqa: F811
    """The project as one of The Complete Journey, with raw tables in memory and an extract at the cut."""
    found = random_journey(120, seed=1, lines=14)
    monkeypatch.setattr(journey_module, "read_journey", lambda _: found)
    history = dataclasses.replace(small_history(120), user_ids=list(found.user_ids))
    write_extract(load_config(config), history, small_book())


def test_the_table_of_a_suite_has_paired_differences_with_intervals(config, journey, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "table"
    assert command(config, folder, "--variants", "without_bill,no_llm", "--tasks", TASKS) == 0
    document = read(folder)
    full, *others = document["rows"]
    assert [full["variant"], *(one["variant"] for one in others)] == ["full", "no_llm", "without_bill"]
    assert document["suite"] == "complete-journey"
    assert document["baseline"]["mean"]["gbdt"]["auc"] > 0.5
    for row in document["rows"]:
        assert set(row["mean"]) == set(row["mean_unseen"]) == {"ours", "ours_none", "ours_mismatched", "ours_zeroshot"}
        assert {"contrastive_loss", "eval_auc_users", "seconds"} <= set(row["training"])
    for row in others:
        for means, key in (("mean", "difference"), ("mean_unseen", "difference_unseen")):
            own = row[key]["ours"]
            assert own["difference_low"] <= own["difference"] <= own["difference_high"]
            expected = row[means]["ours"]["auc"] - full[means]["ours"]["auc"]
            assert own["difference"] == pytest.approx(expected, abs=2e-5)
    assert any(row["difference"]["ours"]["difference"] for row in others)
    text = (folder / "ablations.md").read_text()
    assert "| `without_bill` | source `bill` never logged |" in text
    assert "| `gbdt` | baseline |" in text
    assert (folder / "ablations.png").stat().st_size > 5_000
    assert not list((folder / "models").glob("*.training"))
    assert "without_bill" in capsys.readouterr().out


def test_an_interrupted_table_goes_on_with_what_is_missing(config, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder, variants = tmp_path / "table", ("--variants", "no_focus_token")
    measured = ablation_judges.ValidationJudge.scores
    monkeypatch.setattr(
        ablation_judges.ValidationJudge, "scores", lambda self, model, variant: _interrupt(variant, self, measured)
    )
    assert command(config, folder, *variants) == 130
    assert [row["variant"] for row in read(folder)["rows"]] == ["full"]
    assert read(folder)["missing"] == ["no_focus_token"]
    rows = {one.name: one.stat().st_mtime_ns for one in (folder / "rows").glob("full*")}
    model = (folder / "models" / "no_focus_token-seed0" / "model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(ablation_judges.ValidationJudge, "scores", measured)
    assert command(config, folder, *variants) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert command(config, folder, *variants, "--resume", learning_rate=0.5) == 5
    assert "settings.learning_rate" in capsys.readouterr().err
    assert command(config, folder, *variants, "--resume", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == read(folder)
    assert [row["variant"] for row in document["rows"]] == ["full", "no_focus_token"]
    assert document["missing"] == []
    assert rows == {one.name: one.stat().st_mtime_ns for one in (folder / "rows").glob("full*")}
    assert model == (folder / "models" / "no_focus_token-seed0" / "model.safetensors").stat().st_mtime_ns

    assert command(config, folder, *variants, "--resume", "--seeds", "2") == 0
    full = read(folder)["rows"][0]
    assert full["seeds"] == [0, 1]
    assert full["training"]["eval_auc_users"] != document["rows"][0]["training"]["eval_auc_users"]


def _interrupt(variant, judge, measured):
    if variant.name != "full":
        raise KeyboardInterrupt
    return measured(judge, None, variant)


def test_an_interrupted_training_goes_on_from_its_checkpoint(config, tmp_path, monkeypatch):  # noqa: F811
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert command(config, whole, "--variants", "full") == 0
    train, resumed = training_run.train, []

    def stopped(*arguments, resume, **keywords):
        train(*arguments, resume=resume, stop_after=1, **keywords)
        raise KeyboardInterrupt

    def watched(*arguments, resume, **keywords):
        resumed.append(resume)
        return train(*arguments, resume=resume, **keywords)

    monkeypatch.setattr(training_run, "train", stopped)
    assert command(config, halves, "--variants", "full") == 130
    monkeypatch.setattr(training_run, "train", watched)
    assert command(config, halves, "--variants", "full", "--resume") == 0
    assert resumed == [True]
    digests = [json.loads((one / "models/full-seed0/training.json").read_text()) for one in (whole, halves)]
    assert digests[0]["weights_digest"] == digests[1]["weights_digest"]


def test_the_same_command_gives_the_same_figures(config, tmp_path):  # noqa: F811
    tables = []
    for name in ("one", "two"):
        assert command(config, tmp_path / name, "--variants", "full") == 0
        tables.append(read(tmp_path / name)["rows"][0]["training"])
    for name in ("contrastive_loss", "autoregressive_loss", "eval_auc_users", "eval_auc_subjects"):
        assert tables[0][name] == tables[1][name]


def test_another_project_is_measured_by_validation(config, tmp_path):  # noqa: F811
    assert command(config, tmp_path / "table", "--variants", "shuffled_users", autoregressive_weight=0) == 0
    document = read(tmp_path / "table")
    assert document["suite"] == "validation"
    assert document["skipped"] == ["no_autoregressive"]
    full, control = document["rows"]
    moved = control["training"]["eval_auc_users"] - full["training"]["eval_auc_users"]
    assert control["validation_difference"]["auc_users"] == pytest.approx(moved, abs=2e-5)
    text = (tmp_path / "table" / "ablations.md").read_text()
    assert "AUC, held-out subjects" in text
    assert "would be the same as `full`: `no_autoregressive`" in text
    assert (tmp_path / "table" / "ablations.png").is_file()


def test_a_damaged_project_of_the_journey_is_not_taken_for_another_project(config, tmp_path, capsys):  # noqa: F811
    opened = Project.open(str(write_project(tmp_path / "journey", "complete_journey")))
    data, base = load_training_data(load_config(config), "tiny"), settings(validation_fraction=0.3)

    def judged(project=opened, suite=None):
        return make_judge(project, suite, data, base, None, 1)

    with pytest.raises(ConfigError, match="raw table of users is not a local folder"):
        judged()
    for name in ("users", *opened.config.sources):
        (tmp_path / "journey" / "raw" / name).mkdir(parents=True)
        (tmp_path / "journey" / "raw" / name / "part-0.parquet").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"raw table of users in .* cannot be read") as error:
        judged()
    assert "or pass --suite validation" in error.value.hint
    assert judged(suite=Suite.validation).suite is Suite.validation
    bill = dataclasses.replace(opened.config.sources["bill"], user_id="customer")
    sources = dict(opened.config.sources) | {"bill": bill}
    other = Project(opened.file, dataclasses.replace(opened.config, sources=sources))
    assert judged(other).suite is Suite.validation  # the paper's six sources, of another shop
    assert "Not a project of The Complete Journey (raw table of users" in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot be read"):
        judged(other, Suite.complete_journey)


def test_mistakes_are_explained(config, tmp_path, capsys):  # noqa: F811
    assert command(config, tmp_path / "t", "--variants", "no_lm") == 2
    assert "did you mean no_llm" in capsys.readouterr().err
    assert command(config, tmp_path / "t", validation_fraction=0) == 2
    assert "no user is held out" in capsys.readouterr().err
    assert command(config, tmp_path / "t", "--suite", "complete-journey") == 2
    assert "this suite is of The Complete Journey" in capsys.readouterr().err
    assert command(config, tmp_path / "t", "--resume") == 2
    assert "no table to go on with" in capsys.readouterr().err
    assert main(["ablate", "--config", str(config)]) == 2
    assert "--qa is missing" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_the_list_says_what_each_variant_leaves_out(config, capsys):  # noqa: F811
    assert main(["ablate", "--config", str(config), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "without_tabular" in shown
    assert "next-token loss only" in shown


def test_the_help_has_an_example(capsys):
    assert main(["ablate", "--help"]) == 0
    assert "Example: instructue ablate" in capsys.readouterr().out

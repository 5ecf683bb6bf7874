"""`instructue demo`: what it removes, and what its report says about the model."""

from __future__ import annotations

import base64
import json
from importlib.resources import files

import jinja2
import pytest

from instructue_feast.cli.demo import run_demo
from instructue_feast.cli.demo_quality import EVALUATION, ROW_WORDS, read_quality
from instructue_feast.cli.demo_report import _scatter
from instructue_feast.cli.main import main
from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.evaluation.suite import ROWS
from tests.model_data import make_model

AUC = {"auc": 0.75, "auc_low": 0.7, "auc_high": 0.8}


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """A saved model, and what an evaluation of it says."""
    folder = tmp_path_factory.mktemp("measured") / "model"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        model.save_pretrained(folder)
        digest = model.weights_digest()
    rows = dict.fromkeys(("gbdt", "ours_mismatched", "ours", "ours_zeroshot", "ours_gbdt"), AUC)
    return folder, {
        "suite": "complete-journey",
        "tasks": [{"users": 2358}] * 3,
        "mean": rows,
        "mean_unseen": rows,
        "model": {"weights_digest": digest, "trained_through": "2017-10-01T00:00:00+00:00"},
    }


def quality_of(measured, **changes):
    folder, document = measured
    (folder / EVALUATION).write_text(json.dumps(document | changes))
    return read_quality(folder)


def page(quality):
    source = files("instructue_feast.cli").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    run = {"as_of": "", "run_id": "", "trained": True, "users": 1, "distinct_texts": 1, "texts_encoded": 1,
           "instructions": [], "embedding_dim": 128}  # fmt: skip
    return environment.from_string(source).render(
        run=run, extract={"events": 1, "counts": {}}, stages=[], total=1, lookup={"p50_ms": 1}, user="1", sections=[],
        parity={"users": 1, "max_difference": 0}, why="", quality=quality, scatters=[], neighbours=[],
    )  # fmt: skip


def shown_on(quality):
    return " ".join(page(quality).split())


@pytest.mark.usefixtures("_no_stage")
def test_a_model_of_the_users_own_survives_the_next_demo(tmp_path):
    (tmp_path / ".instructue-demo").write_text("")
    for name in ("models/mine", "models/complete-journey", "output", "data", "notes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    with pytest.raises(StopIteration):
        run_demo(tmp_path, 3, quiet=True)
    assert (tmp_path / "models" / "mine" / "file").exists()
    assert (tmp_path / "notes" / "file").exists()
    for name in ("models/complete-journey", "output", "data"):
        assert not (tmp_path / name).exists()


@pytest.fixture
def _no_stage(monkeypatch):
    def stop(*_, **__):
        raise StopIteration

    monkeypatch.setattr("instructue_feast.datasets.project.checkpoint_folder", lambda _: None)
    monkeypatch.setattr("instructue_feast.datasets.complete_journey.write_complete_journey", stop)


def test_a_damaged_evaluation_is_found_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / EVALUATION).write_text('{"suite": "complete-jou')
    monkeypatch.setattr("instructue_feast.datasets.project.checkpoint_folder", lambda _: tmp_path / "checkpoint")
    assert main(["demo", "--out", str(tmp_path / "demo"), "--households", "3"]) == 3
    said = capsys.readouterr().err
    assert str(tmp_path / "checkpoint" / EVALUATION) in said
    assert "instructue eval" in said
    assert not (tmp_path / "demo" / "raw").exists()


def test_an_evaluation_is_shown_in_words(measured):
    quality = quality_of(measured)
    assert base64.b64decode(quality.picture).startswith(b"\x89PNG")
    shown = shown_on(quality)
    assert "happened before 2017-10-01." in shown
    assert "2,358 households" in shown
    assert '0.750 <span class="small">[0.700, 0.800]</span>' in shown
    for row in ("gbdt", "ours_mismatched", "ours_zeroshot", "ours_gbdt"):
        assert f"<td>{ROW_WORDS[row]}</td>" in shown
        assert f"<td>{row}</td>" not in shown
    assert "Mean AUC by instruction" in shown


def test_every_row_of_an_evaluation_has_words():
    assert set(ROW_WORDS) == set(ROWS)
    assert len(set(ROW_WORDS.values())) == len(ROWS)


@pytest.mark.parametrize(
    ("row", "words"), [("gbdt", "LightGBM"), ("ours_gbdt", "stacked"), ("ours_zeroshot", "cosine")]
)
def test_a_row_without_a_linear_probe_says_so(row, words):
    assert words in ROW_WORDS[row]


def test_an_evaluation_of_few_rows_has_no_picture(measured):
    rows = {"gbdt": AUC, "ours": AUC}
    quality = quality_of(measured, mean=rows, mean_unseen={"ours": AUC})
    assert quality.picture == ""
    shown = shown_on(quality)
    assert ROW_WORDS["ours"] in shown
    assert "Mean AUC by instruction" not in shown


def test_a_model_that_does_not_know_when_its_training_ended_says_nothing_of_it(measured):
    _, document = measured
    quality = quality_of(measured, model=document["model"] | {"trained_through": None})
    assert "trained on what happened" not in shown_on(quality)
    noon = quality_of(measured, model=document["model"] | {"trained_through": "2017-10-01T12:00:00+00:00"})
    assert noon.trained_before == "2017-10-01 12:00"


def test_no_evaluation_is_no_section(tmp_path):
    assert read_quality(tmp_path) is None
    assert "How good" not in page(None)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mean": {"ours": {"auc": 0.5}}}, "no 'auc_low'"),
        ({"mean": {"ours": AUC | {"auc": float("nan")}}}, "not a number"),
        ({"mean": [1]}, "AttributeError"),
        ({"tasks": []}, "IndexError"),
        ({"model": {}}, "no 'weights_digest'"),
        ({"suite": "synthetic"}, "of the suite 'synthetic'"),
    ],
)
def test_an_evaluation_that_cannot_be_shown_names_its_file(measured, changes, what):
    with pytest.raises(DataError, match=what) as error:
        quality_of(measured, **changes)
    assert str(measured[0] / EVALUATION) in error.value.message
    assert "remove it" in error.value.hint


def test_an_evaluation_of_other_weights_is_refused(measured):
    _, document = measured
    with pytest.raises(VersionMismatchError, match="weights 123"):
        quality_of(measured, model=document["model"] | {"weights_digest": "123"})


def test_pictures_are_closed_and_take_words_as_words(measured):
    import numpy as np
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    quality_of(measured)
    users = [str(user) for user in range(9)]
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert _scatter(vectors, users, {user: ("$10% off $20", "snacks")[int(user) % 2] for user in users})
    assert plt.get_fignums() == before

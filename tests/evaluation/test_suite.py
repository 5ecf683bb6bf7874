from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, DataError
from instructue_feast.evaluation.custom import CUSTOM_ROWS, history_features, run_custom_task
from instructue_feast.evaluation.document import suite_document
from instructue_feast.evaluation.label_file import LabelFile
from instructue_feast.evaluation.plots import write_plots
from instructue_feast.evaluation.report import markdown
from instructue_feast.evaluation.suite import FEW_SHOT, ROWS, SuiteOptions, run_journey_suite
from instructue_feast.evaluation.tasks import Task
from tests.evaluation.small import random_journey, small_book, small_config, small_history
from tests.model_data import make_soft_prompt

TASKS = ("inactive_14d", "buys_vitamins")


@pytest.fixture
def config(tmp_path, llm, encoder):
    return load_config(small_config(tmp_path, llm, encoder))


@pytest.fixture
def inputs(config, model):
    journey = random_journey(150, seed=1, lines=14)
    history = dataclasses.replace(small_history(150), user_ids=list(journey.user_ids))
    return config, journey, model, history, small_book()


@pytest.fixture
def document(inputs):
    config, journey, model, history, book = inputs
    steps = []
    options = SuiteOptions(tasks=TASKS, noise=(1.0,), explain_users=3)
    result = run_journey_suite(config, journey, model, history, book, options, lambda *step: steps.append(step))
    assert ("ours", len(result.labelled.user_ids), len(result.labelled.user_ids)) in steps
    assert ("probes", 2, 2) in steps
    assert ("attributions", 3, 3) in steps
    found = suite_document(result, model, options, suite="complete-journey", data="Made up.")
    return json.loads(json.dumps(found, allow_nan=False))


def test_the_document_is_what_its_readers_rely_on(document, tmp_path):
    everywhere = set(ROWS) - set(FEW_SHOT)
    assert {task["name"] for task in document["tasks"]} == set(TASKS)
    for task in document["tasks"]:
        assert {"name", "family", "instruction", "positives", "users", "rows"} <= set(task)
        assert set(task["rows"]) == everywhere
        for row in task["rows"].values():
            assert set(row) == {"auc", "auc_low", "auc_high", "ks"}
            assert 0 <= row["auc_low"] <= row["auc"] <= row["auc_high"] <= 1
    for key in ("mean", "mean_unseen"):
        assert set(document[key]) == everywhere
        assert all(set(value) == {"auc", "auc_low", "auc_high"} for value in document[key].values())
    means = [task["rows"]["ours"]["auc"] for task in document["tasks"]]
    assert document["mean"]["ours"]["auc"] == pytest.approx(np.mean(means), abs=1e-4)
    unseen = [task["rows"]["gbdt"]["auc"] for task in document["tasks"] if task["unseen"]]
    assert len(unseen) == 1
    assert document["mean_unseen"]["gbdt"]["auc"] == pytest.approx(unseen[0], abs=1e-4)
    difference = document["differences"]["ours-gbdt"]["difference"]
    assert difference == pytest.approx(document["mean"]["ours"]["auc"] - document["mean"]["gbdt"]["auc"], abs=1e-4)
    drop = document["noise"]["1"]["drop"]["ours"]["difference"]
    noisy = document["noise"]["1"]["mean"]["ours"]["auc"]
    assert drop == pytest.approx(document["mean"]["ours"]["auc"] - noisy, abs=1e-4)
    agreement = document["attributions"]["agreement"]
    assert (agreement["users"], agreement["instructions"]) == (3, 2)
    assert agreement["mean_low"] <= agreement["mean"] <= agreement["mean_high"] <= 1
    assert "leave_one_out" in document["protocol"]["attributions"]
    assert document["model"]["trained"] is False
    assert document["seconds"]["total"] > 0

    text = markdown(document)
    assert "`ours_mismatched`" in text
    assert "buys_vitamins †" in text
    assert "never trained on (1)" in text
    assert "100% added" in text
    assert "of 3 users, under 2 instructions in turn" in text
    assert "Few labels" not in text, "no soft prompts, no few-shot row"
    value = {"difference": 0.03, "difference_low": 0.02, "difference_high": 0.04}
    few = {"mean": {"ours": 0.7, "ours_fewshot": 0.73}, "difference": value}
    few_labels = {"tasks": 2, "draws": 5, "by_labels_of_each_class": {"16": few}}
    text = markdown({**document, "few_labels": few_labels})
    assert "| labels of each class | `ours` | `ours_fewshot` | difference |" in text
    assert "| 16 | 0.700 | 0.730 | +0.030 [+0.020, +0.040] |" in text
    names = [file.name for file in write_plots(document, tmp_path / "cj")]
    assert names == ["cj-means.png", "cj-tasks.png", "cj-instructions.png", "cj-noise.png"]
    assert all((tmp_path / name).stat().st_size > 5_000 for name in names)


def test_only_the_rows_asked_for_are_computed(inputs):
    config, journey, model, history, book = inputs
    options = SuiteOptions(rows=("logreg", "ours"), tasks=TASKS[:1], noise=(), explain_users=0)
    result = run_journey_suite(config, journey, model, history, book, options)
    assert set(result.scores[0]) == {"logreg", "ours"}
    found = suite_document(result, model, options, suite="complete-journey", data="")
    assert found["mean_unseen"] == {}
    assert set(found["differences"]) == {"ours-logreg"}
    assert not {"attributions"} & {*found, *found["protocol"], *found["seconds"]}
    text = markdown(found)
    assert "Attributions" not in text
    assert not [mark for mark in ("never trained on", "†") if mark in text], "the one task was trained on"


def test_soft_prompts_give_a_few_shot_row_and_a_curve_by_number_of_labels(inputs, monkeypatch):
    config, journey, model, history, book = inputs
    monkeypatch.setattr("instructue_feast.evaluation.few_labels.COUNTS", (8,))
    prompt = make_soft_prompt(model)
    soft_prompts = dict.fromkeys(("high_spend", "inactive_14d"), prompt)
    options = SuiteOptions(
        rows=("ours", "ours_fewshot"), tasks=("high_spend", "inactive_14d"), noise=(), explain_users=0,
        soft_prompts=soft_prompts,
    )  # fmt: skip
    result = run_journey_suite(config, journey, model, history, book, options)
    found = suite_document(result, model, options, suite="complete-journey", data="")
    assert set(found["mean"]) == {"ours", "ours_fewshot"}
    (few,) = found["few_labels"]["by_labels_of_each_class"].values()
    assert set(few["mean"]) == {"ours", "ours_fewshot"}
    assert found["few_labels"]["tasks"] >= 1


def test_attributions_are_those_of_our_model(inputs):
    config, journey, model, history, book = inputs
    options = SuiteOptions(rows=("logreg",), tasks=TASKS[:1], noise=(), explain_users=3)
    assert run_journey_suite(config, journey, model, history, book, options).attributions is None


def test_an_unknown_row_or_task_names_those_there_are(inputs):
    with pytest.raises(ConfigError, match="unknown row 'ourz'") as caught:
        SuiteOptions(rows=("ourz",))
    assert "ours" in caught.value.hint
    with pytest.raises(ConfigError, match="explain_users is -1"):
        SuiteOptions(explain_users=-1)
    config, journey, model, history, book = inputs
    with pytest.raises(ConfigError, match="unknown task"):
        run_journey_suite(config, journey, model, history, book, SuiteOptions(tasks=("nope",)))


def test_a_household_without_history_is_counted(inputs):
    config, journey, model, history, book = inputs
    options = SuiteOptions(rows=("logreg",), tasks=TASKS[:1], noise=())
    with pytest.raises(DataError, match="users are not among the 100"):
        run_journey_suite(config, journey, model, history.take(range(100)), book, options)


def custom(config, model, history, label, **keywords):
    labels = LabelFile(tuple(history.user_ids), label)
    task = Task(name="vip", family="custom", subject="vip", instruction="Is this a big spender?", **keywords)
    options = SuiteOptions(noise=())
    return run_custom_task(config, model, history, small_book(), labels, task, options)


def test_a_task_of_ones_own_is_measured_without_training_the_encoder(config, model):
    history = small_history(140)
    label = (history.num_events[:, 0] > np.median(history.num_events[:, 0])).astype(np.int8)
    before = model.weights_digest()
    result = custom(config, model, history, label, answers=("Yes.", "No."))
    assert set(result.scores[0]) == set(CUSTOM_ROWS)
    assert result.scores[0]["gbdt"].auc > 0.95  # the label is one of the hand features
    assert result.scores[0]["ours"].auc > 0.6
    assert model.weights_digest() == before
    assert "ours_zeroshot" not in custom(config, model, history, label).scores[0]


def test_custom_labels_that_cannot_be_learned_are_refused(config, model):
    history = small_history(60)
    with pytest.raises(DataError, match="3 positives"):
        custom(config, model, history, (np.arange(60) < 3).astype(np.int8))


def test_history_features_hold_counts_recency_and_numbers(config):
    history = small_history(50)
    features = history_features(history, config)
    assert features.shape == (50, 3 + 3 + 3 + len(np.unique(history.text_id)))
    np.testing.assert_allclose(features[:, 0], np.log1p(history.num_events[:, 0]), rtol=1e-6)
    no_app = history.num_events[:, 1] == 0
    assert features[no_app, 4].min() > features[~no_app, 4].max()  # longer ago than any event

"""Probes with few labels: the same labelled users for every row, and only the others are tested."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from instructue_feast.evaluation.few_labels import measure_few_labels
from instructue_feast.evaluation.probes import linear_probe

USERS = 160
COUNTS = (8, 16)


@pytest.fixture
def task():
    """`clear` shows the label in every column, `faint` in one of twelve."""
    rng = np.random.default_rng(0)
    label = (rng.random(USERS) < 0.4).astype(np.int8)
    noise = rng.normal(size=(2, USERS, 12)).astype(np.float32)
    faint = noise[1].copy()
    faint[:, 0] += label
    return {"clear": noise[0] + label[:, None], "faint": faint}, label


def measure(task, **changes):
    features, label = task
    chosen = {"counts": COUNTS, "draws": 3} | changes
    return measure_few_labels(["a", "b"], [features] * 2, [label] * 2, **chosen)


def test_an_auc_is_that_of_a_probe_on_the_drawn_users_over_all_others(task):
    features, label = task
    found = measure(task)
    order = np.random.default_rng((0, 1, 2)).permutation(USERS)  # seed, task, draw
    known = np.concatenate([order[label[order] == one][:8] for one in (0, 1)])
    tested = np.ones(USERS, bool)
    tested[known] = False
    scores = linear_probe(features["faint"][known], label[known], features["faint"][tested])
    assert found.auc[8]["faint"][1, 2] == pytest.approx(roc_auc_score(label[tested], scores))
    assert found.auc[8]["faint"].shape == (2, 3)


def test_what_shows_the_label_plainly_needs_fewer_labels(task):
    document = measure(task).document("clear", "faint")
    assert (document["tasks"], list(document["by_labels_of_each_class"])) == (2, ["8", "16"])
    for own in document["by_labels_of_each_class"].values():
        value = own["difference"]
        assert 0 < value["difference_low"] < value["difference"] < value["difference_high"]
        assert value["difference"] == pytest.approx(own["mean"]["clear"] - own["mean"]["faint"], abs=2e-5)


def test_tasks_without_enough_users_are_left_out(task):
    features, label = task
    rare = (np.arange(USERS) < 40).astype(np.int8)
    found = measure_few_labels(["a", "b"], [features] * 2, [rare, label], counts=COUNTS, draws=2)
    assert found.tasks == ("b",)
    assert measure_few_labels(["a"], [features], [rare], counts=COUNTS) is None

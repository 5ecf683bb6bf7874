from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from instructue_feast.evaluation.metrics import fold_auc
from instructue_feast.evaluation.probes import assign_folds
from instructue_feast.evaluation.scoring import RowInput, difference, means, score_row, score_tasks


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(150, 5)).astype(np.float32)
    labels = [(features[:, at] + rng.normal(size=150) > 0).astype(np.int8) for at in (0, 1)]
    return features, labels


def test_a_score_is_taken_as_it_is_and_judged_in_the_same_folds(data):
    features, labels = data
    row = RowInput(method="score", features=features[:, :1])
    (found,) = score_tasks([{"zero": row}], labels[:1])
    assert np.array_equal(score_row(row, labels[0]), features[:, 0].astype(np.float64))
    expected = fold_auc(features[:, 0].astype(np.float64), labels[0], assign_folds(labels[0]))[0]
    assert found["zero"].auc == expected
    assert abs(expected - roc_auc_score(labels[0], features[:, 0])) < 0.05


def test_processes_do_not_change_a_figure(data):
    features, labels = data
    rows = [{"linear": RowInput(method="linear", features=features)}] * 2
    seen = []
    one = score_tasks(rows, labels, on_task=lambda done, total: seen.append((done, total)))
    two = score_tasks(rows, labels, jobs=2)
    assert seen == [(1, 2), (2, 2)]
    for a, b in zip(one, two, strict=True):
        assert a["linear"].auc == b["linear"].auc
        assert np.array_equal(a["linear"].auc_D, b["linear"].auc_D)
    assert means(one) == means(two)


def test_trees_with_an_embedding_use_both(data):
    features, labels = data
    rng = np.random.default_rng(1)
    nothing = rng.normal(size=(150, 3)).astype(np.float32)
    stacked = RowInput(method="stacked", features=nothing, embedding=features)
    (own,) = score_tasks([{"trees": RowInput(method="trees", features=nothing), "stacked": stacked}], labels[:1])
    assert own["stacked"].auc > own["trees"].auc + 0.1


def test_a_mean_needs_the_row_in_every_task_and_a_difference_only_both_rows(data):
    features, labels = data
    first, second = (
        RowInput(method="score", features=features[:, :1]),
        RowInput(method="score", features=features[:, 1:2]),
    )
    scores = score_tasks([{"a": first, "b": second}, {"a": first}], labels)
    assert set(means(scores)) == {"a"}
    assert means([]) == {}
    found = difference(scores, "a", "b")
    assert found is not None
    assert found["difference"] == pytest.approx(scores[0]["a"].auc - scores[0]["b"].auc, abs=1e-5)
    assert difference(scores, "a", "c") is None

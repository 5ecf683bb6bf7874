from __future__ import annotations

import builtins

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from instructue_feast.errors import MissingDependencyError
from instructue_feast.evaluation.metrics import fold_auc
from instructue_feast.evaluation.probes import (
    assign_folds,
    boosted_trees,
    linear_probe,
    out_of_fold,
    pca_probe,
    stacked_trees,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_folds_are_balanced_complete_and_reproducible():
    label = (np.arange(203) % 7 == 0).astype(np.int8)
    fold = assign_folds(label)
    positives = np.bincount(fold, label)
    assert set(fold) == set(range(5))
    assert positives.max() - positives.min() <= 1
    assert np.ptp(np.bincount(fold)) <= 2
    assert np.array_equal(fold, assign_folds(label))
    assert not np.array_equal(fold, assign_folds(label, seed=1))


def test_nobody_is_scored_by_a_model_that_has_seen_their_fold(rng):
    label = (rng.random(60) < 0.5).astype(np.int8)
    fold = assign_folds(label)
    ids = np.arange(60, dtype=np.float32)[:, None]
    seen = []

    def fit_predict(train, labels, test):
        assert np.array_equal(label[train[:, 0].astype(int)], labels)
        seen.append((set(train[:, 0]), set(test[:, 0])))
        return test[:, 0].astype(np.float64)

    scores = out_of_fold(fit_predict, ids, label, fold)
    assert np.array_equal(scores, np.arange(60))
    for train, test in seen:
        assert not train & test
        assert len(train | test) == 60
    assert len(seen) == 5


@pytest.mark.parametrize("probe", [linear_probe, pca_probe(16), boosted_trees, stacked_trees(20)])
def test_random_labels_cannot_be_predicted_however_many_features(probe, rng):
    aucs = []
    for _ in range(3):
        features = rng.normal(size=(250, 40)).astype(np.float32)
        label = (rng.random(250) < 0.5).astype(np.int8)
        fold = assign_folds(label)
        aucs.append(fold_auc(out_of_fold(probe, features, label, fold), label, fold)[0])
    assert 0.42 < np.mean(aucs) < 0.58


@pytest.mark.parametrize("probe", [linear_probe, pca_probe(20), boosted_trees, stacked_trees(10)])
def test_a_signal_is_found(probe, rng):
    features = rng.normal(size=(600, 20)).astype(np.float32)
    label = (features[:, -1] + features[:, 3] + rng.normal(0, 0.5, 600) > 0).astype(np.int8)
    fold = assign_folds(label)
    assert fold_auc(out_of_fold(probe, features, label, fold), label, fold)[0] > 0.85


@pytest.mark.parametrize("probe", [linear_probe, pca_probe(3), boosted_trees])
def test_what_a_test_user_scores_does_not_depend_on_other_test_users(probe, rng):
    features = rng.normal(size=(200, 6)).astype(np.float32)
    label = (features[:, 0] + rng.normal(size=200) > 0).astype(np.int8)
    test = rng.normal(size=(30, 6)).astype(np.float32)
    together = probe(features, label, test)
    with_outlier = probe(features, label, np.concatenate([test, np.full((1, 6), 1e6, np.float32)]))
    np.testing.assert_allclose(with_outlier[:-1], together, rtol=1e-5, atol=1e-6)


def test_scale_missing_values_and_constant_columns_do_not_matter(rng):
    features = rng.normal(size=(300, 4)).astype(np.float32)
    label = (features[:, 0] > 0).astype(np.int8)
    odd = np.column_stack([1000 * features + 5, np.full(300, 7.0), np.full(300, np.nan)]).astype(np.float32)
    odd[::50, 3] = np.nan
    scores = linear_probe(odd[:200], label[:200], odd[200:])
    assert np.isfinite(scores).all()
    assert roc_auc_score(label[200:], scores) > 0.97


def test_a_probe_can_be_tested_on_other_features_than_it_was_trained_with(rng):
    features = rng.normal(size=(300, 3)).astype(np.float32)
    label = (features[:, 0] > 0).astype(np.int8)
    fold = assign_folds(label)
    turned = out_of_fold(linear_probe, features, label, fold, -features)
    assert fold_auc(turned, label, fold)[0] < 0.05


def test_trees_without_lightgbm_say_what_to_install(rng, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == "lightgbm":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match="lightgbm"):
        boosted_trees(np.zeros((4, 1), np.float32), np.array([0, 1, 0, 1], np.int8), np.zeros((1, 1), np.float32))

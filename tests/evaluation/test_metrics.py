from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from instructue_feast.evaluation.metrics import (
    Estimate,
    RowScores,
    bootstrap_weights,
    fold_auc,
    fold_ks,
    mean_estimate,
    weighted_auc,
)


def scores_and_labels(seed: int, users: int, levels: int):
    """Scores with many ties, labels that follow them a little, and folds."""
    rng = np.random.default_rng(seed)
    score = rng.integers(0, levels, users).astype(float)
    label = (rng.random(users) < 0.2 + 0.5 * score / levels).astype(np.int8)
    return score, label, rng.integers(0, 3, users).astype(np.int32), rng


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 60), st.sampled_from([1, 2, 5, 1000]))
def test_a_weighted_auc_is_that_of_scikit_learn(seed, users, levels):
    score, label, _, rng = scores_and_labels(seed, users, levels)
    weight = rng.integers(0, 4, (7, users)).astype(np.float32)
    for own, auc in zip(weight, weighted_auc(score, label, weight), strict=True):
        if len(np.unique(label[own > 0])) < 2:
            assert np.isnan(auc)
        else:
            assert auc == pytest.approx(roc_auc_score(label, score, sample_weight=own), abs=1e-9)


def test_the_auc_of_a_row_is_the_mean_over_folds_and_ignores_how_folds_compare():
    score, label, fold, _ = scores_and_labels(0, 300, 50)
    expected = np.mean([roc_auc_score(label[fold == one], score[fold == one]) for one in range(3)])
    assert fold_auc(score, label, fold)[0] == pytest.approx(expected)
    assert fold_auc(score + 1000.0 * fold, label, fold)[0] == pytest.approx(expected)


def test_a_draw_counts_users_as_often_as_they_were_drawn():
    score, label, fold, _ = scores_and_labels(1, 120, 20)
    weight = bootstrap_weights(120, draws=20, seed=3)
    for own, auc in zip(weight, fold_auc(score, label, fold, weight), strict=True):
        drawn = np.repeat(np.arange(120), own.astype(int))
        slow = []
        for one in range(3):
            members = drawn[fold[drawn] == one]
            if len(np.unique(label[members])) == 2:
                slow.append(roc_auc_score(label[members], score[members]))
        assert auc == pytest.approx(np.mean(slow))


def test_draws_are_with_replacement_reproducible_and_of_full_size():
    weight = bootstrap_weights(400, draws=50, seed=1)
    assert np.array_equal(weight.sum(1), np.full(50, 400))
    assert 0.3 < (weight == 0).mean() < 0.44  # 1/e of the users are not in a draw
    assert np.array_equal(weight, bootstrap_weights(400, draws=50, seed=1))
    assert not np.array_equal(weight, bootstrap_weights(400, draws=50, seed=2))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 80), st.sampled_from([2, 7, 1000]))
def test_ks_of_one_fold_is_that_of_scipy(seed, users, levels):
    score, label, _, _ = scores_and_labels(seed, users, levels)
    label[:2] = [0, 1]
    expected = ks_2samp(score[label == 1], score[label == 0]).statistic
    assert fold_ks(score, label, np.zeros(users, np.int32)) == pytest.approx(expected)


def test_ks_does_not_depend_on_how_folds_compare():
    score, label, fold, _ = scores_and_labels(4, 400, 1000)
    assert fold_ks(score, label, fold) == fold_ks(score * (1 + fold) + 7 * fold, label, fold)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, hits, fold = 0.7602, 0, np.zeros(300, np.int32)  # of normals one standard deviation apart
    for _ in range(120):
        label = (np.arange(300) % 2).astype(np.int8)
        row = RowScores.of(rng.normal(label.astype(float)), label, fold, bootstrap_weights(300, draws=200))
        hits += row.estimate.low <= truth <= row.estimate.high
    assert 0.87 <= hits / 120 <= 1.0


def test_differences_are_paired():
    score, label, fold, rng = scores_and_labels(5, 300, 1000)
    weight = bootstrap_weights(300, draws=200)
    row = RowScores.of(score, label, fold, weight)
    worse = RowScores.of(score + rng.normal(0, 20, 300), label, fold, weight)
    assert mean_estimate([row, row], [row, row]) == Estimate(0.0, 0.0, 0.0)
    paired = mean_estimate([row], [worse])
    assert paired.value == pytest.approx(row.auc - worse.auc)
    unpaired = np.hypot(row.auc_D.std(), worse.auc_D.std())
    assert (paired.high - paired.low) / 3.92 < 0.5 * unpaired


def test_an_estimate_without_any_draw_is_nan():
    estimate = Estimate.of(0.5, np.full(10, np.nan))
    assert estimate.value == 0.5
    assert np.isnan(estimate.low)

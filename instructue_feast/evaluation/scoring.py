"""From features and labels to scores: every row of a task, out of fold, with one set of bootstrap draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from instructue_feast.evaluation.metrics import Float, Labels, RowScores, bootstrap_weights, mean_estimate
from instructue_feast.evaluation.probes import (
    FitPredict,
    assign_folds,
    boosted_trees,
    linear_probe,
    out_of_fold,
    pca_probe,
    stacked_trees,
)

# U = users, X = features, D = draws

Matrix = npt.NDArray[np.float32]
Method = Literal["linear", "pca", "trees", "stacked", "score"]
OnTask = Callable[[int, int], None]

PCA_COMPONENTS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInput:
    """What a row of a task is computed from.

    Attributes:
        method: `linear` probe, linear probe on `pca`, `trees`, trees and a probe `stacked`, or `score` as it is.
        features: `[U, X]` float32; for `score`, `[U, 1]`.
        embedding: `[U, X]` the probed part of a `stacked` row.
        test: `[U, X]` features of test users, where they differ from those of training users.
    """

    method: Method
    features: Matrix
    embedding: Matrix | None = None
    test: Matrix | None = None


def score_row(row: RowInput, label_U: Labels, seed: int = 0) -> Float:
    """Out-of-fold scores of every user.

    Args:
        row: Its features.
        label_U: 0 or 1.
        seed: Which folds.
    """
    if row.method == "score":
        return np.asarray(row.features[:, 0], np.float64)
    features = np.asarray(row.features, np.float32)
    fit: FitPredict
    if row.method == "stacked":
        assert row.embedding is not None
        features = np.column_stack([features, row.embedding])
        fit = stacked_trees(row.embedding.shape[1])
    else:
        fit = {"linear": linear_probe, "pca": pca_probe(PCA_COMPONENTS), "trees": boosted_trees}[row.method]
    return out_of_fold(fit, features, label_U, assign_folds(label_U, seed=seed), row.test)


def score_task(
    rows: Mapping[str, RowInput], label_U: Labels, weight_DU: npt.NDArray[np.float32], seed: int = 0
) -> dict[str, RowScores]:
    """Every row of one task.

    Args:
        rows: By name.
        label_U: 0 or 1.
        weight_DU: The bootstrap draws.
        seed: Which folds.
    """
    fold_U = assign_folds(label_U, seed=seed)
    with threadpool_limits(1):  # at these sizes threads only wait for each other; processes are what helps
        return {
            name: RowScores.of(score_row(row, label_U, seed), label_U, fold_U, weight_DU) for name, row in rows.items()
        }


def score_tasks(
    rows: Sequence[Mapping[str, RowInput]],
    labels: Sequence[Labels],
    *,
    seed: int = 0,
    jobs: int = 1,
    on_task: OnTask | None = None,
) -> list[dict[str, RowScores]]:
    """Every row of every task, tasks spread over processes.

    Args:
        rows: Rows of each task, by name.
        labels: `[U]` labels of each task, of the same users.
        seed: Seed of folds and draws.
        jobs: Processes.
        on_task: Called with tasks done and tasks in all.
    """
    weight_DU = bootstrap_weights(len(labels[0]), seed=seed)
    # One job runs in this process; arrays that many jobs read are mapped from disk once, not copied to each.
    pool = Parallel(n_jobs=jobs, return_as="generator")
    work = (delayed(score_task)(own, label_U, weight_DU, seed) for own, label_U in zip(rows, labels, strict=True))
    results: list[dict[str, RowScores]] = []
    for result in pool(work):
        results.append(result)
        if on_task is not None:
            on_task(len(results), len(labels))
    return results


def means(scores: Sequence[Mapping[str, RowScores]]) -> dict[str, dict[str, float]]:
    """Mean AUC with interval of each row that every task has."""
    common = [name for name in (scores[0] if scores else {}) if all(name in own for own in scores)]
    return {name: mean_estimate([own[name] for own in scores]).as_dict() for name in common}


def difference(scores: Sequence[Mapping[str, RowScores]], row: str, minus: str) -> dict[str, float] | None:
    """Paired difference of mean AUC over the tasks that have both rows; `None` without any."""
    both = [own for own in scores if row in own and minus in own]
    if not both:
        return None
    return mean_estimate([own[row] for own in both], [own[minus] for own in both]).as_dict("difference")

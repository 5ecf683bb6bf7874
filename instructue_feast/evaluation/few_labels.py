"""What an embedding is worth when few users are labelled: AUC of the linear probe by the number of labels it gets.

Few-shot tuning knows labels of an earlier time. Where the probe has thousands of labels at the cut it can find all of
that itself; where it has a few dozen it cannot, and that is what tuning is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from joblib import Parallel, delayed
from scipy import stats
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from instructue_feast.evaluation.metrics import Float, Labels
from instructue_feast.evaluation.probes import linear_probe

# U = users, X = features, T = tasks, R = draws

Matrix = npt.NDArray[np.float32]
OnTask = Callable[[int, int], None]

COUNTS = (8, 16, 32, 64, 128)
"""Labelled users of each class."""

NUM_DRAWS = 5
"""Draws of who is labelled."""

LEAST_TESTED = 30
"""Users of each class a task must have left to test on, at the largest count, to be part of the curve."""


@dataclass(frozen=True, slots=True)
class FewLabels:
    """AUCs on the users that are not labelled.

    Attributes:
        tasks: Names of the T tasks that have enough users of both classes.
        auc: `[T, R]` AUC by count of labels of each class, then row.
    """

    tasks: tuple[str, ...]
    auc: dict[int, dict[str, Float]]

    def document(self, row: str, minus: str) -> dict[str, Any]:
        """Mean AUC of every row and the paired difference of two, by count, as JSON-ready values.

        Intervals are those of a mean over draws of who is labelled (Student's t); the tested users are the same people
        in all of them.
        """
        by_count = {}
        for count, rows in self.auc.items():
            entry: dict[str, Any] = {"mean": {name: round(float(one.mean()), 5) for name, one in rows.items()}}
            entry["difference"] = _interval((rows[row] - rows[minus]).mean(0))
            by_count[str(count)] = entry
        return {"tasks": len(self.tasks), "draws": NUM_DRAWS, "by_labels_of_each_class": by_count}


def measure_few_labels(
    names: Sequence[str],
    features: Sequence[Mapping[str, Matrix]],
    labels: Sequence[Labels],
    *,
    counts: Sequence[int] = (),
    draws: int = NUM_DRAWS,
    seed: int = 0,
    jobs: int = 1,
    on_task: OnTask | None = None,
) -> FewLabels | None:
    """Probes every row with few labels; all rows of a task get the same labelled users.

    Args:
        names: Names of the tasks.
        features: `[U, X]` features of each task by row, the same rows in all of them.
        labels: `[U]` labels of each task.
        counts: Labelled users of each class; `COUNTS` by default.
        draws: R.
        seed: Of the draws.
        jobs: Processes.
        on_task: Called with tasks done and tasks in all.

    Returns:
        The AUCs; `None` when no task has enough users of both classes.
    """
    counts = counts or COUNTS
    least = max(counts) + LEAST_TESTED
    usable = [row for row, label_U in enumerate(labels) if least <= label_U.sum() <= len(label_U) - least]
    if not usable:
        return None
    pool = Parallel(n_jobs=jobs, return_as="generator")
    work = (delayed(_task)(features[row], labels[row], counts, draws, (seed, row)) for row in usable)
    found: list[dict[int, dict[str, Float]]] = []
    for one in pool(work):
        found.append(one)
        if on_task is not None:
            on_task(len(found), len(usable))
    auc = {
        count: {name: np.stack([one[count][name] for one in found]) for name in features[usable[0]]} for count in counts
    }
    return FewLabels(tuple(names[row] for row in usable), auc)


def _task(
    features: Mapping[str, Matrix], label_U: Labels, counts: Sequence[int], draws: int, seed: tuple[int, int]
) -> dict[int, dict[str, Float]]:
    """`[R]` AUCs by count and row; a draw's users of a smaller count are among those of a larger one."""
    auc = {count: {name: np.empty(draws) for name in features} for count in counts}
    with threadpool_limits(1):
        for draw in range(draws):
            order = np.random.default_rng((*seed, draw)).permutation(len(label_U))
            members = [order[label_U[order] == one] for one in (0, 1)]
            for count in counts:
                known = np.concatenate([own[:count] for own in members])
                tested = np.setdiff1d(order, known)
                for name, feature_UX in features.items():
                    scores = linear_probe(feature_UX[known], label_U[known], feature_UX[tested])
                    auc[count][name][draw] = roc_auc_score(label_U[tested], scores)
    return auc


def _interval(value_R: Float) -> dict[str, float]:
    centre = float(value_R.mean())
    reach = float(stats.t.ppf(0.975, len(value_R) - 1) * value_R.std(ddof=1) / np.sqrt(len(value_R)))
    return {
        "difference": round(centre, 5),
        "difference_low": round(centre - reach, 5),
        "difference_high": round(centre + reach, 5),
    }

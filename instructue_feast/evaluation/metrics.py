"""AUC and KS within folds, and a bootstrap over users that is shared by every row and task.

Scores of different folds come from different probes and are not comparable, so the AUC of a row is the mean of its AUCs
within the folds, and KS is taken of the percentile of a score within its fold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

# U = users, F = folds, D = draws of the bootstrap, T = tasks, S = distinct scores

Float = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]
Folds = npt.NDArray[np.int32]

NUM_DRAWS = 1000
_CHUNK = 250
"""Draws at a time; bounds the memory at a few MB per thousand users."""


def fold_auc(score_U: Float, label_U: Labels, fold_U: Folds, weight_DU: npt.NDArray[np.float32] | None = None) -> Float:
    """Mean over the folds of the AUC within each.

    Args:
        score_U: Higher means more likely positive.
        label_U: 0 or 1.
        fold_U: Fold of each user.
        weight_DU: How often each user counts in each draw; left out, one draw in which everybody counts once.

    Returns:
        `[D]`; a fold without both classes in a draw does not count there, and NaN stands for no such fold at all.
    """
    weights = np.ones((1, len(score_U)), np.float32) if weight_DU is None else weight_DU
    folds = [np.flatnonzero(fold_U == fold) for fold in np.unique(fold_U)]
    parts_FD = np.stack([weighted_auc(score_U[own], label_U[own], weights[:, own]) for own in folds])
    known_FD = np.isfinite(parts_FD)
    with np.errstate(invalid="ignore"):
        mean: Float = np.where(known_FD, parts_FD, 0.0).sum(0) / known_FD.sum(0)
    return mean


def weighted_auc(score_U: Float, label_U: Labels, weight_DU: npt.NDArray[np.float32]) -> Float:
    """AUC of one set of scores under many weightings of its users; ties count half.

    Returns:
        `[D]`; NaN where one class has no weight.
    """
    order = np.argsort(score_U, kind="stable")
    start_S = np.flatnonzero(np.diff(score_U[order], prepend=-np.inf) != 0) if len(order) else np.zeros(0, np.int64)
    positive_U = label_U[order] == 1
    out = np.full(len(weight_DU), np.nan)
    for first in range(0, len(weight_DU), _CHUNK):
        weights = weight_DU[first : first + _CHUNK, order].astype(np.float64)
        if not len(start_S):
            continue
        positive_DS = np.add.reduceat(weights * positive_U, start_S, axis=1)
        negative_DS = np.add.reduceat(weights * ~positive_U, start_S, axis=1)
        below_DS = np.cumsum(negative_DS, axis=1) - 0.5 * negative_DS
        pairs_D = positive_DS.sum(1) * negative_DS.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[first : first + _CHUNK] = np.where(pairs_D > 0, (positive_DS * below_DS).sum(1) / pairs_D, np.nan)
    return out


def fold_ks(score_U: Float, label_U: Labels, fold_U: Folds) -> float:
    """Kolmogorov-Smirnov distance between the classes' percentiles within folds: the best difference of two rates."""
    percentile_U = np.empty(len(score_U))
    for fold in np.unique(fold_U):
        own = fold_U == fold
        percentile_U[own] = rankdata(score_U[own]) / own.sum()
    order = np.argsort(percentile_U, kind="stable")
    positive = label_U[order] == 1
    gap = np.cumsum(positive) / max(1, positive.sum()) - np.cumsum(~positive) / max(1, (~positive).sum())
    last = np.append(np.diff(percentile_U[order]) != 0, True)
    return float(np.abs(gap[last]).max(initial=0.0))


def bootstrap_weights(users: int, *, draws: int = NUM_DRAWS, seed: int = 0) -> npt.NDArray[np.float32]:
    """`[D, U]` how often each user is drawn when as many users are drawn with replacement.

    One set of draws serves every row and task, so that differences are paired.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, users, (draws, users)) + np.arange(draws)[:, None] * users
    return np.bincount(picks.ravel(), minlength=draws * users).reshape(draws, users).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the 95% interval of its bootstrap draws.

    Attributes:
        value: The figure on everybody.
        low: 2.5th percentile.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws_D: Float) -> Estimate:
        """The figure, and where its draws lie; draws without a value do not count."""
        known = draws_D[np.isfinite(draws_D)]
        low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (float("nan"), float("nan"))
        return cls(value, float(low), float(high))

    def as_dict(self, name: str = "auc") -> dict[str, float]:
        """`{name, name_low, name_high}`, rounded to five places."""
        return {
            name: round(self.value, 5),
            f"{name}_low": round(self.low, 5),
            f"{name}_high": round(self.high, 5),
        }


@dataclass(frozen=True, slots=True)
class RowScores:
    """What one row scored on one task.

    Attributes:
        auc: AUC on everybody.
        ks: KS on everybody.
        auc_D: AUC of each bootstrap draw.
    """

    auc: float
    ks: float
    auc_D: Float

    @classmethod
    def of(cls, score_U: Float, label_U: Labels, fold_U: Folds, weight_DU: npt.NDArray[np.float32]) -> RowScores:
        """Scores a row on a task."""
        return cls(
            auc=float(fold_auc(score_U, label_U, fold_U)[0]),
            ks=fold_ks(score_U, label_U, fold_U),
            auc_D=fold_auc(score_U, label_U, fold_U, weight_DU),
        )

    @property
    def estimate(self) -> Estimate:
        """AUC with its interval."""
        return Estimate.of(self.auc, self.auc_D)


def mean_estimate(rows: list[RowScores], minus: list[RowScores] | None = None) -> Estimate:
    """Mean AUC over tasks with its interval; of the paired differences when another row's scores are given."""
    value = np.array([one.auc for one in rows])
    draws_TD = np.stack([one.auc_D for one in rows])
    if minus is not None:
        value = value - np.array([one.auc for one in minus])
        draws_TD = draws_TD - np.stack([one.auc_D for one in minus])
    return Estimate.of(float(value.mean()), draws_TD.mean(0))

"""The probes: one linear probe for every embedding row, and the trees for hand features.

Everything that is fitted - scaling, PCA, the strength of the penalty - is fitted on training folds only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from instructue_feast.errors import MissingDependencyError
from instructue_feast.evaluation.metrics import Float, Folds, Labels

# U = users, X = features

NUM_FOLDS = 5
INNER_FOLDS = 3
PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
"""Inverse strengths the probe chooses from, on standardised features."""

TREES: dict[str, Any] = {
    "n_estimators": 150, "learning_rate": 0.05, "num_leaves": 15, "n_jobs": 1, "verbosity": -1, "random_state": 0,
    "deterministic": True, "force_row_wise": True,
}  # fmt: skip

Matrix = npt.NDArray[np.float32]
FitPredict = Callable[[Matrix, Labels, Matrix], Float]
"""Takes training features, training labels and test features; gives test scores."""


def assign_folds(label_U: Labels, *, folds: int = NUM_FOLDS, seed: int = 0) -> Folds:
    """Fold of each user, with the same share of positives in each; the same labels and seed give the same folds."""
    fold_U = np.empty(len(label_U), np.int32)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, test) in enumerate(splitter.split(np.zeros(len(label_U)), label_U)):
        fold_U[test] = fold
    return fold_U


def out_of_fold(
    fit_predict: FitPredict, feature_UX: Matrix, label_U: Labels, fold_U: Folds, test_UX: Matrix | None = None
) -> Float:
    """Scores of every user by a model that has not seen that user's fold.

    Args:
        fit_predict: The model.
        feature_UX: Features.
        label_U: 0 or 1.
        fold_U: Fold of each user.
        test_UX: Features of the users when they are tested, where they differ from those they train with.
    """
    test_UX = feature_UX if test_UX is None else test_UX
    score_U = np.empty(len(label_U), np.float64)
    for fold in np.unique(fold_U):
        test = fold_U == fold
        score_U[test] = fit_predict(feature_UX[~test], label_U[~test], test_UX[test])
    return score_U


def linear_probe(train_UX: Matrix, label_U: Labels, test_UX: Matrix) -> Float:
    """Standardise, then logistic regression whose penalty is chosen by AUC in folds of the training users.

    Returns:
        Log-odds of the test users.
    """
    train_UX, test_UX = _standardise(train_UX, test_UX)
    return _path(train_UX, label_U, test_UX, [_best_penalty(train_UX, label_U)])[0]


def pca_probe(components: int) -> FitPredict:
    """A linear probe on the principal components of standardised features."""

    def fit_predict(train_UX: Matrix, label_U: Labels, test_UX: Matrix) -> Float:
        train_UX, test_UX = _standardise(train_UX, test_UX)
        pca = PCA(min(components, *train_UX.shape), svd_solver="randomized", random_state=0).fit(train_UX)
        return linear_probe(
            pca.transform(train_UX).astype(np.float32), label_U, pca.transform(test_UX).astype(np.float32)
        )

    return fit_predict


def boosted_trees(train_UX: Matrix, label_U: Labels, test_UX: Matrix) -> Float:
    """LightGBM with the settings of `TREES`.

    Returns:
        Log-odds of the test users.

    Raises:
        MissingDependencyError: lightgbm is not installed.
    """
    try:
        import lightgbm
    except ImportError:
        raise MissingDependencyError("lightgbm is not installed", "pip install 'instructue-feast[eval]'") from None
    model = lightgbm.LGBMClassifier(**TREES).fit(train_UX, label_U)
    return np.asarray(model.predict(test_UX, raw_score=True), np.float64)


def stacked_trees(width: int) -> FitPredict:
    """Trees on hand features beside the linear probe of an embedding, added up by a logistic regression.

    The last `width` columns are the embedding. The logistic regression learns how far to trust each from scores of
    training users by models that have not seen them.
    """

    def fit_predict(train_UX: Matrix, label_U: Labels, test_UX: Matrix) -> Float:
        hand, test_hand = train_UX[:, :-width], test_UX[:, :-width]
        own_UX, own_test_UX = _standardise(train_UX[:, -width:], test_UX[:, -width:])
        penalty = [_best_penalty(own_UX, label_U)]

        def probe(features_UX: Matrix, labels_U: Labels, others_UX: Matrix) -> Float:
            return _path(features_UX, labels_U, others_UX, penalty)[0]

        inner_U = assign_folds(label_U, folds=INNER_FOLDS, seed=2)
        inner = [out_of_fold(probe, own_UX, label_U, inner_U), out_of_fold(boosted_trees, hand, label_U, inner_U)]
        outer = [probe(own_UX, label_U, own_test_UX), boosted_trees(hand, label_U, test_hand)]
        # In units of their spread: log-odds of a probe with a strong penalty are tiny, and the blend has a penalty too.
        inner_US, outer_US = _standardise(np.column_stack(inner), np.column_stack(outer))
        return np.asarray(LogisticRegression().fit(inner_US, label_U).decision_function(outer_US), np.float64)

    return fit_predict


def _standardise(train_UX: Matrix, test_UX: Matrix) -> tuple[Matrix, Matrix]:
    """Zero mean and unit variance by the training users; a missing value becomes the mean, a constant column zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without any value
        mean_X, scale_X = np.nanmean(train_UX, axis=0, dtype=np.float64), np.nanstd(train_UX, axis=0, dtype=np.float64)
    scale_X = np.where(scale_X > 1e-9 * np.maximum(1.0, np.abs(mean_X)), scale_X, np.inf)
    return (
        np.nan_to_num((train_UX - mean_X) / scale_X).astype(np.float32),
        np.nan_to_num((test_UX - mean_X) / scale_X).astype(np.float32),
    )


def _best_penalty(train_UX: Matrix, label_U: Labels) -> float:
    """The penalty with the highest mean AUC over inner folds; the stronger one of equals."""
    inner_U = assign_folds(label_U, folds=INNER_FOLDS, seed=1)
    total = np.zeros(len(PENALTIES))
    for fold in range(INNER_FOLDS):
        own = inner_U == fold
        for index, scores in enumerate(_path(train_UX[~own], label_U[~own], train_UX[own], PENALTIES)):
            total[index] += roc_auc_score(label_U[own], scores)
    return PENALTIES[int(total.argmax())]


def _path(train_UX: Matrix, label_U: Labels, test_UX: Matrix, penalties: Sequence[float]) -> list[Float]:
    """Test scores for each penalty, strongest first, each fit starting where the last one ended."""
    model = LogisticRegression(max_iter=300, warm_start=True, tol=1e-4)
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for penalty in penalties:
            model.set_params(C=penalty).fit(train_UX, label_U)
            scores.append(np.asarray(model.decision_function(test_UX), np.float64))
    return scores

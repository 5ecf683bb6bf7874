"""A ranker of product categories: a two-tower model and LightGBM, and what is measured of their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightgbm
import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

# U = households, C = categories, D = size of what a household is known by, I = size of an item vector, B = draws

Matrix = npt.NDArray[np.float32]

WIDTH = 64
EPOCHS = 150
FOLDS = 5
TOP = 10
MIN_BUYERS = 20


class TwoTower(nn.Module):
    """A household and a category each become a vector; their product says whether one buys the other."""

    def __init__(self, user_dim: int, item_CI: torch.Tensor) -> None:
        super().__init__()
        self.user = nn.Sequential(
            nn.Linear(user_dim, 2 * WIDTH), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.item = nn.Linear(item_CI.shape[1], WIDTH)
        self.own = nn.Parameter(torch.zeros(len(item_CI), WIDTH))
        self.bias = nn.Parameter(torch.zeros(len(item_CI)))
        self.register_buffer("item_CI", item_CI)

    def forward(self, user_UD: torch.Tensor) -> torch.Tensor:
        """`[U, C]` logits."""
        return self.user(user_UD) @ (self.item(self.item_CI) + self.own).T / WIDTH**0.5 + self.bias


@dataclass(frozen=True, slots=True)
class Fitted:
    """Standardisation and weights of a trained two-tower model."""

    mean_D: Matrix
    scale_D: Matrix
    model: TwoTower

    def score(self, user_UD: Matrix) -> Matrix:
        """`[U, C]` logits."""
        with torch.inference_mode():
            logits: Matrix = self.model.eval()(torch.from_numpy((user_UD - self.mean_D) / self.scale_D)).numpy()
        return logits


def fit_two_tower(user_UD: Matrix, item_CI: Matrix, label_UC: npt.NDArray[np.bool_], *, seed: int) -> Fitted:
    """Trains on who bought what, all categories of a household at once."""
    torch.manual_seed(seed)
    mean_D, scale_D = user_UD.mean(0), user_UD.std(0) + 1e-6
    inputs, labels = torch.from_numpy((user_UD - mean_D) / scale_D), torch.from_numpy(label_UC.astype(np.float32))
    model = TwoTower(user_UD.shape[1], torch.from_numpy(item_CI)).train()
    with torch.no_grad():  # starts at how popular each category is
        share = labels.mean(0).clamp(1e-4, 1 - 1e-4)
        model.bias.copy_(torch.log(share / (1 - share)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=EPOCHS * (len(inputs) // 256 + 1))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(256):
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Fitted(mean_D, scale_D, model)


def crossed_scores(
    user_UD: Matrix, item_CI: Matrix, label_UC: npt.NDArray[np.bool_], household_U: npt.NDArray[np.int64], *, seed: int
) -> Matrix:
    """`[U, C]` logits for the training rows themselves, each by a model that has not seen its household."""
    order = np.random.default_rng(seed).permutation(household_U.max() + 1)
    fold_U = order[household_U] % FOLDS
    scores = np.empty(label_UC.shape, np.float32)
    for fold in range(FOLDS):
        mine = fold_U == fold
        scores[mine] = fit_two_tower(user_UD[~mine], item_CI, label_UC[~mine], seed=seed).score(user_UD[mine])
    return scores


def fit_lightgbm(features: Mapping[str, Matrix], label_UC: npt.NDArray[np.bool_], *, seed: int) -> lightgbm.Booster:
    """LambdaMART over the categories of each household; features are `[U, C]` each."""
    users, items = label_UC.shape
    data = lightgbm.Dataset(
        _flat(features), label_UC.ravel().astype(np.int8), group=[items] * users, feature_name=list(features)
    )
    settings = {
        "objective": "lambdarank", "lambdarank_truncation_level": 20, "learning_rate": 0.08, "num_leaves": 31,
        "min_data_in_leaf": 200, "feature_fraction": 0.8, "verbosity": -1, "seed": seed, "deterministic": True,
        "force_col_wise": True,
    }  # fmt: skip
    return lightgbm.train(settings, data, num_boost_round=200)


def score_lightgbm(booster: lightgbm.Booster, features: Mapping[str, Matrix]) -> Matrix:
    """`[U, C]` scores."""
    shape = next(iter(features.values())).shape
    return np.asarray(booster.predict(_flat(features)), np.float32).reshape(shape)


def _flat(features: Mapping[str, Matrix]) -> Matrix:
    return np.column_stack([one.ravel() for one in features.values()])


def ndcg(score_UC: Matrix, label_UC: npt.NDArray[np.bool_], among_UC: npt.NDArray[np.bool_] | None = None) -> Matrix:
    """`[U]` NDCG of the ten highest scores; NaN for a household that buys none.

    Args:
        score_UC: Scores; equal ones rank in the order of the categories.
        label_UC: What was bought.
        among_UC: Which categories may be shown; all by default.
    """
    if among_UC is not None:
        score_UC, label_UC = np.where(among_UC, score_UC, -np.inf), label_UC & among_UC
    top = np.argsort(-score_UC, axis=1, kind="stable")[:, :TOP]
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    gained = (np.take_along_axis(label_UC, top, 1) * discount).sum(1)
    number = label_UC.sum(1)
    ideal = np.concatenate([[0.0], discount.cumsum()])[np.minimum(number, top.shape[1])]
    return np.where(number > 0, gained / np.where(number > 0, ideal, 1), np.nan).astype(np.float32)


def recall(score_UC: Matrix, label_UC: npt.NDArray[np.bool_]) -> Matrix:
    """`[U]` share of what was bought that is among the ten highest scores (of ten at most); NaN for no purchase."""
    top = np.argsort(-score_UC, axis=1, kind="stable")[:, :TOP]
    number = label_UC.sum(1)
    hits = np.take_along_axis(label_UC, top, 1).sum(1)
    return np.where(number > 0, hits / np.clip(number, 1, TOP), np.nan).astype(np.float32)


def auc(score_UC: Matrix, label_UC: npt.NDArray[np.bool_], among_UC: npt.NDArray[np.bool_] | None = None) -> float:
    """Mean over categories of how well a score tells its buyers from the others.

    Args:
        score_UC: Scores.
        label_UC: What was bought.
        among_UC: Which pairs count; all by default. A category needs `MIN_BUYERS` buyers and as many others there.
    """
    among_UC = np.ones_like(label_UC) if among_UC is None else among_UC
    areas = []
    for score_U, label_U, among_U in zip(score_UC.T, label_UC.T, among_UC.T, strict=True):
        label_S = label_U[among_U]
        if MIN_BUYERS <= label_S.sum() <= len(label_S) - MIN_BUYERS:
            areas.append(roc_auc_score(label_S, score_U[among_U]))
    return float(np.mean(areas)) if areas else float("nan")


def interval(values_RU: Sequence[Matrix], *, draws: int = 1000, seed: int = 0) -> list[tuple[float, float, float]]:
    """Means over households with 95% bootstrap intervals, all rows from one set of draws.

    Returns:
        Mean, lower and upper bound of each row.
    """
    values = np.stack(values_RU)
    values = values[:, np.isfinite(values).all(0)].astype(np.float64)
    picks = np.random.default_rng(seed).integers(0, values.shape[1], (draws, values.shape[1]))
    means_RB = np.stack([row[picks].mean(1) for row in values])
    low, high = np.percentile(means_RB, [2.5, 97.5], axis=1)
    return [(float(m), float(a), float(b)) for m, a, b in zip(values.mean(1), low, high, strict=True)]

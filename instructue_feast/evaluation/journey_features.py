"""Hand features of The Complete Journey: what a careful analyst would give a tree, from the past of a cut only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instructue_feast.evaluation.journey import DEMOGRAPHICS, Events, Journey

# U = users, X = features, C = product categories

Matrix = npt.NDArray[np.float32]

_DAY = 86_400
WINDOWS = (14, 30, 60, 90, 180)
"""Days before the cut."""

HALF_LIFE_DAYS = 45.0
"""Of the recency-weighted category counts."""


@dataclass(frozen=True, slots=True)
class HandFeatures:
    """Hand features of U users.

    Attributes:
        names: X names.
        values: `[U, X]`.
        category_names: C product categories seen before the cut.
        counts: `[U, C]` lines bought by category.
        recency_counts: `[U, C]` the same, each line halved every `HALF_LIFE_DAYS`.
    """

    names: tuple[str, ...]
    values: Matrix
    category_names: tuple[str, ...]
    counts: Matrix
    recency_counts: Matrix

    def column(self, name: str) -> npt.NDArray[np.float32]:
        """One feature of all users."""
        values: npt.NDArray[np.float32] = self.values[:, self.names.index(name)]
        return values


def hand_features(past: Journey, cut: int) -> HandFeatures:
    """Recency, frequency, spend, discounts, coupons, campaigns, demographics, and spend and lines per category.

    Args:
        past: What happened before the cut.
        cut: Seconds since the epoch.
    """
    users, lines, baskets = past.num_users, past.lines, past.baskets
    columns: dict[str, npt.NDArray[np.float64]] = {}
    paid = lines["sales_value"].astype(np.float64)
    saved = sum(lines[name].astype(np.float64) for name in ("retail_disc", "coupon_disc", "coupon_match_disc"))
    spend, visits = _sum(lines, users, paid), _sum(baskets, users)
    first, last = _extremes(baskets, users, cut)
    columns |= {
        "recency_days": (cut - last) / _DAY,
        "tenure_days": (cut - first) / _DAY,
        "baskets_total": visits,
        "spend_total": spend,
        "lines_total": _sum(lines, users),
        "avg_basket": _ratio(spend, visits),
        "lines_per_basket": _ratio(_sum(lines, users), visits),
        "days_between_visits": _ratio((last - first) / _DAY, visits - 1),
        "discount_share": _ratio(_sum(lines, users, saved), spend + _sum(lines, users, saved)),
        "private_share": _ratio(_sum(lines, users, lines["brand"] == "Private"), _sum(lines, users)),
        "promoted_share": _ratio(_sum(past.promoted, users), _sum(lines, users)),
        "redemptions_total": _sum(past.redeemed, users),
        "campaigns_total": _sum(past.received, users),
    }
    for days in WINDOWS:
        near, near_baskets = lines.time_E >= cut - days * _DAY, baskets.time_E >= cut - days * _DAY
        columns[f"spend_{days}d"] = _sum(lines, users, paid * near)
        columns[f"visits_{days}d"] = _sum(baskets, users, near_baskets)
        columns[f"redemptions_{days}d"] = _sum(past.redeemed, users, past.redeemed.time_E >= cut - days * _DAY)
    columns["spend_trend"] = _ratio(3 * columns["spend_30d"], columns["spend_90d"])
    columns["visits_trend"] = _ratio(3 * columns["visits_30d"], columns["visits_90d"])
    for kind in ("Type A", "Type B", "Type C"):
        word = kind.lower().replace(" ", "_")
        columns[f"received_{word}"] = _sum(past.received, users, past.received["campaign_type"] == kind)
        columns[f"redeemed_{word}"] = _sum(past.redeemed, users, past.redeemed["campaign_type"] == kind)
        running = (past.received["campaign_type"] == kind) & (past.received["ends_at"] >= cut)
        columns[f"running_{word}"] = _sum(past.received, users, running)
    columns |= _demographics(past.profile, users)
    names, code_E = _coded(lines["product_category"])
    age_days = (cut - lines.time_E) / _DAY
    spend_UC, count_UC, recent_UC = (
        _table(lines.user_E, code_E, users, len(names), weight)
        for weight in (paid, np.ones(len(lines)), 0.5 ** (age_days / HALF_LIFE_DAYS))
    )
    values = np.column_stack([*columns.values(), spend_UC, count_UC]).astype(np.float32)
    labels = (*columns, *(f"spend {one}" for one in names), *(f"lines {one}" for one in names))
    return HandFeatures(labels, values, names, count_UC.astype(np.float32), recent_UC.astype(np.float32))


def compressed(values: Matrix) -> Matrix:
    """Signed logarithm: amounts and counts have long tails that a linear model should not follow."""
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)), np.float32)


def _sum(events: Events, users: int, weight: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    weights = None if weight is None else np.asarray(weight, np.float64)
    return np.asarray(np.bincount(events.user_E, weights, minlength=users), np.float64)


def _extremes(baskets: Events, users: int, cut: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """First and last visit of each user; the cut for somebody without any, hence 0 days."""
    first, last = np.full(users, float(cut)), np.full(users, -np.inf)
    np.minimum.at(first, baskets.user_E, baskets.time_E)
    np.maximum.at(last, baskets.user_E, baskets.time_E)
    return first, np.where(np.isfinite(last), last, cut)


def _ratio(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """NaN where there is nothing to divide by; trees and probes both take it."""
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0), np.float64)


def _coded(words: npt.NDArray[np.object_]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Sorted distinct words and the position of each word; -1 for none."""
    names = tuple(sorted({word for word in words if word is not None}))
    at = {name: position for position, name in enumerate(names)}
    return names, np.array([at.get(word, -1) for word in words], np.int64)


def _table(
    user_E: npt.NDArray[np.int64],
    code_E: npt.NDArray[np.int64],
    users: int,
    codes: int,
    weight: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    known = code_E >= 0
    flat = np.bincount(user_E[known] * codes + code_E[known], weight[known], minlength=users * codes)
    return np.asarray(flat.reshape(users, codes), np.float64)


def _demographics(profile: Events, users: int) -> dict[str, npt.NDArray[np.float64]]:
    """One column per value of the last snapshot; all zero for a household whose demographics nobody knows."""
    order = np.lexsort((profile.time_E, profile.user_E))
    last = np.append(np.diff(profile.user_E[order]) != 0, True)[: len(order)]
    rows = order[last]
    columns = {}
    for name in DEMOGRAPHICS:
        words = profile[name][rows]
        for value in sorted({word for word in words if word is not None}):
            column = np.zeros(users)
            column[profile.user_E[rows]] = words == value
            columns[f"{name}: {value}"] = column
    return columns

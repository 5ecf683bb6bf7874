"""The features a recommender without embeddings would have, as Parquet tables that Feast can read.

Each table has `event_timestamp`: what a row says was known then, and nothing after it went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.evaluation.journey import Events, Journey, seconds
from instructue_feast.evaluation.journey_features import hand_features

# U = households, C = product categories

Matrix = npt.NDArray[np.float32]

DAY = 86_400
MIN_SHARE = 0.01
"""A category is a candidate when at least this share of the households has bought it before the first moment."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Purchase lines by household and candidate category.

    Attributes:
        user_E: Household number.
        item_E: Category number.
        time_E: Seconds since the epoch.
        paid_E: What was paid, in dollars.
    """

    user_E: npt.NDArray[np.int64]
    item_E: npt.NDArray[np.int64]
    time_E: npt.NDArray[np.int64]
    paid_E: npt.NDArray[np.float64]

    def count(self, users: int, items: int, start: float, end: float) -> Matrix:
        """`[U, C]` lines in `[start, end)`."""
        keep = (self.time_E >= start) & (self.time_E < end)
        flat = np.bincount(self.user_E[keep] * items + self.item_E[keep], minlength=users * items)
        return flat.reshape(users, items).astype(np.float32)


def candidates(journey: Journey, before: datetime) -> tuple[str, ...]:
    """Product categories to recommend from, sorted."""
    past = journey.lines.between(0, seconds(before))
    named = np.array([word is not None for word in past["product_category"]], bool)
    pairs = {(user, word) for user, word in zip(past.user_E[named], past["product_category"][named], strict=True)}
    words, buyers = np.unique([word for _, word in pairs], return_counts=True)
    return tuple(words[buyers >= MIN_SHARE * journey.num_users].tolist())


def lines_of(events: Events, items: Sequence[str]) -> Lines:
    """The purchase lines of the candidate categories."""
    number = {word: place for place, word in enumerate(items)}
    item_E = np.array([number.get(word, -1) for word in events["product_category"]], np.int64)
    keep = item_E >= 0
    paid = events["sales_value"].astype(np.float64)
    return Lines(events.user_E[keep], item_E[keep], events.time_E[keep], paid[keep])


def write_tables(folder: Path, journey: Journey, items: Sequence[str], moments: Sequence[datetime]) -> None:
    """Writes `household_stats` and `category_stats`, a row per moment.

    Args:
        folder: Where the tables go, as `<name>.parquet`.
        journey: All that happened; each row looks at its past only.
        items: C candidate categories; columns that end in `_by_category` are lists in their order.
        moments: When the features are asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines_of(journey.lines, items)
    households = [_households(journey, lines, len(items), moment) for moment in moments]
    pq.write_table(pa.concat_tables(households, promote_options="default"), folder / "household_stats.parquet")
    pq.write_table(
        pa.concat_tables([_categories(journey.num_users, lines, items, moment) for moment in moments]),
        folder / "category_stats.parquet",
    )


def bought(journey: Journey, items: Sequence[str], start: datetime, days: int) -> npt.NDArray[np.bool_]:
    """The label: `[U, C]`, whether a household buys a category within `days` of `start`."""
    from_s = seconds(start)
    counts = lines_of(journey.lines, items).count(journey.num_users, len(items), from_s, from_s + days * DAY)
    return np.asarray(counts > 0)


PROFILE = ("recency_days", "tenure_days", "visits_30d", "visits_90d", "spend_30d", "spend_90d", "avg_basket",
           "lines_per_basket", "days_between_visits", "discount_share", "private_share", "promoted_share",
           "redemptions_total", "campaigns_total", "spend_trend", "visits_trend")  # fmt: skip
"""Those of `hand_features` that become features of a household here."""


def _households(journey: Journey, lines: Lines, items: int, moment: datetime) -> pa.Table:
    users, cut = journey.num_users, seconds(moment)
    hand = hand_features(journey.between(0, cut), cut)
    columns: dict[str, pa.Array] = {name: pa.array(hand.column(name), pa.float32()) for name in PROFILE}
    for days in (30, 90, 365):
        counts = lines.count(users, items, cut - days * DAY, cut)
        columns[f"lines_{days}d_by_category"] = pa.array(list(counts), pa.list_(pa.float32()))
    last = np.full((users, items), -np.inf)
    past = lines.time_E < cut
    np.maximum.at(last, (lines.user_E[past], lines.item_E[past]), lines.time_E[past])
    since = np.where(np.isfinite(last), (cut - last) / DAY, 999.0).astype(np.float32)  # Feast's lists have no nulls
    columns["days_since_by_category"] = pa.array(list(since), pa.list_(pa.float32()))
    return pa.table({"user_id": pa.array(journey.user_ids), **_stamps(moment, users), **columns})


def _categories(users: int, lines: Lines, items: Sequence[str], moment: datetime) -> pa.Table:
    cut, size = seconds(moment), len(items)
    month, quarter = (lines.count(users, size, cut - days * DAY, cut) for days in (30, 90))
    before = lines.count(users, size, cut - 60 * DAY, cut - 30 * DAY)
    again = ((month > 0) & (before > 0)).sum(0) / np.maximum((before > 0).sum(0), 1)
    past = lines.time_E < cut
    spent = np.bincount(lines.item_E[past], lines.paid_E[past], minlength=size)
    number = np.maximum(np.bincount(lines.item_E[past], minlength=size), 1)
    columns = {
        "buyers_30d": (month > 0).mean(0),
        "buyers_90d": (quarter > 0).mean(0),
        "bought_again": again,
        "price": spent / number,
    }
    floats = {name: pa.array(np.asarray(one, np.float32)) for name, one in columns.items()}
    return pa.table({"category": pa.array(items), **_stamps(moment, size), **floats})


def _stamps(moment: datetime, rows: int) -> dict[str, pa.Array]:
    kind = pa.timestamp("us", tz="UTC")
    return {name: pa.array([moment.astimezone(UTC)] * rows, kind) for name in ("event_timestamp", "created")}

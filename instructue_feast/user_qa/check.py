"""The answers of one user to one family, computed a second time in plain Python and NumPy.

The Spark job computes answers for everybody with shuffles and joins. For a sample of users it asks here again, from
their raw events, and refuses to finish when the two disagree. Nothing here is shared with the first computation but
the reading of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from instructue_feast.question_specs import (
    AmountSpec,
    ChangeSpec,
    FavouriteSpec,
    InactiveSpec,
    MeasuredSpec,
    OccursSpec,
    QuestionSpec,
)

_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class UserEvents:
    """The events of one user in one source, N of them.

    Attributes:
        t: `[N]` int64, microseconds.
        event_id: `[N]` int64.
        subject: N texts or nulls; empty when the family needs none.
        value: N numbers or nulls.
        key: N hashes or nulls.
    """

    t: npt.NDArray[np.int64]
    event_id: npt.NDArray[np.int64]
    subject: Sequence[str | None] = ()
    value: Sequence[float | None] = ()
    key: Sequence[int | None] = ()

    def window(self, start: int, end: int) -> list[dict[str, Any]]:
        """The events in `[start, end)`, of each id the latest copy."""
        rows: dict[int, tuple[Any, dict[str, Any]]] = {}
        for place in np.flatnonzero((self.t >= start) & (self.t < end)).tolist():
            row = {
                name: column[place]
                for name, column in (("subject", self.subject), ("value", self.value), ("key", self.key))
                if len(column)
            }
            # Nulls come first, as in Spark.
            rank = (int(self.t[place]), [(one is not None, one if one is not None else 0) for one in row.values()])
            known = rows.get(int(self.event_id[place]))
            if known is None or rank > known[0]:
                rows[int(self.event_id[place])] = (rank, row)
        return [row for _, row in rows.values()]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the first computation decided about a family, besides the answers.

    Attributes:
        spec: The family.
        places: Subject or value to the place of its question (`occurs`) or answer (`favourite`, `attribute`).
        num_questions: How many questions it has.
        edges: Lowest value of each level but the first.
    """

    spec: QuestionSpec
    places: Mapping[str, int]
    num_questions: int
    edges: Sequence[float] = ()


def answers_again(
    asked: Asked, events: UserEvents, span: tuple[int, int], before: tuple[int, int] | None = None
) -> dict[int, set[int]]:
    """The acceptable answers of an asked user to every question of a family.

    Args:
        asked: The family, any kind but `attribute`.
        events: The user's events in its source.
        span: Start and end of the window in microseconds.
        before: For `change`, the window before.

    Returns:
        Answer places by question place. Two where a measure lies within rounding of an edge; questions that cannot be
        answered are left out.
    """
    spec = asked.spec
    rows = events.window(*span)
    if isinstance(spec, OccursSpec) and spec.subject is not None:
        seen = {asked.places.get(row["subject"]) for row in rows if row["subject"] is not None}
        return {place: {0 if place in seen else 1} for place in range(asked.num_questions)}
    if isinstance(spec, OccursSpec | InactiveSpec):
        return {0: {int(bool(rows) == isinstance(spec, InactiveSpec))}}
    if isinstance(spec, AmountSpec):
        x = _measure(spec, rows)
        return {} if x is None else {0: _levels(x, asked.edges)}
    if isinstance(spec, ChangeSpec):
        assert before is not None
        old, new = _measure(spec, events.window(*before)), _measure(spec, rows)
        if old is None or new is None or round(old, 6) <= 0:
            return {}
        down, up = 1 - spec.threshold, 1 + spec.threshold
        three = len(spec.levels) != 2
        # An answer starts above `down`, so its edge belongs to the answer below it.
        places = {place for x in _around(new / old, down, up) for place in [_direction(x, down, up if three else None)]}
        return {0: places}
    assert isinstance(spec, FavouriteSpec)
    return _favourite(spec, rows, asked.places)


def _favourite(spec: FavouriteSpec, rows: list[dict[str, Any]], places: Mapping[str, int]) -> dict[int, set[int]]:
    excluded = {one.lower() for one in spec.exclude}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["subject"] is not None and row["subject"] not in excluded:
            groups.setdefault(row["subject"], []).append(row)
    scores = {subject: _measure(spec, group) for subject, group in groups.items()}
    known = {subject: round(score, 6) for subject, score in scores.items() if score is not None}
    if not known:
        return {}
    best = min(known, key=lambda subject: (-known[subject], subject.encode()))
    return {0: {places[best]}} if best in places else {}


def _measure(spec: MeasuredSpec, rows: list[dict[str, Any]]) -> float | None:
    if spec.measure == "count":
        return float(len(rows))
    if spec.measure == "distinct":
        return float(len({row["key"] for row in rows} - {None}))
    values = [row["value"] for row in rows if row["value"] is not None]
    if spec.measure == "sum":
        return float(np.sum(values))
    if spec.measure in ("mean", "share"):
        return float(np.mean(values)) if values else None
    keys = {row["key"] for row in rows} - {None}
    return float(np.sum(values)) / len(keys) if keys and values else None


def _around(x: float, *edges: float) -> list[float]:
    """The value, and both its neighbours when it is as good as on an edge."""
    if any(abs(x - edge) <= 1e-6 + _CLOSE * abs(edge) for edge in edges):
        return [x - 2e-6, x + 2e-6]
    return [x]


def _levels(x: float, edges: Sequence[float]) -> set[int]:
    if x == round(x):  # counts are exact
        return {sum(x >= edge for edge in edges)}
    return {sum(one >= edge for edge in edges) for one in _around(x, *edges)}


def _direction(ratio: float, down: float, up: float | None) -> int:
    if ratio <= down:
        return 0
    return 2 if up is not None and ratio >= up else 1

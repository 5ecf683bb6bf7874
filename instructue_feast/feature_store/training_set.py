"""Training sets with user embeddings: point-in-time correct, and honest about what was computed afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from feast import FeatureStore

from instructue_feast.errors import ConfigError, DataError, did_you_mean, listed
from instructue_feast.feature_store.lookup import ServedView
from instructue_feast.feature_store.session import quiet

_ROW = "instructue_row"


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Rows with their embeddings.

    Attributes:
        frame: The rows asked for, in their order, with one column of vectors per instruction; None where there is none.
        found: Instruction -> rows that have a vector.
        served: Instruction -> rows whose vector could have been served at the row's time: computed by then.
        as_served: Whether only those were asked for.
    """

    frame: pd.DataFrame
    found: dict[str, int]
    served: dict[str, int]
    as_served: bool

    @property
    def explanation(self) -> str:
        """What stands in the frame, in words."""
        lines = []
        for name, found in self.found.items():
            line = f"{name}: {found:,} of {len(self.frame):,} rows have an embedding"
            later = found - self.served[name]
            if self.as_served:
                line += ", each computed by the row's time"
            elif later:
                line += (
                    f"; {later:,} of them were computed later, from events before their as_of: no event leaks, but "
                    "they are not what was served then (as_served=True leaves them out)"
                )
            lines.append(line)
        return "\n".join(lines)


def training_set(
    store: FeatureStore,
    served: dict[str, ServedView],
    rows: pd.DataFrame,
    instructions: Sequence[str] | None = None,
    *,
    as_served: bool = False,
) -> TrainingSet:
    """Joins to each row the embedding that was current at its time.

    Two things can be meant by that, and Feast's default means only the first:

    - *as of*: the newest embedding whose `as_of` is not after the row's time. It has seen no event at or after its
      `as_of`, whenever it was computed, so labels from the row's time on are safe. This is the one for backfilled
      history: there, every value was computed long after the rows' times.
    - *as served*: of these, only those that had been computed by the row's time: what a recommender got.

    A third leak is refused where runs are made: a model trained on events after `as_of` (`instructue backfill`).

    Args:
        store: The Feast store.
        served: Instruction -> view.
        rows: With the join key and `event_timestamp`; a time without zone is in UTC. Other columns come back.
        instructions: Instruction ids; all for `None`.
        as_served: Only what had been computed by the row's time.

    Raises:
        ConfigError: An unknown instruction, or a column is missing or would be overwritten.
        DataError: An id or a time is missing; the message gives the first position.
    """
    names = list(served) if instructions is None else list(instructions)
    for name in names:
        if name not in served:
            raise ConfigError(f"unknown instruction {name!r}", did_you_mean(name, served))
    if not names:
        raise ConfigError("no instruction to join", "name at least one")
    asked = _checked(rows, served[names[0]].join_key, names)
    features = [served[name].ref for name in names]
    as_of = _history(store, asked, features, names, computed=False)
    then = _history(store, asked, features, names, computed=True)
    chosen = then if as_served else as_of
    frame = rows.copy()
    for name in names:
        frame[name] = pd.Series(list(chosen[name]), index=rows.index, dtype=object)
    found = {name: sum(one is not None for one in chosen[name]) for name in names}
    same = {
        name: sum(
            1
            for one, other in zip(chosen[name], then[name], strict=True)
            if one is not None and other is not None and np.array_equal(one, other)
        )
        for name in names
    }
    return TrainingSet(frame, found, same, as_served)


def _checked(rows: pd.DataFrame, key: str, names: Sequence[str]) -> pd.DataFrame:
    for column in (key, "event_timestamp"):
        if column not in rows.columns:
            raise ConfigError(f"the rows have no column {column!r}, only {listed(map(str, rows.columns))}", "add it")
    clash = [name for name in names if name in rows.columns]
    if clash:
        raise ConfigError(f"the rows have a column {clash[0]!r} already", "drop or rename it")
    times = pd.to_datetime(rows["event_timestamp"], utc=True)
    users = rows[key]
    wrong = [not isinstance(one, str) or not one.strip() for one in users]
    for mask, what in ((np.array(wrong), "user id"), (times.isna().to_numpy(), "event_timestamp")):
        if mask.any():
            raise DataError(f"{what} is missing or no string in row {int(mask.argmax())}", "give every row both")
    return pd.DataFrame(
        {key: users.to_numpy(), "event_timestamp": times.to_numpy(), _ROW: np.arange(len(rows))}
    ).assign(event_timestamp=lambda frame: pd.to_datetime(frame["event_timestamp"], utc=True))


def _history(
    store: FeatureStore, asked: pd.DataFrame, features: list[str], names: list[str], *, computed: bool
) -> dict[str, list[np.ndarray | None]]:
    """Vectors of each row, in the order of `asked`."""
    if asked.empty:
        return {name: [] for name in names}
    with quiet():
        job = store.get_historical_features(entity_df=asked, features=features, filter_by_created_timestamp=computed)
        frame = job.to_df().sort_values(_ROW)
    if len(frame) != len(asked):
        raise DataError(
            f"the offline store returned {len(frame)} rows for {len(asked)}",
            "use `offline_store: {type: duckdb}`: Feast's default drops and collapses rows",
        )
    return {
        name: [None if value is None or np.ndim(value) == 0 else np.asarray(value, np.float32) for value in frame[name]]
        for name in names
    }

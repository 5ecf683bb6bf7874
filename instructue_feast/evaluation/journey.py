"""The Complete Journey as a few flat arrays, cut at a moment: what labels and hand features are computed from.

Reads the raw tables a project names, not the packed histories and not UserQA, so that labels are independent of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, DataError

# U = users, E = events

Int = npt.NDArray[np.int64]
_MICROSECONDS = 1_000_000

DEMOGRAPHICS = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")

_COLUMNS = {
    "bill": (
        "basket_id", "sales_value", "retail_disc", "coupon_disc", "coupon_match_disc", "product_category", "brand",
    ),
    "spm": ("product_category",),
    "app": ("campaign_type", "ends_at"),
    "search": ("campaign_type", "product_category"),
    "tabular": DEMOGRAPHICS,
}  # fmt: skip
"""What is read of each source's raw table besides user and time."""


@dataclass(frozen=True, slots=True)
class Events:
    """Events of one raw table.

    Attributes:
        user_E: User number.
        time_E: Seconds since the epoch, UTC.
        columns: Other columns by name, `[E]` each.
    """

    user_E: Int
    time_E: Int
    columns: Mapping[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.user_E)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.columns[name]

    def where(self, keep_E: npt.NDArray[np.bool_]) -> Events:
        """The events that are kept."""
        return Events(
            self.user_E[keep_E], self.time_E[keep_E], {name: one[keep_E] for name, one in self.columns.items()}
        )

    def between(self, start: int, end: int) -> Events:
        """The events in `[start, end)`, in seconds since the epoch."""
        return self.where((self.time_E >= start) & (self.time_E < end))

    def of_users(self, new_number_U: Int) -> Events:
        """The events of the users that get a number; `-1` drops a user's events."""
        number_E = new_number_U[self.user_E]
        return dataclasses.replace(self, user_E=number_E).where(number_E >= 0)


@dataclass(frozen=True, slots=True)
class Journey:
    """The tables of some households, or of a span of time.

    Attributes:
        user_ids: Household ids as strings, ascending by number.
        lines: Purchase lines.
        promoted: Purchase lines on display or in the mailer.
        received: Campaigns received.
        redeemed: Coupons redeemed.
        profile: Demographic snapshots.
    """

    user_ids: tuple[str, ...]
    lines: Events
    promoted: Events
    received: Events
    redeemed: Events
    profile: Events

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    def between(self, start: int, end: int) -> Journey:
        """Everything in `[start, end)`, in seconds since the epoch; the users stay."""
        return self._map(lambda events: events.between(start, end))

    def take(self, users: Int) -> Journey:
        """The given users, by position, in that order."""
        number_U = np.full(self.num_users, -1, np.int64)
        number_U[users] = np.arange(len(users))
        part = self._map(lambda events: events.of_users(number_U))
        return dataclasses.replace(part, user_ids=tuple(self.user_ids[user] for user in users))

    def named(self, user_ids: Sequence[str]) -> Journey:
        """The given users, by id, in that order; all of them must be there."""
        position = {user: number for number, user in enumerate(self.user_ids)}
        return self.take(np.array([position[user] for user in user_ids], np.int64))

    def _map(self, change: Callable[[Events], Events]) -> Journey:
        return Journey(
            user_ids=self.user_ids,
            lines=change(self.lines),
            promoted=change(self.promoted),
            received=change(self.received),
            redeemed=change(self.redeemed),
            profile=change(self.profile),
        )

    @property
    def baskets(self) -> Events:
        """One event per basket: its first line."""
        _, first = np.unique(self.lines["basket_id"], return_index=True)
        keep = np.zeros(len(self.lines), bool)
        keep[first] = True
        return self.lines.where(keep)


def seconds(moment: datetime) -> int:
    """Seconds since the epoch."""
    return int(moment.timestamp())


def read_journey(config: InstructueConfig) -> Journey:
    """Reads the raw tables of a Complete Journey project.

    Args:
        config: A project made by `instructue data complete-journey`, or one with the same sources.

    Raises:
        ConfigError: The project is another one, or its tables are not local Parquet.
        DataError: A table is missing, unreadable or lacks a column.
    """
    missing = [name for name in _COLUMNS if name not in config.sources]
    if missing or config.users is None:
        raise ConfigError(
            f"project {config.project} has no {', '.join(missing) or 'users'}: this suite is of The Complete Journey",
            "make the project with `instructue data complete-journey`",
        )
    roster = _read("users", config.users.table.path, (config.users.user_id,))
    ids = np.unique(roster[config.users.user_id].to_numpy())
    events = {}
    for name, columns in _COLUMNS.items():
        source = config.sources[name]
        if source.time is None:
            raise ConfigError(f"source {name} has no time column", "use the project's own config")
        table = _read(name, source.table.path, (source.user_id, source.time, *columns))
        events[name] = _events(table, source.user_id, source.time, columns, ids)
    return Journey(
        user_ids=tuple(str(one) for one in ids.tolist()),
        lines=events["bill"],
        promoted=events["spm"],
        received=events["app"],
        redeemed=events["search"],
        profile=events["tabular"],
    )


def _read(name: str, path: str | None, columns: tuple[str, ...]) -> pa.Table:
    if path is None or "://" in path or not Path(path).exists():
        raise ConfigError(f"raw table of {name} is not a local folder", "run the suite where the raw tables are")
    try:
        return ds.dataset(path).to_table(columns=list(columns))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"raw table of {name} in {path} cannot be read: {type(error).__name__}",
            "write it again with `instructue data complete-journey`",
        ) from None


def _events(table: pa.Table, user: str, time: str, columns: tuple[str, ...], ids: Int) -> Events:
    known = np.isin(table[user].to_numpy(), ids)
    table = table.filter(pa.array(known))
    return Events(
        np.searchsorted(ids, table[user].to_numpy()),
        _seconds(table[time]),
        {name: _values(table[name]) for name in columns},
    )


def _seconds(column: pa.ChunkedArray) -> Int:
    micro: Int = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy() // _MICROSECONDS
    return micro


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Numbers as they are, times in seconds, words as objects of few distinct strings; `None` stays."""
    if pa.types.is_timestamp(column.type):
        return _seconds(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        coded = column.combine_chunks().dictionary_encode()
        words = np.array([*coded.dictionary.to_pylist(), None], dtype=object)
        codes = coded.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)
        objects: npt.NDArray[Any] = words[codes]
        return objects
    numbers: npt.NDArray[Any] = column.to_numpy()
    return numbers

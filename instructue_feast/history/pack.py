"""`PackedHistory`: a batch of users as a few flat NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from instructue_feast import schema
from instructue_feast.errors import SchemaError

# U = users, T = tokens of all users, C = numeric columns, R = sources


@dataclass(frozen=True, slots=True)
class PackedHistory:
    """Packed histories of U users, ragged tokens laid end to end.

    Attributes:
        user_ids: U user ids.
        as_of_us: `[U]` int64, microseconds since the epoch, UTC.
        offsets: `[U + 1]` int64; tokens of user `u` are `offsets[u]:offsets[u + 1]`.
        source_index: `[T]` int32.
        text_id: `[T]` int64.
        count_bucket: `[T]` int32.
        age_bucket: `[T]` int32.
        num_events: `[U, R]` int32, events in the window by source.
        tabular_numeric: `[U, C]` float32, NaN for missing.
    """

    user_ids: list[str]
    as_of_us: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    source_index: npt.NDArray[np.int32]
    text_id: npt.NDArray[np.int64]
    count_bucket: npt.NDArray[np.int32]
    age_bucket: npt.NDArray[np.int32]
    num_events: npt.NDArray[np.int32]
    tabular_numeric: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """`[U]` tokens per user."""
        return np.diff(self.offsets)

    @classmethod
    def from_arrow(
        cls, table: pa.Table, *, num_sources: int, num_numeric: int, where: str = "packed history"
    ) -> PackedHistory:
        """Reads the Arrow form (`schema.PACKED_HISTORY`).

        Args:
            table: U rows.
            num_sources: Sources of the config the table was made with.
            num_numeric: Numeric columns of that config.
            where: What to call the table in an error.

        Raises:
            SchemaError: Wrong columns or types, lists of unequal length, or another config's number of sources.
        """
        schema.check(table, schema.PACKED_HISTORY, where)
        lists = {name: table.column(name).combine_chunks() for name in _TOKEN_LISTS}
        offsets = _lengths_to_offsets(lists["text_id"])
        for name, column in lists.items():
            if not np.array_equal(_lengths_to_offsets(column), offsets):
                raise SchemaError(f"{where}: lists {name} and text_id differ in length", "rebuild the extract")
        return cls(
            user_ids=table.column("user_id").to_pylist(),
            as_of_us=table.column("as_of").combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False),
            offsets=offsets,
            source_index=_flat(lists["source_index"]),
            text_id=_flat(lists["text_id"]),
            count_bucket=_flat(lists["count_bucket"]),
            age_bucket=_flat(lists["age_bucket"]),
            num_events=_matrix(table, "num_events", num_sources, where),
            tabular_numeric=_matrix(table, "tabular_numeric", num_numeric, where),
        )

    def take(self, users: Sequence[int] | npt.NDArray[np.int64]) -> PackedHistory:
        """Returns the given users, by position, in the given order."""
        rows = np.asarray(users, dtype=np.int64)
        lengths = self.num_tokens[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1] - self.offsets[rows], lengths)
        return PackedHistory(
            user_ids=[self.user_ids[row] for row in rows],
            as_of_us=self.as_of_us[rows],
            offsets=offsets,
            source_index=self.source_index[tokens],
            text_id=self.text_id[tokens],
            count_bucket=self.count_bucket[tokens],
            age_bucket=self.age_bucket[tokens],
            num_events=self.num_events[rows],
            tabular_numeric=self.tabular_numeric[rows],
        )


_TOKEN_LISTS = ("source_index", "text_id", "count_bucket", "age_bucket")


def _flat(column: pa.Array) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values


def _lengths_to_offsets(column: pa.ListArray) -> npt.NDArray[np.int64]:
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _matrix(table: pa.Table, name: str, width: int, where: str) -> npt.NDArray[Any]:
    column = table.column(name).combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if np.any(lengths != width):
        raise SchemaError(
            f"{where}: {name} holds {sorted(set(lengths.tolist()))} values per user, the config declares {width}",
            "use the config the extract was made with, or extract again",
        )
    return _flat(column).reshape(len(column), width)

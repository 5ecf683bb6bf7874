"""Incremental backfills: which users of a bucket have not changed since a base run, and their vectors from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from instructue_feast import schema
from instructue_feast.history.changes import unchanged_users
from instructue_feast.runs.audit import vector_matrix
from instructue_feast.runs.reader import read_bucket
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones


@dataclass(frozen=True, slots=True)
class BaseRun:
    """The run whose vectors are carried over, and the extract it was made of."""

    run_id: str
    extract_id: str


def read_history(store: OutputStore, extract_id: str, bucket: int) -> pa.Table:
    """The packed histories of a bucket, ordered by user, without users who were erased since they were extracted.

    Returns:
        `schema.PACKED_HISTORY`; no rows when the bucket has no users.
    """
    folder = store.path("extracts", extract_id, "history", f"bucket={bucket}")
    if not store.fs.isdir(folder):
        return schema.PACKED_HISTORY.empty_table()
    table = ds.dataset(folder, filesystem=store.fs, format="parquet").to_table().sort_by("user_id")
    erased = Tombstones(store)
    return table.filter(pa.array(~erased.contains(table.column("user_id").to_pylist()))) if len(erased) else table


def carry_over(
    store: OutputStore,
    base: BaseRun,
    bucket: int,
    table: pa.Table,
    instructions: Sequence[str],
    vectors: npt.NDArray[np.float32],
) -> npt.NDArray[np.bool_]:
    """Copies the vectors of users whose packed history is what it was in the base run, bit by bit.

    Args:
        store: The project's output.
        base: Run and extract to compare with; same embedding versions, same number of buckets.
        bucket: Which bucket.
        table: The new packed histories of the bucket, U users.
        instructions: The K columns to carry.
        vectors: `[U, K, D]` float32, filled in for the users that are carried.

    Returns:
        `[U]`, whose vectors were filled in.
    """
    unchanged = unchanged_users(table, read_history(store, base.extract_id, bucket))
    if not unchanged.any():
        return unchanged
    run = read_bucket(store, base.run_id, bucket, ["user_id", *instructions])
    places = pc.index_in(table.column("user_id").combine_chunks(), value_set=run.column("user_id").combine_chunks())
    carried: npt.NDArray[np.bool_] = unchanged & pc.is_valid(places).to_numpy(zero_copy_only=False)
    rows = pc.fill_null(places, 0).to_numpy(zero_copy_only=False)[carried]
    for position, name in enumerate(instructions):
        matrix = vector_matrix(run, name, f"run {base.run_id}, bucket {bucket}, instruction {name}")
        vectors[carried, position] = matrix[rows]
    return carried

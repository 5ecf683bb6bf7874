"""Which users have the same packed history in two extracts, and hence the same embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from instructue_feast.schema import PACKED_HISTORY

CONTENT = tuple(name for name in PACKED_HISTORY.names if name not in ("user_id", "as_of"))
"""The columns an embedding depends on; `as_of` itself does not count, only the ages that follow from it."""


def unchanged_users(new: pa.Table, old: pa.Table) -> npt.NDArray[np.bool_]:
    """Compares packed histories value by value.

    Args:
        new: `schema.PACKED_HISTORY`, U users, each once.
        old: The same, of another extract with the same settings.

    Returns:
        `[U]`: whether the user is in `old` with the same texts, counts, ages, numbers of events and numbers. NaN, which
        stands for a missing number, equals NaN.

    Example:
        >>> unchanged_users(PACKED_HISTORY.empty_table(), PACKED_HISTORY.empty_table()).tolist()
        []
    """
    old_users = old.column("user_id").combine_chunks()
    places = pc.index_in(new.column("user_id").combine_chunks(), value_set=old_users)
    same: npt.NDArray[np.bool_] = pc.is_valid(places).to_numpy(zero_copy_only=False)
    old_rows = old.take(pc.fill_null(places, 0)) if len(old_users) else None
    for name in CONTENT:
        if old_rows is None or not same.any():
            return np.zeros(len(new), dtype=np.bool_) if old_rows is None else same
        same &= _equal_lists(new.column(name).combine_chunks(), old_rows.column(name).combine_chunks())
    return same


def _equal_lists(left: pa.ListArray, right: pa.ListArray) -> npt.NDArray[np.bool_]:
    """`[U]`: whether list `u` of both is the same, bit for bit but for NaN."""
    sizes = _sizes(left)
    same: npt.NDArray[np.bool_] = sizes == _sizes(right)
    alike = np.flatnonzero(same)
    lefts, rights = (one.take(pa.array(alike)).flatten().to_numpy(zero_copy_only=False) for one in (left, right))
    differs = lefts != rights
    if differs.dtype == np.bool_ and lefts.dtype.kind == "f":
        differs &= ~(np.isnan(lefts) & np.isnan(rights))
    owners = np.repeat(alike, sizes[alike])
    same[owners[differs]] = False
    return same


def _sizes(lists: pa.ListArray) -> npt.NDArray[np.int64]:
    sizes: npt.NDArray[np.int64] = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return sizes

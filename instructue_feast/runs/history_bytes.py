"""A packed history as a few bytes: how a feature store holds it, so that any instruction can be answered online.

One user is a header, then one record of 11 bytes per token, then events per source and the tabular numbers:

    magic "ph", format 1, sources, numeric columns, tokens, run tag (8 bytes), as_of      26 bytes
    text_id, source_index, count_bucket, age_bucket                                      11 bytes each
    num_events, tabular_numeric                                                           4 bytes each

All little-endian. The run tag names the run whose soft-token table knows these texts.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from instructue_feast.errors import DataError, SchemaError, VersionMismatchError
from instructue_feast.schema import PACKED_HISTORY, check

_MAGIC, _FORMAT = b"ph", 1
_HEADER = struct.Struct("<2sBBHI8sq")
_TOKEN = np.dtype([("text_id", "<i8"), ("source_index", "u1"), ("count_bucket", "u1"), ("age_bucket", "u1")])
_TOKEN_NAMES = ("text_id", "source_index", "count_bucket", "age_bucket")
_AGAIN = "publish and materialize the run again"


def run_tag(run_id: str) -> bytes:
    """Eight bytes that stand for a run.

    >>> run_tag("night-1").hex()
    'c1fc126ec61f641b'
    """
    return hashlib.sha256(run_id.encode()).digest()[:8]


def encode_history(table: pa.Table, run_id: str) -> list[bytes]:
    """One value per row of `schema.PACKED_HISTORY`.

    Raises:
        SchemaError: Other columns, or lists of unequal length.
        DataError: More than 255 sources or buckets, more numeric columns than 65,535.
    """
    check(table, PACKED_HISTORY, "packed history")
    columns = {name: table.column(name).combine_chunks() for name in PACKED_HISTORY.names}
    counts = _lengths(columns["text_id"])
    if any(not np.array_equal(_lengths(columns[name]), counts) for name in _TOKEN_NAMES):
        raise SchemaError("packed history: its token lists differ in length", "extract again")
    flat = {name: columns[name].flatten().to_numpy(zero_copy_only=False) for name in (*_TOKEN_NAMES, *_LISTS)}
    widths = [_lengths(columns[name]) for name in _LISTS]
    small = [flat[name].max(initial=0) > 255 for name in ("source_index", "count_bucket", "age_bucket")]
    if any(small) or widths[0].max(initial=0) > 255 or widths[1].max(initial=0) > 65_535:
        raise DataError("the packed history does not fit its wire format", "use at most 255 sources")
    tokens = np.empty(len(flat["text_id"]), _TOKEN)
    for name in _TOKEN_NAMES:
        tokens[name] = flat[name]
    parts = [(tokens.tobytes(), counts * _TOKEN.itemsize)]
    parts += [(flat[name].astype(kind).tobytes(), widths[at] * 4) for at, (name, kind) in enumerate(_LISTS.items())]
    bounds = [np.concatenate([[0], np.cumsum(sizes)]).tolist() for _, sizes in parts]
    tag, moments = run_tag(run_id), columns["as_of"].cast(pa.int64()).to_pylist()
    return [
        _HEADER.pack(_MAGIC, _FORMAT, widths[0][user], widths[1][user], counts[user], tag, moments[user])
        + b"".join([data[ends[user] : ends[user + 1]] for (data, _), ends in zip(parts, bounds, strict=True)])
        for user in range(len(table))
    ]


def tag_of(value: bytes) -> bytes:
    """The run tag of an encoded history.

    Raises:
        VersionMismatchError: It is no packed history of this release.
    """
    if len(value) < _HEADER.size or value[:3] != _MAGIC + bytes([_FORMAT]):
        raise VersionMismatchError("the online store holds a packed history of another release", _AGAIN)
    return bytes(_HEADER.unpack_from(value)[5])


def decode_history(values: Sequence[bytes], user_ids: Sequence[str]) -> pa.Table:
    """The reverse of `encode_history`: a row of `schema.PACKED_HISTORY` per value.

    Raises:
        VersionMismatchError: Another release's format.
        DataError: A value is cut off.
    """
    moments, tokens, others = [], [], []
    for position, value in enumerate(values):
        tag_of(value)
        _, _, sources, numeric, count, _, moment = _HEADER.unpack_from(value)
        middle = _HEADER.size + count * _TOKEN.itemsize
        if len(value) != middle + 4 * (sources + numeric):
            raise DataError(f"the packed history at position {position} is cut off", _AGAIN)
        moments.append(moment)
        tokens.append(np.frombuffer(value, _TOKEN, count, _HEADER.size))
        others.append(
            [np.frombuffer(value, "<i4", sources, middle), np.frombuffer(value, "<f4", numeric, middle + 4 * sources)]
        )
    lists = {name: [one[name] for one in tokens] for name in _TOKEN_NAMES}
    lists |= {name: [one[at] for one in others] for at, name in enumerate(_LISTS)}
    columns = {"user_id": list(user_ids), "as_of": np.array(moments, "datetime64[us]"), **lists}
    return pa.table([_column(columns[field.name], field.type) for field in PACKED_HISTORY], schema=PACKED_HISTORY)


_LISTS = {"num_events": "<i4", "tabular_numeric": "<f4"}


def _lengths(column: pa.ListArray) -> Any:
    return column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind) if isinstance(values, list) else pa.array(values).cast(kind)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
    flat = np.concatenate(values) if values else np.empty(0)
    return pa.ListArray.from_arrays(offsets, pa.array(flat).cast(kind.value_type))

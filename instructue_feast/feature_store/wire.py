"""Feast's wire format for whole columns: entity keys, values and timestamps as bytes, without an object per row.

`Value{float_list_val: FloatList{val: [...]}}` is a constant prefix and the raw little-endian float32 numbers, so a
matrix of vectors becomes wire bytes by one copy and back by `np.frombuffer`. All prefixes are taken from what Feast's
own serialisation writes; the tests hold both to the same bytes.

Vectors can be stored smaller, as float16 or int8. That is no Feast vector: it travels as `Value{bytes_val}`, four bytes
saying which, then the numbers. A stock reader gets `bytes`, never a wrong vector.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.protos.feast.types.Value_pb2 import FloatList, Value, ValueType
from google.protobuf.timestamp_pb2 import Timestamp

from instructue_feast.errors import VersionMismatchError

# U = users, D = numbers in a vector
Storage = Literal["float32", "float16", "int8"]
Vectors = npt.NDArray[np.float32]
KEY_VERSION: Final = 3
"""The only `entity_key_serialization_version` Feast still writes."""
UNKNOWN_TIME: Final = np.iinfo(np.int64).min
"""Stands for a time that is not stored; as datetime64 it is NaT."""
_HALF, _BYTE = b"iue\x02", b"iue\x01"


def entity_keys(join_key: str, ids: Sequence[str]) -> list[bytes]:
    """Serialized version 3 entity keys of one string join key."""
    head = serialize_entity_key_prefix([join_key], KEY_VERSION) + struct.pack("<I", ValueType.STRING)
    heads: dict[int, bytes] = {}  # ids have few distinct lengths
    keys = []
    for one in ids:
        raw = one.encode()
        length = len(raw)
        known = heads.get(length)
        if known is None:
            known = heads[length] = head + struct.pack("<I", length)
        keys.append(known + raw)
    return keys


def encode_vectors(vectors: Vectors, storage: Storage = "float32") -> list[bytes]:
    """Wire bytes of `[U, D]` vectors, one value for each row.

    Args:
        vectors: `[U, D]`, `D` at least 1.
        storage: float32 is what stock Feast writes. int8 scales each vector by its largest number.
    """
    dim = vectors.shape[1]
    if storage == "float32":
        return _rows(vector_prefix(dim), np.ascontiguousarray(vectors, dtype="<f4").view(np.uint8))
    if storage == "float16":
        return _rows(_bytes_prefix(4 + 2 * dim) + _HALF, np.ascontiguousarray(vectors, dtype="<f2").view(np.uint8))
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype("<f4")
    packed = np.rint(vectors / scale).astype(np.int8).view(np.uint8)
    return _rows(_bytes_prefix(8 + dim) + _BYTE, np.hstack([scale.view(np.uint8), packed]))


def as_stored(vectors: Vectors, storage: Storage) -> Vectors:
    """What reading `vectors` gives after storing them: for float32 the same numbers."""
    if storage == "float32":
        return vectors
    return decode_vectors(encode_vectors(vectors, storage), vectors.shape[1], "")[0]


def encode_bytes(values: Sequence[bytes]) -> list[bytes]:
    """Wire bytes of a `Bytes` feature."""
    return [_bytes_prefix(len(one)) + one for one in values]


def decode_vectors(values: Sequence[bytes | None], dim: int, where: str) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    """Vectors out of wire bytes, however they are stored.

    Args:
        values: `U` values; `None` or empty where nothing is stored.
        dim: `D`.
        where: The view, for the error message.

    Returns:
        `[U, D]` float32, zeros where nothing is stored, and `[U]` bool: something is.

    Raises:
        VersionMismatchError: A value is no vector of `D` numbers.
    """
    count = len(values)
    prefix = vector_prefix(dim)
    width = len(prefix) + 4 * dim
    present = [one for one in values if one]
    if all(len(one) == width for one in present):
        raw = np.frombuffer(b"".join(present), np.uint8).reshape(len(present), width)
        if raw[:, : len(prefix)].tobytes() == prefix * len(present):
            numbers = raw[:, len(prefix) :].copy().view("<f4")
            if len(present) == count:
                return numbers, np.ones(count, dtype=np.bool_)
            found = np.fromiter(map(bool, values), np.bool_, count)
            vectors = np.zeros((count, dim), dtype=np.float32)
            vectors[found] = numbers
            return vectors, found
    return _decode_one_by_one(values, dim, where)


def as_stock_value(value: Value) -> Value:
    """A stored value as Feast knows it: a vector stored as float16 or int8 becomes a float list; the rest stays."""
    if value.bytes_val[:3] == _HALF[:3]:
        numbers = _unpack(value.bytes_val)
        if numbers is not None:
            return Value(float_list_val=FloatList(val=numbers.tolist()))
    return value


@lru_cache(maxsize=4096)
def encode_time(micros: int) -> bytes:
    """Microseconds since 1970 as a serialized protobuf `Timestamp`."""
    seconds, rest = divmod(micros, 1_000_000)
    return bytes(Timestamp(seconds=seconds, nanos=rest * 1000).SerializeToString())


@lru_cache(maxsize=4096)
def decode_time(raw: bytes | None) -> int:
    """The reverse; `UNKNOWN_TIME` for `None`."""
    if raw is None:
        return UNKNOWN_TIME
    stamp = Timestamp.FromString(raw)
    return int(stamp.seconds * 1_000_000 + stamp.nanos // 1000)


@lru_cache(maxsize=64)
def vector_prefix(dim: int) -> bytes:
    """What comes before the numbers of a float32 vector."""
    return bytes(Value(float_list_val=FloatList(val=[0.0] * dim)).SerializeToString()[: -4 * dim])


@lru_cache(maxsize=4096)
def _bytes_prefix(length: int) -> bytes:
    whole = bytes(Value(bytes_val=bytes(length)).SerializeToString())
    return whole[: len(whole) - length]


def _rows(prefix: bytes, payload: npt.NDArray[np.uint8]) -> list[bytes]:
    """The bytes of each row of a matrix, behind a prefix they share."""
    head, width = len(prefix), len(prefix) + payload.shape[1]
    matrix = np.empty((len(payload), width), dtype=np.uint8)
    matrix[:, :head] = np.frombuffer(prefix, np.uint8)
    matrix[:, head:] = payload
    blob = matrix.tobytes()
    return [blob[start : start + width] for start in range(0, len(blob), width)]


def _decode_one_by_one(values: Sequence[bytes | None], dim: int, where: str) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    vectors, found = np.zeros((len(values), dim), dtype=np.float32), np.zeros(len(values), dtype=np.bool_)
    for row, raw in enumerate(values):
        value = Value.FromString(raw) if raw else Value()
        kind = value.WhichOneof("val")
        if kind in (None, "null_val"):
            continue
        numbers: npt.ArrayLike | None = None
        if kind == "float_list_val":
            numbers = value.float_list_val.val
        elif kind == "bytes_val":
            numbers = _unpack(value.bytes_val)
        if numbers is None or np.shape(numbers) != (dim,):
            held = f"a vector of {np.size(numbers)} numbers, not {dim}" if numbers is not None else f"{kind}, no vector"
            raise VersionMismatchError(f"{where} holds {held}", "apply and materialize the current publication again")
        vectors[row], found[row] = numbers, True
    return vectors, found


def _unpack(payload: bytes) -> Vectors | None:
    if payload[:4] == _HALF:
        return np.frombuffer(payload, "<f2", offset=4).astype(np.float32)
    if payload[:4] == _BYTE:
        scale = np.frombuffer(payload, "<f4", 1, offset=4)
        numbers: Vectors = np.frombuffer(payload, np.int8, offset=8).astype(np.float32) * scale
        return numbers
    return None

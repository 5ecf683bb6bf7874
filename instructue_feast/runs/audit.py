"""What a user embedding must be before anybody may read it, and a digest that proves a file still holds it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from instructue_feast.errors import InvalidEmbeddingError, SchemaError, listed
from instructue_feast.schema import check, embeddings_schema

# U = users, D = embedding_dim
KEY_COLUMNS = ("user_id", "event_timestamp", "created")
"""The columns of a run that are not vectors."""

NORM_TOLERANCE = 1e-3
_MODULUS = 1 << 64
_REMEDY = "nothing was written or published; check the model's weights and `model.dtype`, then run the backfill again"


def instructions_of(schema: pa.Schema) -> list[str]:
    """The instruction ids of a run's table, in column order."""
    return [name for name in schema.names if name not in KEY_COLUMNS]


def check_vectors(vectors: npt.NDArray[np.floating], where: str, *, dim: int | None = None) -> None:
    """Raises unless every vector is finite and of unit length.

    Args:
        vectors: `[U, D]`, any float type.
        where: Instruction and bucket, for the message; never a user id.
        dim: The `D` that is expected; left out, any size of at least one will do.

    Raises:
        InvalidEmbeddingError: NaN, infinity, a norm more than 1e-3 away from 1, or the wrong size.

    Example:
        >>> check_vectors(np.eye(3, dtype=np.float32), "churn, bucket 0", dim=3)
    """
    if vectors.ndim != 2 or (len(vectors) and vectors.shape[1] == 0):
        raise InvalidEmbeddingError(f"{where}: expected [users, size], got the shape {list(vectors.shape)}", _REMEDY)
    rows = len(vectors)
    if dim is not None and rows and vectors.shape[1] != dim:
        raise InvalidEmbeddingError(
            f"{where}: {rows} of {rows} embeddings have {vectors.shape[1]} numbers, not {dim}",
            "the run must be written with the `model.embedding_dim` its manifest names",
        )
    # The sum of squares in float64 is NaN or infinite exactly when a component is: one pass instead of three.
    norms = np.sqrt(np.einsum("ud,ud->u", vectors, vectors, dtype=np.float64))
    broken = int(np.count_nonzero(~np.isfinite(norms)))
    if broken:
        raise InvalidEmbeddingError(f"{where}: {broken} of {rows} embeddings hold NaN or infinity", _REMEDY)
    off = np.abs(norms - 1.0)
    wrong = int(np.count_nonzero(off > NORM_TOLERANCE))
    if wrong:
        worst = float(norms[int(np.argmax(off))])
        raise InvalidEmbeddingError(
            f"{where}: {wrong} of {rows} embeddings are not unit-norm (the worst has norm {worst:.4g})", _REMEDY
        )


def vector_matrix(table: pa.Table, instruction: str, where: str) -> npt.NDArray[np.float32]:
    """One vector column as a matrix, without a copy when the table is one chunk.

    Returns:
        `[U, D]` float32; `[0, 0]` for a table without rows.

    Raises:
        InvalidEmbeddingError: A null inside a vector, or vectors of different lengths.
    """
    lists = table.column(instruction).combine_chunks()
    if len(lists) == 0:
        return np.empty((0, 0), dtype=np.float32)
    sizes = np.diff(lists.offsets.to_numpy())
    dim = int(np.bincount(sizes).argmax())
    ragged = int(np.count_nonzero(sizes != dim))
    values = lists.flatten()
    if ragged or values.null_count:
        problem = f"{ragged} of {len(lists)} embeddings do not have {dim} numbers like the rest"
        raise InvalidEmbeddingError(f"{where}: {problem if ragged else 'nulls inside embeddings'}", _REMEDY)
    matrix: npt.NDArray[np.float32] = values.to_numpy(zero_copy_only=False).reshape(len(lists), dim)
    return matrix


def check_embeddings(table: pa.Table, where: str, *, dim: int | None = None) -> None:
    """Raises unless a table is fit to be part of a run.

    Args:
        table: See `schema.embeddings_schema`; one row per user.
        where: Run and bucket, for the message.
        dim: Size every vector must have; left out, all instructions must agree on one.

    Raises:
        SchemaError: Other columns or types, nulls, no instruction, an empty user id or a user twice.
        InvalidEmbeddingError: See `check_vectors`.
    """
    instructions = instructions_of(table.schema)
    check(table, embeddings_schema(instructions), where)
    if not instructions:
        raise SchemaError(
            f"{where}: no instruction column, only {listed(table.schema.names)}", "write one per instruction"
        )
    users = table.column("user_id").to_pylist()
    if len(set(users)) != len(users):
        raise SchemaError(f"{where}: {len(users) - len(set(users))} rows repeat a user", "write one row per user")
    if "" in users:
        raise SchemaError(f"{where}: {users.count('')} rows have an empty user id", "quarantine users without an id")
    for name in instructions:
        vectors = vector_matrix(table, name, f"{where}, instruction {name}")
        check_vectors(vectors, f"{where}, instruction {name}", dim=dim)
        dim = dim or (vectors.shape[1] if len(vectors) else None)


def bucket_digest(table: pa.Table) -> str:
    """Digest of a table's values that does not depend on the order of its rows or on how they are cut into files.

    The count of rows and the sum, modulo 2^64, of each row's xxhash64 over event time, vectors and user id, seeded with
    the instruction ids. A sum commutes, so buckets may finish in any order (`combine_digests`). `created` does not
    count: computing the same values again gives the same digest. It tells apart accidents, not forgeries.

    Returns:
        `<rows>-<16 hex digits>`.
    """
    instructions = sorted(instructions_of(table.schema))
    seed = xxhash.xxh64_intdigest("\x00".join(instructions).encode())
    times = table.column("event_timestamp").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
    columns = [vector_matrix(table, name, name).astype("<f4", copy=False) for name in instructions]
    rows = [np.ascontiguousarray(times.astype("<i8")).view(np.uint8).reshape(-1, 8)]
    rows += [np.ascontiguousarray(matrix).view(np.uint8).reshape(len(times), -1) for matrix in columns if len(matrix)]
    payload = np.hstack(rows)
    total = 0
    for row, user in zip(payload, table.column("user_id").to_pylist(), strict=True):
        total += xxhash.xxh64_intdigest(row.tobytes() + user.encode(), seed)
    return f"{len(payload)}-{total % _MODULUS:016x}"


def combine_digests(digests: Iterable[str]) -> str:
    """Digest of all rows together: equal to `bucket_digest` of the concatenated table.

    >>> combine_digests(["1-00000000000000ff", "2-0000000000000001"])
    '3-0000000000000100'
    """
    count, total = 0, 0
    for digest in digests:
        rows, value = digest.split("-")
        count, total = count + int(rows), total + int(value, 16)
    return f"{count}-{total % _MODULUS:016x}"

"""The Arrow schema of every table on the data path, and `check`, which says exactly how a table departs from one.

Timestamps are microseconds in UTC everywhere. No column holds nulls unless its field says so.
"""

from __future__ import annotations

import pyarrow as pa

from instructue_feast.errors import SchemaError, listed

TIMESTAMP = pa.timestamp("us", tz="UTC")


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


QUARANTINE = pa.schema(
    [
        _required("source", pa.string()),
        _required("reason", pa.string()),
        pa.field("user_id", pa.string()),
        pa.field("event_time", TIMESTAMP),
        pa.field("row", pa.string()),
    ]
)
"""One row per refused raw row; `row` is the JSON of the columns the source names."""

PHRASEBOOK = pa.schema(
    [_required("source", pa.string()), _required("text_id", pa.int64()), _required("text", pa.string())]
)
"""One row per distinct (source, event text)."""

EVENT_VECTORS = pa.schema([_required("text_id", pa.int64()), _required("vector", pa.list_(pa.float32()))])
"""One row per text ever encoded; every vector of one encoder has the same length."""

PACKED_HISTORY = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("as_of", TIMESTAMP),
        _required("source_index", pa.list_(pa.int32())),
        _required("text_id", pa.list_(pa.int64())),
        _required("count_bucket", pa.list_(pa.int32())),
        _required("age_bucket", pa.list_(pa.int32())),
        _required("num_events", pa.list_(pa.int32())),
        _required("tabular_numeric", pa.list_(pa.float32())),
    ]
)
"""One row per user and `as_of`.

The four token lists run in parallel, ordered by `source_index`, within an event source from the oldest to the newest
last sight, ties by `text_id`. `num_events` has one entry per source (events in the window before capping; values
present for a tabular source). `tabular_numeric` has one entry per numeric column; NaN means missing.
"""


def embeddings_schema(instructions: list[str]) -> pa.Schema:
    """Schema of a run: one row per user and `as_of`, one unit-norm float32 vector column per instruction id."""
    vectors = [_required(name, pa.list_(pa.float32())) for name in instructions]
    return pa.schema(
        [
            _required("user_id", pa.string()),
            _required("event_timestamp", TIMESTAMP),
            _required("created", TIMESTAMP),
            *vectors,
        ]
    )


def check(table: pa.Table | pa.RecordBatch, schema: pa.Schema, where: str) -> None:
    """Raises unless `table` has exactly the columns and types of `schema`, and no null where none may be.

    Args:
        table: The table to check.
        schema: What it must look like.
        where: What to call the table in the message.

    Raises:
        SchemaError: The first departure, with what is there.
    """
    missing = [name for name in schema.names if name not in table.schema.names]
    if missing:
        raise SchemaError(f"{where}: columns not found: {listed(missing)}", f"it has {listed(table.schema.names)}")
    extra = [name for name in table.schema.names if name not in schema.names]
    if extra:
        raise SchemaError(f"{where}: unexpected columns {listed(extra)}", f"it should have {listed(schema.names)}")
    for expected in schema:
        actual = table.schema.field(expected.name)
        if not _same_type(actual.type, expected.type):
            raise SchemaError(
                f"{where}: column {expected.name} has type {actual.type}, not {expected.type}",
                "write it with the job of the same version",
            )
        if not expected.nullable and table.column(expected.name).null_count:
            count = table.column(expected.name).null_count
            raise SchemaError(f"{where}: column {expected.name} has {count} nulls", "no null is allowed there")


def _same_type(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Equality that ignores the name and nullability of list items, which engines write differently."""
    if pa.types.is_list(actual) and pa.types.is_list(expected):
        return _same_type(actual.value_type, expected.value_type)
    return bool(actual == expected)

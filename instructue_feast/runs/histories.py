"""Packed histories inside a publication: what an instruction nobody planned for is answered from online."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.errors import StorageError
from instructue_feast.runs.history_bytes import encode_history
from instructue_feast.runs.manifest import RunManifest
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_feast.schema import PACKED_HISTORY, TIMESTAMP

FEATURE = "packed_history"
"""Name of the feature, and first part of the name of its view."""

_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("event_timestamp", TIMESTAMP, nullable=False),
        pa.field("created", TIMESTAMP, nullable=False),
        pa.field(FEATURE, pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedHistory:
    """The packed histories of one model version, those of its run with the latest `as_of`.

    A view of their own for each model version: a soft-token table knows the texts of its own run only.
    """

    name: str
    model_version: str
    history_digest: str
    run_id: str
    as_of: str
    created: str
    rows: int
    files: int


def history_view_name(model_version: str) -> str:
    """Name of the feature view.

    >>> history_view_name("0123456789abcdef")
    'packed_history__01234567'
    """
    return f"{FEATURE}__{model_version[:8]}"


def publish_histories(
    store: OutputStore, publication_id: str, manifest: RunManifest, known: PublishedHistory | None
) -> PublishedHistory | None:
    """Writes the packed histories of a run's extract into a publication that nobody reads yet.

    Args:
        store: The project's output.
        publication_id: The publication.
        manifest: The run being published.
        known: What the publication before holds for the same model version.

    Returns:
        What is published; `known` where that is of a later `as_of`; `None` where the run's extract is gone.

    Raises:
        StorageError: The extract is damaged, or is not the one the run was made from.
        SchemaError: The extract was written by another release.
    """
    if known and datetime.fromisoformat(known.as_of) > datetime.fromisoformat(manifest.as_of):
        return known
    source = ("extracts", manifest.extract_id)
    if not store.exists(*source, "manifest.json"):
        return None
    name, rows, total = history_view_name(manifest.model_version), 0, 0
    erased = Tombstones(store)
    files = store.files(*source, "history", "bucket=*")
    store.fs.makedirs(store.path("published", publication_id, name), exist_ok=True)
    for number, file in enumerate(files):
        try:
            with store.fs.open(file, "rb") as stream:
                table = pq.ParquetFile(stream).read(columns=PACKED_HISTORY.names)
            gone = erased.contains(table.column("user_id").to_pylist())
            table, total = table.filter(pa.array(~gone)), total + len(table)
            rows += len(table)
            with store.fs.open(
                store.path("published", publication_id, name, f"{manifest.run_id}-{number:05d}.parquet"), "wb"
            ) as stream:
                pq.write_table(_encoded(table, manifest), stream, compression="zstd", use_dictionary=False)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"the packed histories of extract {manifest.extract_id} cannot be published: {type(error).__name__}",
                "free disk space, or run the backfill again",
            ) from None
    if manifest.users not in (rows, total):  # a run may still count users who were erased since
        raise StorageError(
            f"extract {manifest.extract_id} holds {rows} users, run {manifest.run_id} was made from {manifest.users}",
            "run the backfill again",
        )
    return PublishedHistory(
        name=name,
        model_version=manifest.model_version,
        history_digest=manifest.history_digest,
        run_id=manifest.run_id,
        as_of=manifest.as_of,
        created=manifest.created,
        rows=rows,
        files=len(files),
    )


def _encoded(table: pa.Table, manifest: RunManifest) -> pa.Table:
    created = datetime.fromisoformat(manifest.created)
    columns = [
        table.column("user_id"),
        table.column("as_of"),
        pa.array([created] * len(table), TIMESTAMP),
        pa.array(encode_history(table.select(PACKED_HISTORY.names), manifest.run_id), pa.binary()),
    ]
    return pa.table(columns, schema=_SCHEMA)

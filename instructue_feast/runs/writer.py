"""Writing a run: buckets in any order and by any number of workers, the manifest last."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.errors import RunConflictError, StorageError
from instructue_feast.runs.audit import bucket_digest, check_embeddings
from instructue_feast.runs.manifest import BucketMarker, RunManifest, from_json, to_json
from instructue_feast.runs.store import OutputStore


def bucket_folder(bucket: int) -> str:
    """Name of a bucket's folder inside a run.

    >>> bucket_folder(7)
    'bucket=00007'
    """
    return f"bucket={bucket:05d}"


def write_bucket(
    store: OutputStore,
    run_id: str,
    bucket: int,
    table: pa.Table,
    *,
    tokens: int,
    seconds: float,
    dim: int | None = None,
    carried: int = 0,
    empty: int = 0,
) -> BucketMarker:
    """Audits and writes one bucket; its marker, written last, makes it count.

    A worker that dies half-way leaves no marker, and the bucket is written again. Writing the same bucket twice is
    harmless: the second file replaces the first in one step.

    Args:
        store: The project's output.
        run_id: The run.
        bucket: Which bucket, from 0.
        table: See `schema.embeddings_schema`; a bucket without users has no rows.
        tokens: Prompt tokens computed for it.
        seconds: Wall time spent on it.
        dim: Size every vector must have, if known.
        carried: How many rows were taken from a base run.
        empty: How many users have no history at all.

    Raises:
        SchemaError: See `check_embeddings`.
        InvalidEmbeddingError: See `check_embeddings`; nothing is written.
        StorageError: The disk is full or not writable.
    """
    check_embeddings(table, f"run {run_id}, bucket {bucket}", dim=dim)
    marker = BucketMarker(
        bucket=bucket, rows=table.num_rows, digest=bucket_digest(table), tokens=tokens, seconds=round(seconds, 3),
        carried=carried, empty=empty,
    )  # fmt: skip
    write_parquet(store, table, "runs", run_id, bucket_folder(bucket), "part.parquet")
    store.write_json(to_json(marker), "runs", run_id, bucket_folder(bucket), "marker.json")
    return marker


def finished_buckets(store: OutputStore, run_id: str) -> list[BucketMarker]:
    """The buckets of a run that are done, by number."""
    folders = [name for name in store.names("runs", run_id) if name.startswith("bucket=")]
    done = [name for name in folders if store.exists("runs", run_id, name, "marker.json")]
    return [
        from_json(BucketMarker, store.read_json("runs", run_id, name, "marker.json"), f"marker of {run_id}/{name}")
        for name in done
    ]


def finish_run(store: OutputStore, manifest: RunManifest) -> None:
    """Writes `manifest.json`, after which the run is immutable.

    Raises:
        RunConflictError: The run is finished already, or its buckets are not exactly those of the manifest.
    """
    if store.exists("runs", manifest.run_id, "manifest.json"):
        raise RunConflictError(f"run {manifest.run_id} is finished already", "a finished run is never written again")
    written = {marker.bucket: marker.digest for marker in finished_buckets(store, manifest.run_id)}
    named = {marker.bucket: marker.digest for marker in manifest.buckets}
    if written != named:
        odd = sorted(bucket for bucket in written.keys() | named.keys() if written.get(bucket) != named.get(bucket))
        raise RunConflictError(
            f"run {manifest.run_id}: {len(odd)} buckets on disk differ from the manifest, the first is {odd[0]}",
            "does another process write the same run? Run the backfill again under another run id",
        )
    store.write_json(to_json(manifest), "runs", manifest.run_id, "manifest.json")


def parquet_bytes(table: pa.Table, *, repeats: bool = False) -> int:
    """Size of the file `write_parquet` would write."""
    sink = pa.BufferOutputStream()
    _encode(table, sink, repeats)
    return int(sink.getvalue().size)


def _encode(table: pa.Table, stream: Any, repeats: bool) -> None:
    pq.write_table(table, stream, compression="zstd", use_dictionary=repeats)


def write_parquet(store: OutputStore, table: pa.Table, *parts: str, repeats: bool = False) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of it.

    Args:
        store: The output.
        table: Its rows.
        parts: Parts of its path.
        repeats: Whether values repeat, so that dictionaries are worth it; vectors do not.

    Raises:
        StorageError: The disk is full or not writable.
    """
    target = store.path(*parts)
    scratch = f"{target}.{uuid.uuid4().hex}.tmp" if store.is_local else target
    try:
        store.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        try:
            with store.fs.open(scratch, "wb") as stream:
                _encode(table, stream, repeats)
                if store.is_local:
                    stream.flush()
                    os.fsync(stream.fileno())
            if store.is_local:
                Path(scratch).replace(target)
        finally:
            if store.is_local:
                Path(scratch).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {store.url(*parts)}: {error.strerror or error}", "free disk space or mend the rights"
        ) from None

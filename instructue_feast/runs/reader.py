"""Reading finished runs, bucket by bucket, with the checks that a damaged file cannot pass."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from instructue_feast.errors import ConfigError, RunConflictError, StorageError, did_you_mean, listed
from instructue_feast.runs.audit import KEY_COLUMNS, bucket_digest, check_embeddings
from instructue_feast.runs.manifest import BucketMarker, RunManifest, from_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import bucket_folder, finished_buckets
from instructue_feast.schema import embeddings_schema


def finished_runs(store: OutputStore) -> list[str]:
    """Ids of all finished runs, oldest `as_of` first."""
    return [name for name in store.names("runs") if store.exists("runs", name, "manifest.json")]


def run_manifest(store: OutputStore, run_id: str) -> RunManifest:
    """The manifest of a finished run.

    Raises:
        ConfigError: No such run; the message lists those there are.
        RunConflictError: The run is not finished.
    """
    if run_id not in store.names("runs"):
        runs = finished_runs(store)
        hint = did_you_mean(run_id, runs) if runs else "no run is finished yet; run `instructue backfill`"
        raise ConfigError(f"unknown run {run_id!r}", hint)
    if not store.exists("runs", run_id, "manifest.json"):
        done = len(finished_buckets(store, run_id))
        raise RunConflictError(
            f"run {run_id} is not finished: it has {done} buckets and no manifest",
            "wait for its backfill, or start another one",
        )
    return from_json(RunManifest, store.read_json("runs", run_id, "manifest.json"), f"manifest of run {run_id}")


def read_bucket(store: OutputStore, run_id: str, bucket: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one bucket of a run; `columns` are column names of the file.

    Raises:
        StorageError: The file is missing, truncated or not Parquet.
    """
    parts = ("runs", run_id, bucket_folder(bucket), "part.parquet")
    try:
        # A handle, not a path: from the path Arrow would infer a partition column named bucket.
        with store.fs.open(store.path(*parts), "rb") as stream:
            return pq.ParquetFile(stream).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"run {run_id}, bucket {bucket}: {store.url(*parts)} is missing, truncated or not Parquet "
            f"({type(error).__name__})",
            "restore the file, or run the backfill again under another run id",
        ) from None


def verify_bucket(store: OutputStore, manifest: RunManifest, marker: BucketMarker) -> None:
    """Reads a bucket in full and raises unless it is what the manifest says.

    Raises:
        StorageError: The file is unreadable, or its rows, values or times are not those that were written.
        SchemaError: Other columns than the manifest's instructions.
        InvalidEmbeddingError: NaN, infinity, a vector that is not unit-norm or of another size.
    """
    where = f"run {manifest.run_id}, bucket {marker.bucket}"
    table = read_bucket(store, manifest.run_id, marker.bucket)
    check_embeddings(table, where, dim=manifest.embedding_dim)
    if sorted(table.schema.names) != sorted(embeddings_schema([one.id for one in manifest.instructions]).names):
        raise StorageError(
            f"{where}: columns {listed(table.schema.names)}, but the manifest names the instructions "
            f"{listed(one.id for one in manifest.instructions)}",
            "run the backfill again under another run id",
        )
    digest = bucket_digest(table)
    if digest != marker.digest or table.num_rows != marker.rows:
        raise StorageError(
            f"{where}: the file has changed since it was written ({table.num_rows} rows, digest {digest}; "
            f"the manifest says {marker.rows} rows, digest {marker.digest})",
            "restore the file, or run the backfill again under another run id",
        )
    times = pc.unique(table.column("event_timestamp")).cast(pa.string()).to_pylist()
    as_of = pa.scalar(manifest.as_of).cast(pa.timestamp("us", tz="UTC")).cast(pa.string()).as_py()
    if times not in ([], [as_of]):
        raise StorageError(
            f"{where}: event_timestamp is not the run's as_of {manifest.as_of} in every row",
            "run the backfill again under another run id",
        )


def read_run(
    store: OutputStore, run_id: str, columns: Sequence[str] | None = None, user_ids: Sequence[str] | None = None
) -> pa.Table:
    """Reads a finished run.

    Args:
        store: The project's output.
        run_id: The run.
        columns: Instruction ids to read; all of them for `None`. The key columns always come along.
        user_ids: Users to keep; all of them for `None`. Users the run does not know are simply not there.

    Returns:
        `schema.embeddings_schema(columns)`, in bucket order.

    Raises:
        ConfigError: Unknown run or instruction.
        RunConflictError: The run is not finished.
        StorageError: A file is missing or damaged.
    """
    manifest = run_manifest(store, run_id)
    known = [one.id for one in manifest.instructions]
    for name in columns or ():
        if name not in known:
            raise ConfigError(f"run {run_id} has no instruction {name!r}", did_you_mean(name, known))
    schema = embeddings_schema(known if columns is None else list(columns))
    wanted = None if user_ids is None else pa.array(list(user_ids), type=pa.string())
    tables = []
    for marker in manifest.buckets:
        table = read_bucket(store, run_id, marker.bucket, [*KEY_COLUMNS, *schema.names[len(KEY_COLUMNS) :]])
        if wanted is not None:
            table = table.filter(pc.is_in(table.column("user_id"), value_set=wanted))
        tables.append(table.select(schema.names).cast(schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()

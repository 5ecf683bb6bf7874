"""What of a run is done: the buckets whose files prove it, and the extract they were made of."""

from __future__ import annotations

from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from instructue_feast.errors import DataError, InvalidEmbeddingError, SchemaError, StorageError
from instructue_feast.runs.audit import bucket_digest
from instructue_feast.runs.manifest import BucketMarker, ExtractManifest, from_json
from instructue_feast.runs.reader import read_bucket
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_feast.runs.writer import bucket_folder, finished_buckets, write_bucket


def intact_buckets(store: OutputStore, run_id: str) -> list[BucketMarker]:
    """The finished buckets of a run whose file still holds what the marker says.

    The marker of any other bucket is removed, so that the bucket is computed again.
    """
    intact = []
    for name in store.names("runs", run_id):
        if not name.startswith("bucket=") or not store.exists("runs", run_id, name, "marker.json"):
            continue
        with suppress(StorageError, SchemaError, InvalidEmbeddingError):
            document = store.read_json("runs", run_id, name, "marker.json")
            marker = from_json(BucketMarker, document, f"marker of {run_id}/{name}")
            if name == bucket_folder(marker.bucket) and (
                bucket_digest(read_bucket(store, run_id, marker.bucket)) == marker.digest
            ):
                intact.append(marker)
                continue
        store.remove_file("runs", run_id, name, "marker.json")
    return intact


def extract_manifest(store: OutputStore, extract_id: str) -> ExtractManifest | None:
    """The manifest of an extract; `None` when it is not finished or not there."""
    if not store.exists("extracts", extract_id, "manifest.json"):
        return None
    document = store.read_json("extracts", extract_id, "manifest.json")
    return from_json(ExtractManifest, document, f"manifest of extract {extract_id}")


def complete_buckets(store: OutputStore, run_id: str, extract: ExtractManifest) -> list[BucketMarker]:
    """The markers of a run all of whose buckets are written; users erased meanwhile are taken out of them.

    Raises:
        DataError: Buckets or users are missing, or there are more than the extract has.
    """
    erased = Tombstones(store)
    markers = [_without_erased(store, run_id, marker, erased) for marker in finished_buckets(store, run_id)]
    if [marker.bucket for marker in markers] != list(range(extract.buckets)):
        raise DataError(
            f"run {run_id}: {len(markers)} buckets are written of {extract.buckets}", "resume the run to write the rest"
        )
    users = sum(marker.rows for marker in markers)
    expected = extract.users - (_erased_in(store, extract, erased) if len(erased) else 0)
    if users != expected:
        raise DataError(
            f"run {run_id}: {users} users embedded of {expected} extracted",
            "did somebody touch the extract? Run the backfill again",
        )
    return markers


def _without_erased(store: OutputStore, run_id: str, marker: BucketMarker, erased: Tombstones) -> BucketMarker:
    if not len(erased):
        return marker
    users = read_bucket(store, run_id, marker.bucket, ["user_id"]).column("user_id").to_pylist()
    mask = erased.contains(users)
    if not mask.any():
        return marker
    kept = read_bucket(store, run_id, marker.bucket).filter(pa.array(~mask))
    return write_bucket(
        store, run_id, marker.bucket, kept, tokens=marker.tokens, seconds=marker.seconds,
        carried=min(marker.carried, len(kept)), empty=min(marker.empty, len(kept)),
    )  # fmt: skip


def _erased_in(store: OutputStore, extract: ExtractManifest, erased: Tombstones) -> int:
    folder = store.path("extracts", extract.extract_id, "history")
    rows = ds.dataset(folder, filesystem=store.fs, format="parquet").scanner(columns=["user_id"])
    return sum(int(erased.contains(batch.column("user_id").to_pylist()).sum()) for batch in rows.to_batches())


def erased_users_in(store: OutputStore, run_id: str, markers: list[BucketMarker]) -> int:
    """How many rows of a run belong to users who were erased."""
    erased = Tombstones(store)
    if not len(erased):
        return 0
    tables = (read_bucket(store, run_id, marker.bucket, ["user_id"]) for marker in markers if marker.rows)
    return sum(int(erased.contains(pc.cast(one.column("user_id"), pa.string()).to_pylist()).sum()) for one in tables)

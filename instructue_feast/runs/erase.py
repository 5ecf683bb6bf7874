"""Taking users out of everything below an output: extracts, runs, publications, UserQA, search indexes.

Files are replaced one by one, each in one step, and documents after the files they describe, so an erasure that is cut
short leaves nothing half-written: running it again finishes it. Other users' rows are compared before and after.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from instructue_feast.errors import StorageError
from instructue_feast.runs.audit import bucket_digest, combine_digests
from instructue_feast.runs.publish import POINTER, pointer_lock
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones

Matcher = Callable[[pa.ChunkedArray], pa.ChunkedArray]
"""User ids -> which of them are to go."""

INDEXES = "indexes"
"""Folder of search indexes; one that knows an erased user is dropped whole, to be built again."""

_SCRATCH = ".erasing"
_PARTS = ("carried", "empty")
"""Counts of a bucket's users; nobody knows whether one who is gone was among them, so they become upper bounds."""
_AREAS = ("extracts", "runs", "published", "user_qa", INDEXES)


@dataclass(frozen=True, slots=True)
class ErasedFiles:
    """What was taken out of the files.

    Attributes:
        rows: Rows removed, by area.
        others: Rows of other users in the same files, compared bit by bit before and after.
        files: Files replaced.
        indexes: Search indexes dropped.
    """

    rows: dict[str, int] = field(default_factory=dict)
    others: int = 0
    files: int = 0
    indexes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FoundInFiles:
    """What a reading of all files found.

    Attributes:
        files: Parquet files with user ids that were read.
        rows: Rows in them.
        erased: Rows of erased users among them.
        unfinished: Runs without a manifest: a job may still be writing them.
    """

    files: int
    rows: int
    erased: int
    unfinished: list[str]


def matching(user_ids: Sequence[str]) -> Matcher:
    """Recognises users by their ids."""
    wanted = pa.array(list(user_ids), pa.string())
    return lambda column: pc.is_in(column.cast(pa.string()), value_set=wanted)


def matching_tombstones(tombstones: Tombstones) -> Matcher:
    """Recognises everybody who was ever erased, by hash."""

    def matches(column: pa.ChunkedArray) -> pa.ChunkedArray:
        users = column.cast(pa.string()).fill_null("").to_pylist()  # nobody's id is empty
        return pa.chunked_array([pa.array(tombstones.contains(users))])

    return matches


def erase_files(store: OutputStore, matches: Matcher) -> ErasedFiles:
    """Takes users out of every file below an output, and mends the documents that count them.

    Publishing waits meanwhile. A publication that was being prepared is caught by a second pass, or by `find_in_files`.

    Args:
        store: The project's output.
        matches: Who is to go.

    Raises:
        StorageError: A file cannot be read or written; what was done stays done, and doing it again goes on from there.
    """
    rows: Counter[str] = Counter()
    dropped: list[str] = []
    files = others = 0
    replaced: dict[int, str] = {}  # inode -> the path that has its successor
    with pointer_lock(store), _explained(store):
        _remove_scratch(store)
        for area, path in _user_files(store):
            if area == INDEXES:
                if _count(store, path, matches):
                    folder = path.rsplit("/", 1)[0]
                    store.fs.rm(folder, recursive=True)
                    dropped.append(folder.removeprefix(store.path(INDEXES) + "/"))
                continue
            inode = Path(path).stat().st_ino if store.is_local else None
            if inode is not None and inode in replaced:
                _relink(replaced[inode], path)
                files += 1
                continue
            removed, kept = _rewrite(store, path, matches)
            if removed:
                rows[area] += removed
                others += kept
                files += 1
                if inode is not None:
                    replaced[inode] = path
        _mend_extracts(store)
        _mend_runs(store)
        _mend_publications(store)
    return ErasedFiles(dict(rows), others, files, sorted(set(dropped)))


def _remove_scratch(store: OutputStore) -> None:
    """Removes half-written files that may hold users: of killed erasures, and of workers killed in finished runs."""
    if not store.is_local:
        return
    left = [path for area in _AREAS for path in Path(store.path(area)).rglob(f".*{_SCRATCH}")]
    for name in store.names("runs"):
        if store.exists("runs", name, "manifest.json"):
            left += Path(store.path("runs", name)).glob("bucket=*/part.parquet.*.tmp")
    for path in left:
        path.unlink(missing_ok=True)


def find_in_files(store: OutputStore, matches: Matcher) -> FoundInFiles:
    """Reads the user ids of every file again: the proof that nobody who was erased is left.

    Raises:
        StorageError: A file cannot be read.
    """
    files = total = erased = 0
    with _explained(store):
        for _, path in _user_files(store):
            column = _user_ids(store, path)
            files, total = files + 1, total + len(column)
            erased += pc.sum(matches(column)).as_py() or 0
    unfinished = [name for name in store.names("runs") if not store.exists("runs", name, "manifest.json")]
    return FoundInFiles(files, total, erased, unfinished)


def _user_files(store: OutputStore) -> Iterator[tuple[str, str]]:
    """Every Parquet file with a column `user_id`: its area and path."""
    store.fs.invalidate_cache()
    for area in _AREAS:
        for path in sorted(store.fs.find(store.path(area))) if store.exists(area) else ():
            if path.endswith(".parquet"):
                with store.fs.open(path, "rb") as stream:
                    names = pq.ParquetFile(stream).schema_arrow.names
                if "user_id" in names:
                    yield area, path


def _user_ids(store: OutputStore, path: str) -> pa.ChunkedArray:
    with store.fs.open(path, "rb") as stream:
        return pq.ParquetFile(stream).read(columns=["user_id"]).column("user_id")


def _count(store: OutputStore, path: str, matches: Matcher) -> int:
    return int(pc.sum(matches(_user_ids(store, path))).as_py() or 0)


def _rewrite(store: OutputStore, path: str, matches: Matcher) -> tuple[int, int]:
    """Replaces a file by one without the users; returns how many rows went and how many stayed."""
    if not _count(store, path, matches):
        return 0, 0
    with store.fs.open(path, "rb") as stream:
        table = pq.ParquetFile(stream).read()
    mask = pc.fill_null(matches(table.column("user_id")), False)
    kept = table.filter(pc.invert(mask))
    scratch = _scratch(path) if store.is_local else path
    try:
        with store.fs.open(scratch, "wb") as stream:
            pq.write_table(kept, stream, compression="zstd", use_dictionary=False)
            if store.is_local:
                stream.flush()
                os.fsync(stream.fileno())
        with store.fs.open(scratch, "rb") as stream:
            if not _same_rows(pq.ParquetFile(stream).read(), kept):
                raise StorageError(f"{path} was not written as intended", "is the disk sound? Erase again")
        if store.is_local:
            # Hadoop's checksum of the old file would make Spark refuse the new one.
            Path(path).with_name(f".{Path(path).name}.crc").unlink(missing_ok=True)
            Path(scratch).replace(path)
    finally:
        if store.is_local:
            Path(scratch).unlink(missing_ok=True)
    return table.num_rows - kept.num_rows, kept.num_rows


def _same_rows(left: pa.Table, right: pa.Table) -> bool:
    """Equality of values, bit by bit: NaN equals NaN."""
    if left.schema.names != right.schema.names or left.num_rows != right.num_rows:
        return False
    plain = [table.combine_chunks().to_batches() for table in (left, right)]
    sinks = []
    for batches in plain:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, right.schema.remove_metadata()) as writer:
            for batch in batches:
                writer.write_batch(batch.cast(right.schema.remove_metadata()))
        sinks.append(sink.getvalue())
    return bool(sinks[0].equals(sinks[1]))


def _relink(source: str, path: str) -> None:
    scratch = _scratch(path)
    try:
        os.link(source, scratch)
    except OSError:
        shutil.copyfile(source, scratch)
    Path(scratch).replace(path)


def _scratch(path: str) -> str:
    """A hidden file beside one that is replaced: no reader of the folder takes it for data."""
    return f"{Path(path).parent}/.{Path(path).name}.{uuid.uuid4().hex}{_SCRATCH}"


def _rows(store: OutputStore, path: str) -> int:
    with store.fs.open(path, "rb") as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def _mend_extracts(store: OutputStore) -> None:
    for name in store.names("extracts"):
        if store.exists("extracts", name, "manifest.json"):
            document = store.read_json("extracts", name, "manifest.json")
            users = sum(_rows(store, path) for path in store.files("extracts", name, "history", "bucket=*"))
            if document["users"] != users:
                store.write_json({**document, "users": users}, "extracts", name, "manifest.json")


def _mend_runs(store: OutputStore) -> None:
    """Markers first, the manifest after them; each says what its files hold now."""
    for name in store.names("runs"):
        markers: dict[int, dict[str, Any]] = {}
        for folder in store.names("runs", name):
            if not store.exists("runs", name, folder, "marker.json"):
                continue
            marker = store.read_json("runs", name, folder, "marker.json")
            path = store.path("runs", name, folder, "part.parquet")
            if store.fs.exists(path) and _rows(store, path) != marker["rows"]:
                with store.fs.open(path, "rb") as stream:
                    table = pq.ParquetFile(stream).read()
                marker |= {"rows": table.num_rows, "digest": bucket_digest(table)}
                marker |= {name: min(marker.get(name, 0), table.num_rows) for name in _PARTS}
                store.write_json(marker, "runs", name, folder, "marker.json")
            markers[marker["bucket"]] = marker
        if not store.exists("runs", name, "manifest.json"):
            continue
        document = store.read_json("runs", name, "manifest.json")
        named = {one["bucket"]: one for one in document["buckets"]}
        changed = [one for one in named if one in markers and markers[one]["digest"] != named[one]["digest"]]
        if changed:
            buckets = [
                one | {name: markers[one["bucket"]].get(name, 0) for name in ("rows", "digest", *_PARTS)}
                if one["bucket"] in markers
                else one
                for one in document["buckets"]
            ]
            users, digest = sum(one["rows"] for one in buckets), combine_digests(one["digest"] for one in buckets)
            document |= {"buckets": buckets, "users": users, "digest": digest}
            document |= {name: sum(one.get(name, 0) for one in buckets) for name in _PARTS}
            store.write_json(document, "runs", name, "manifest.json")


def _mend_publications(store: OutputStore) -> None:
    """Counts of rows in each publication's document, and in the pointer, which holds the same document."""
    pointer = store.read_json(POINTER) if store.exists(POINTER) else None
    for name in store.names("published"):
        if not store.exists("published", name, "publication.json"):
            continue
        document = store.read_json("published", name, "publication.json")
        before = json.dumps(document, sort_keys=True)
        for view in document["views"]:
            counts: Counter[str] = Counter()
            for file in store.names("published", name, view["name"]):
                counts[file.rpartition("-")[0]] += _rows(store, store.path("published", name, view["name"], file))
            for run in view["runs"]:
                run["rows"] = counts[run["run_id"]]
        for history in document.get("histories", []):
            folder = ("published", name, history["name"])
            history["rows"] = sum(_rows(store, store.path(*folder, file)) for file in store.names(*folder))
        if json.dumps(document, sort_keys=True) != before:
            store.write_json(document, "published", name, "publication.json")
        if pointer and pointer["id"] == name and pointer != document:
            store.write_json(document, POINTER)


@contextlib.contextmanager
def _explained(store: OutputStore) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"a file below {store.root} cannot be read or replaced: {type(error).__name__}",
            "free disk space or mend the rights, then erase again: it goes on where it stopped",
        ) from None

"""`OutputStore`: the folder tree a project writes, on any fsspec URL.

    <root>/extracts/<extract_id>/       history/bucket=*/  phrasebook/  quarantine/  manifest.json
    <root>/event_vectors/<encoder>/     <run_id>/part-*.parquet, complete when _SUCCESS is there
    <root>/runs/<run_id>/               ledger.json  bucket=*/{part.parquet,marker.json}  manifest.json  quality/
    <root>/published/<publication>/     <feature view>/<run_id>-<bucket>.parquet
    <root>/published.json               the pointer, moved in one step
    <root>/tombstones/                  erased users, as salted hashes

Everything but the pointer is immutable once its manifest or marker, always written last, is there.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec

from instructue_feast.errors import MissingDependencyError, RunConflictError, StorageError


class OutputStore:
    """File operations below one root.

    Args:
        root: A local path or an fsspec URL.

    Raises:
        MissingDependencyError: The URL's protocol needs a package that is not installed.
        StorageError: A write fails, because the disk is full or the location is not writable.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        try:
            self.fs, self._base = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise MissingDependencyError(
                f"cannot open {self.root.split('://')[0]}:// : {error}",
                "install the fsspec package of that store: s3fs, gcsfs, adlfs, ...",
            ) from None
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def url(self, *parts: str) -> str:
        """Full URL of a path below the root; what Spark and pyarrow are given."""
        return "/".join((self.root, *parts))

    def path(self, *parts: str) -> str:
        """The same as `url`, without the protocol; what `fs` is given."""
        return "/".join((self._base, *parts))

    def exists(self, *parts: str) -> bool:
        """Whether something is there."""
        return bool(self.fs.exists(self.path(*parts)))

    def names(self, *parts: str) -> list[str]:
        """Names inside a folder, sorted; empty when there is no such folder."""
        folder = self.path(*parts)
        if not self.fs.isdir(folder):
            return []
        self.fs.invalidate_cache()
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(folder, detail=False))

    def files(self, *parts: str, pattern: str = "*.parquet") -> list[str]:
        """Paths of the files of a folder that match, sorted."""
        self.fs.invalidate_cache()
        return sorted(str(one) for one in self.fs.glob(f"{self.path(*parts)}/{pattern}"))

    def read_json(self, *parts: str) -> dict[str, Any]:
        """Reads a JSON document.

        Raises:
            StorageError: It is missing or not JSON.
        """
        try:
            with self.fs.open(self.path(*parts), "rb") as stream:
                return dict(json.load(stream))
        except (OSError, ValueError) as error:
            raise StorageError(
                f"cannot read {self.url(*parts)}: {type(error).__name__}", "is the job that writes it done?"
            ) from None

    def write_json(self, value: dict[str, Any], *parts: str) -> None:
        """Writes a JSON document so that a reader sees the old one or the new one, never half of it."""
        target = self.path(*parts)
        data = (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
        try:
            self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if not self.is_local:  # object stores replace an object in one step
                self.fs.pipe_file(target, data)
                return
            scratch = f"{target}.{uuid.uuid4().hex}.tmp"
            try:
                with Path(scratch).open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(scratch).replace(target)
            finally:
                Path(scratch).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.url(*parts)}: {error.strerror}", "free disk space or mend the rights"
            ) from None

    def claim(self, owner: dict[str, Any], *parts: str) -> None:
        """Creates a document that must not exist yet; exactly one of two concurrent callers succeeds locally.

        Raises:
            RunConflictError: It exists.
        """
        target = self.path(*parts)
        data = json.dumps(owner, sort_keys=True).encode()
        try:
            self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if self.is_local:
                with Path(target).open("xb") as stream:
                    stream.write(data)
            else:
                self.fs.pipe_file(target, data, mode="create")
        except FileExistsError:
            raise RunConflictError(
                f"{self.url(*parts[:-1])} belongs to another process or is finished",
                "wait for it, or choose another id",
            ) from None
        except OSError as error:
            raise StorageError(
                f"cannot write {self.url(*parts)}: {error.strerror}", "free disk space or mend the rights"
            ) from None

    def remove_file(self, *parts: str) -> None:
        """Removes one file, if it is there."""
        if self.exists(*parts):
            self.fs.rm_file(self.path(*parts))

    def remove(self, *parts: str) -> None:
        """Removes a folder tree, if it is there."""
        if self.exists(*parts):
            self.fs.rm(self.path(*parts), recursive=True)

    def move(self, source: tuple[str, ...], target: tuple[str, ...]) -> None:
        """Moves a folder tree; in one step on a local file system, file by file on an object store."""
        self.fs.makedirs(self.path(*target[:-1]), exist_ok=True)
        self.fs.mv(self.path(*source), self.path(*target), recursive=True)

    def require_free(self, gib: float) -> None:
        """Refuses to start a job that would fill the disk.

        Raises:
            StorageError: Less than `gib` GiB are free. Only local file systems are checked.
        """
        if not self.is_local:
            return
        folder = Path(self._base)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        if free < gib:
            raise StorageError(
                f"{free:.1f} GiB are free at {self.root}, the job wants {gib:.1f}",
                "free disk space, move `output.path`, or lower `output.min_free_gib`",
            )

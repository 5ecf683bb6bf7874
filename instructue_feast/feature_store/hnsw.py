"""An approximate index per view (usearch's HNSW), for more users than a matrix product per query can bear.

<root>/indexes/<view>/<run>/index.usearch, users.parquet     and index.json, written last
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.errors import ConfigError, MissingDependencyError, StorageError
from instructue_feast.runs.erase import INDEXES
from instructue_feast.runs.publish import PublishedView
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.vectors import ViewVectors

CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 32, 256, 128
"""Edges per user, and candidates looked at when adding and searching: recall@10 of 0.95 and more (docs/search.md)."""


@dataclass(frozen=True, slots=True)
class UserIndex:
    """An opened index; `user_ids` stand in the order of its keys."""

    index: Any
    user_ids: pa.Array

    def search(self, vector: npt.NDArray[np.float32], k: int) -> tuple[list[str], npt.NDArray[np.float32]]:
        """Ids and cosines of about the k nearest, the best first."""
        found = self.index.search(vector, min(k, len(self.user_ids)))
        rows = np.asarray(found.keys, np.int64)
        return self.user_ids.take(pa.array(rows)).to_pylist(), 1.0 - np.asarray(found.distances, np.float32)


def build_index(store: OutputStore, view: ViewVectors) -> str:
    """Builds and saves the index of a view's newest run; replaces one that is there. Returns its folder.

    Raises:
        ConfigError: The view has no users.
        MissingDependencyError: The extra `search` is not installed.
        StorageError: It cannot be written.
    """
    if not len(view.user_ids):
        raise ConfigError(f"view {view.view.name} has no users", "publish a run with some")
    folder = (INDEXES, view.view.name, view.view.newest.run_id)
    index = _new(view.vectors.shape[1])
    index.add(np.arange(len(view.user_ids), dtype=np.uint64), np.ascontiguousarray(view.vectors, np.float32))
    try:
        store.remove(*folder)
        store.fs.makedirs(store.path(*folder), exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "index.usearch"
            index.save(str(file))
            store.fs.put_file(str(file), store.path(*folder, file.name))
        with store.fs.open(store.path(*folder, "users.parquet"), "wb") as stream:
            pq.write_table(pa.table({"user_id": view.user_ids}), stream, compression="zstd")
    except OSError as error:
        raise StorageError(
            f"cannot write {store.url(*folder)}: {error.strerror or error}", "free disk space or mend the rights"
        ) from None
    store.write_json({"view": view.view.name, "run": folder[2], "users": len(view.user_ids)}, *folder, "index.json")
    for name in store.names(*folder[:2]):
        if name != folder[2]:
            store.remove(*folder[:2], name)
    return store.url(*folder)


def open_index(store: OutputStore, view: PublishedView) -> UserIndex:
    """Opens the index of a view's newest run.

    Raises:
        ConfigError: There is none: it was never built, is of another run, or an erasure dropped it.
        MissingDependencyError: The extra `search` is not installed.
        StorageError: It cannot be read.
    """
    folder = (INDEXES, view.name, view.newest.run_id)
    if not store.exists(*folder, "index.json"):
        raise ConfigError(
            f"view {view.name} has no index of run {view.newest.run_id}",
            f"build it with `instructue index --instruction {view.instruction}`, or search exactly",
        )
    index = _new(view.embedding_dim)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "index.usearch"
            store.fs.get_file(store.path(*folder, file.name), str(file))
            index.load(str(file))
        with store.fs.open(store.path(*folder, "users.parquet"), "rb") as stream:
            users = pq.ParquetFile(stream).read().column("user_id").combine_chunks()
    except (OSError, RuntimeError, pa.ArrowException) as error:
        raise StorageError(
            f"{store.url(*folder)} cannot be read: {type(error).__name__}", "build it again with `instructue index`"
        ) from None
    if len(index) != len(users):
        raise StorageError(f"{store.url(*folder)} is damaged", "build it again with `instructue index`")
    return UserIndex(index, users)


def _new(dim: int) -> Any:
    try:
        from usearch.index import Index
    except ImportError as error:
        raise MissingDependencyError(
            f"an approximate index needs usearch: {error}", "pip install 'instructue-feast[search]', or search exactly"
        ) from None
    return Index(
        ndim=dim, metric="cos", dtype="f32", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )  # fmt: skip

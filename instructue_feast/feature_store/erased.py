"""Users who are erased while a materialization runs must not come back with it.

An erasure writes its tombstones first and then deletes. So rows written before its deletion are deleted by it; whoever
writes after that finds the tombstone when looking after the write, and deletes what it wrote itself.
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
from feast import FeatureView, RepoConfig

from instructue_feast.feature_store.online import EmbeddingStore
from instructue_feast.feature_store.scan import Batch
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones

_CHECK_SECONDS = 1.0


class ErasedUsers:
    """Keeps erased users out of one view of an online store, for as long as it is being written.

    A process that is killed between a write and the look after it, at most a second of writing, may leave a user
    behind; `instructue erase --sweep` finds them.

    Args:
        location: Where the view's files are: `<root>/published/<publication>/<view>`; no others have tombstones.
        store: The online store; only ours can delete.
    """

    def __init__(self, location: str, config: RepoConfig, view: FeatureView, store: object) -> None:
        root, published, _ = location.rpartition("/published/")
        self._output = OutputStore(root) if published else None
        self._config, self._view, self._online = config, view, store
        self._names: list[str] = []
        self._tombstones: Tombstones | None = None
        self._written: list[pa.Array] = []
        self._read()
        self._filtered_by, self._check_at = self._names, time.monotonic() + _CHECK_SECONDS

    def without(self, batch: Batch) -> Batch:
        """A batch without those erased before the view was begun."""
        if self._tombstones is None:
            return batch
        erased = self._tombstones.contains(batch.ids.to_pylist())
        return batch.take(np.flatnonzero(~erased)) if erased.any() else batch

    def wrote(self, ids: pa.Array, *, last: bool = False) -> int:
        """Tells which users have been written; now and then, and at the end, removes those erased since.

        Returns:
            How many rows were removed.
        """
        self._written.append(ids)
        if self._output is None or not (last or time.monotonic() >= self._check_at):
            return 0
        written, self._written = pa.concat_arrays(self._written).to_pylist(), []
        self._read()
        self._check_at = time.monotonic() + _CHECK_SECONDS
        if self._names == self._filtered_by or self._tombstones is None or not isinstance(self._online, EmbeddingStore):
            return 0
        gone = [user for user, erased in zip(written, self._tombstones.contains(written), strict=True) if erased]
        return self._online.delete_entities(self._config, [self._view], gone) if gone else 0

    def _read(self) -> None:
        names = self._output.names("tombstones") if self._output else []
        if self._output and names != self._names:
            self._names, self._tombstones = names, Tombstones(self._output)

"""Item embeddings: texts of items through the answer tower of a model, next to the runs of that model.

<root>/items/<model version8>/items.parquet     item_id, event_timestamp, created, item_embedding
<root>/items/<model version8>/manifest.json     which model, how many, when; written last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.errors import ConfigError, DataError, StorageError
from instructue_feast.runs.audit import check_vectors, vector_matrix
from instructue_feast.runs.manifest import from_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import write_parquet
from instructue_feast.schema import TIMESTAMP

FEATURE = "item_embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemsManifest:
    """What `manifest.json` holds."""

    model_version: str
    items: int
    embedding_dim: int
    created: str

    @property
    def view(self) -> str:
        """Name of the feature view."""
        return f"items__{self.model_version[:8]}"


def write_items(
    store: OutputStore, model_version: str, item_ids: Sequence[str], vectors: npt.NDArray[np.float32]
) -> ItemsManifest:
    """Replaces the item embeddings of a model version, in one step.

    Args:
        store: The project's output.
        model_version: Of the model that made them.
        item_ids: I ids, each once.
        vectors: `[I, D]` float32, unit-norm.

    Raises:
        DataError: No item, an empty id or one twice.
        InvalidEmbeddingError: A vector is not finite or not of unit length.
        StorageError: It cannot be written.
    """
    ids = list(item_ids)
    if not ids or len(set(ids)) != len(ids) or not all(one.strip() for one in ids):
        raise DataError(f"{len(ids)} items, {len(set(ids))} distinct ids, some may be blank", "give each item one id")
    check_vectors(vectors, "items")
    now = datetime.now(UTC)
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    times = pa.array([now] * len(ids), TIMESTAMP)
    table = pa.table(
        {
            "item_id": pa.array(ids, pa.string()),
            "event_timestamp": times,
            "created": times,
            FEATURE: pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel(), pa.float32())),
        }
    )
    manifest = ItemsManifest(
        model_version=model_version, items=len(ids), embedding_dim=vectors.shape[1], created=now.isoformat()
    )
    folder = ("items", model_version[:8])
    write_parquet(store, table, *folder, "items.parquet")
    store.write_json(asdict(manifest), *folder, "manifest.json")
    return manifest


def item_sets(store: OutputStore) -> list[ItemsManifest]:
    """All sets of item embeddings, one per model version."""
    return [
        from_json(ItemsManifest, store.read_json("items", name, "manifest.json"), f"items {name}")
        for name in store.names("items")
        if store.exists("items", name, "manifest.json")
    ]


def read_items(store: OutputStore, model_version: str) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Ids and `[I, D]` vectors of a model version's items.

    Raises:
        ConfigError: There are none.
        StorageError: The file is damaged.
    """
    folder = ("items", model_version[:8])
    if not store.exists(*folder, "manifest.json"):
        raise ConfigError(
            f"there are no item embeddings of model version {model_version[:8]}", "make them with `instructue items`"
        )
    try:
        with store.fs.open(store.path(*folder, "items.parquet"), "rb") as stream:
            table = pq.ParquetFile(stream).read(columns=["item_id", FEATURE])
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{store.url(*folder)} cannot be read: {type(error).__name__}", "make them again with `instructue items`"
        ) from None
    return table.column("item_id").to_pylist(), vector_matrix(table, FEATURE, "items")

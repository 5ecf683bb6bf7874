"""Reading a finished extract: packed histories and the phrasebook, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, DataError, StorageError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.runs.manifest import ExtractManifest, from_json
from instructue_feast.runs.store import OutputStore

# U = users, N = texts


@dataclass(frozen=True, slots=True)
class Phrasebook:
    """N distinct texts.

    Attributes:
        text_ids: `[N]` int64, ascending.
        source_index: `[N]` int32.
        texts: N texts.
    """

    text_ids: npt.NDArray[np.int64]
    source_index: npt.NDArray[np.int32]
    texts: tuple[str, ...]

    def rows(self, text_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each text id.

        Raises:
            DataError: An id is not in the phrasebook.
        """
        rows = np.searchsorted(self.text_ids, text_ids)
        known = rows < len(self.text_ids)
        known[known] = self.text_ids[rows[known]] == text_ids[known]
        if not known.all():
            raise DataError(
                f"{int((~known).sum())} of {len(text_ids)} text ids are not in the phrasebook", "extract again"
            )
        return rows

    def with_texts(
        self, text_ids: npt.NDArray[np.int64], source_index: npt.NDArray[np.int32], texts: Sequence[str]
    ) -> Phrasebook:
        """This phrasebook and some texts more; one that is there already stays as it is."""
        ids, first = np.unique(np.concatenate([self.text_ids, text_ids]), return_index=True)
        sources = np.concatenate([self.source_index, source_index])[first].astype(np.int32)
        words = [*self.texts, *texts]
        return Phrasebook(ids, sources, tuple(words[row] for row in first))


def find_extract(config: InstructueConfig, as_of: datetime) -> str | None:
    """Id of a finished extract of this config at `as_of`; the first by name, `None` without one."""
    store = OutputStore(config.output.path)
    for name in store.names("extracts"):
        if not store.exists("extracts", name, "manifest.json"):
            continue
        manifest = extract_manifest(store, name)
        same = manifest.history_digest == config.history_digest()
        if same and datetime.fromisoformat(manifest.as_of) == as_of:
            return name
    return None


def latest_extract(config: InstructueConfig) -> str:
    """Id of the finished extract of this config with the latest `as_of`.

    Raises:
        ConfigError: There is none.
    """
    store = OutputStore(config.output.path)
    found = []
    for name in store.names("extracts"):
        if store.exists("extracts", name, "manifest.json"):
            manifest = extract_manifest(store, name)
            if manifest.history_digest == config.history_digest():
                found.append((datetime.fromisoformat(manifest.as_of), name))
    if not found:
        raise ConfigError("the project has no finished extract of these history settings", "pass --as-of to make one")
    return max(found)[1]


def extract_manifest(store: OutputStore, extract_id: str) -> ExtractManifest:
    """The manifest of a finished extract.

    Raises:
        StorageError: There is none.
        SchemaError: It was written by another release.
    """
    return from_json(
        ExtractManifest, store.read_json("extracts", extract_id, "manifest.json"), f"manifest of extract {extract_id}"
    )


def read_extract(config: InstructueConfig, extract_id: str) -> tuple[PackedHistory, Phrasebook]:
    """Packed histories of all users, ascending by user id, and their texts.

    Raises:
        StorageError: A file is missing or damaged.
        SchemaError: The extract was made with another config.
    """
    store = OutputStore(config.output.path)
    files = store.files("extracts", extract_id, "history", "bucket=*")
    try:
        # Without a partitioning: from the path Arrow would infer a column named bucket.
        table = ds.dataset(files, filesystem=store.fs, format="parquet", partitioning=None).to_table()
        book = ds.dataset(store.files("extracts", extract_id, "phrasebook"), filesystem=store.fs).to_table()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"extract {extract_id} cannot be read: {type(error).__name__}", "extract again under another id"
        ) from None
    history = PackedHistory.from_arrow(
        table.sort_by("user_id"), num_sources=len(config.source_names), num_numeric=len(config.numeric_columns)
    )
    book = book.sort_by("text_id")
    index = {name: position for position, name in enumerate(config.source_names)}
    sources = np.array([index[name] for name in book.column("source").to_pylist()], np.int32)
    return history, Phrasebook(book.column("text_id").to_numpy(), sources, tuple(book.column("text").to_pylist()))


def users_in_order(history: PackedHistory, user_ids: Sequence[str]) -> PackedHistory:
    """The histories of the given users, in that order.

    Raises:
        DataError: Some have no packed history; the message counts them.
    """
    row = {user: position for position, user in enumerate(history.user_ids)}
    unknown = sum(user not in row for user in user_ids)
    if unknown:
        raise DataError(
            f"{unknown} of {len(user_ids)} users are not among the {len(history)} of the extract",
            "use user ids of this project, and an as_of at which they are in the roster",
        )
    return history.take([row[user] for user in user_ids])

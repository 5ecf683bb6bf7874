"""The vectors of a published view, in memory: what search, drift and parity checks work on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.errors import ConfigError, StorageError, did_you_mean
from instructue_feast.runs.audit import vector_matrix
from instructue_feast.runs.publish import Publication, PublishedView, current_publication
from instructue_feast.runs.store import OutputStore

# U = users, D = embedding_dim


@dataclass(frozen=True, slots=True)
class ViewVectors:
    """The newest run of a view.

    Attributes:
        view: The view.
        user_ids: U ids, as an Arrow array: millions of Python strings would take more than their vectors.
        vectors: `[U, D]` float32, unit-norm.
    """

    view: PublishedView
    user_ids: pa.Array
    vectors: npt.NDArray[np.float32]


def publication_of(store: OutputStore) -> Publication:
    """The current publication.

    Raises:
        ConfigError: Nothing is published.
    """
    publication = current_publication(store)
    if publication is None:
        raise ConfigError(
            "nothing is published yet", "run `instructue backfill` first; it publishes unless told not to"
        )
    return publication


def published_view(publication: Publication, name: str) -> PublishedView:
    """A view by its name, or the current one of an instruction.

    Raises:
        ConfigError: There is neither.
    """
    if name in publication.current:
        return publication.view(publication.current[name])
    known = [view.name for view in publication.views]
    if name not in known:
        raise ConfigError(f"there is no published view {name!r}", did_you_mean(name, [*publication.current, *known]))
    return publication.view(name)


def read_view(store: OutputStore, publication: Publication, view: PublishedView) -> ViewVectors:
    """Reads the newest run of a view.

    Raises:
        StorageError: A file is missing or damaged.
    """
    folder = ("published", publication.id, view.name)
    ids, parts = [], []
    for name in store.names(*folder):
        if name.rpartition("-")[0] != view.newest.run_id:
            continue
        try:
            with store.fs.open(store.path(*folder, name), "rb") as stream:
                table = pq.ParquetFile(stream).read(columns=["user_id", view.instruction])
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"{store.url(*folder, name)} cannot be read: {type(error).__name__}",
                "publish the run again; a publication may also have been pruned meanwhile",
            ) from None
        if len(table):
            ids.append(table.column("user_id").combine_chunks())
            parts.append(vector_matrix(table, view.instruction, view.name))
    if not parts:
        return ViewVectors(view, pa.array([], pa.string()), np.empty((0, view.embedding_dim), np.float32))
    return ViewVectors(view, pa.concat_arrays(ids), np.concatenate(parts))

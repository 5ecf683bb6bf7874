"""What an online store may still hold of a publication that was taken back, and how it is got rid of.

Our stores never replace newer with older. After a rollback the newer is what must go: the runs between the publication
that is current again and the one it was taken back from.
"""

from __future__ import annotations

from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureStore

from instructue_feast.errors import StorageError
from instructue_feast.feature_store.online import EmbeddingStore, online_store
from instructue_feast.runs.histories import PublishedHistory
from instructue_feast.runs.publish import Publication, PublishedView, stored_publications
from instructue_feast.runs.store import OutputStore

PublicationRun = tuple[str, str]
"""A publication, and the run of it that a view holds as its newest."""


def withdrawn_runs(
    output: OutputStore, publication: Publication, view: PublishedView | PublishedHistory
) -> list[PublicationRun]:
    """Runs of a view that other publications on disk hold and that are newer than what is current."""
    found = []
    for one in stored_publications(output):
        others: list[PublishedView | PublishedHistory] = [*one.views, *one.histories]
        for other in others:
            if other.name == view.name and _age(one, other) > _age(publication, view):
                found.append((one.id, _newest(other)[1]))
    return found


def remove_withdrawn_users(
    store: FeatureStore,
    output: OutputStore,
    publication: Publication,
    view: PublishedView | PublishedHistory,
    withdrawn: list[PublicationRun],
) -> None:
    """Removes users that only the withdrawn runs have from a view in an online store of ours.

    Raises:
        StorageError: A published file cannot be read.
    """
    online = online_store(store)
    if not withdrawn or not isinstance(online, EmbeddingStore):
        return
    kept = _users(output, publication.id, view.name, _newest(view)[1])
    registered = store.registry.get_feature_view(view.name, store.project)
    for name, run_id in withdrawn:
        users = _users(output, name, view.name, run_id)
        gone = users.filter(pc.invert(pc.is_in(users, value_set=kept)))
        online.delete_entities(store.config, [registered], gone.to_pylist())


def _newest(view: PublishedView | PublishedHistory) -> tuple[str, str]:
    run = view.newest if isinstance(view, PublishedView) else view
    return run.as_of, run.run_id


def _age(publication: Publication, view: PublishedView | PublishedHistory) -> tuple[datetime, str]:
    return datetime.fromisoformat(_newest(view)[0]), publication.id


def _users(output: OutputStore, publication: str, view: str, run_id: str) -> pa.Array:
    found = [pa.array([], pa.string())]
    for name in output.names("published", publication, view):
        if name.rpartition("-")[0] != run_id:
            continue
        try:
            with output.fs.open(output.path("published", publication, view, name), "rb") as stream:
                column = pq.ParquetFile(stream).read(columns=["user_id"]).column("user_id")
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"a file of view {view} cannot be read: {type(error).__name__}", "publish the run again"
            ) from None
        found.append(column.cast(pa.string()).combine_chunks())
    return pa.concat_arrays(found)

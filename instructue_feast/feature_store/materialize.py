"""From the current publication into the online store, with counts and proof."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, PublishConflictError, StorageError, VersionMismatchError
from instructue_feast.feature_store.histories import read_histories
from instructue_feast.feature_store.lookup import read_stored, served_view
from instructue_feast.feature_store.online import OWNER, OWNER_TAG
from instructue_feast.feature_store.session import open_store, overwriting, quiet
from instructue_feast.feature_store.views import feature_views
from instructue_feast.feature_store.wire import Storage, as_stored
from instructue_feast.feature_store.withdrawn import remove_withdrawn_users, withdrawn_runs
from instructue_feast.runs.audit import vector_matrix
from instructue_feast.runs.histories import FEATURE, PublishedHistory
from instructue_feast.runs.items import FEATURE as ITEM_FEATURE
from instructue_feast.runs.items import item_sets
from instructue_feast.runs.publish import Publication, PublishedView, current_publication
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones

CONFIG_NAME = "instructue.yaml"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SAMPLED_FILES = 4
_SAMPLED_ROWS = 16  # of each sampled file


@dataclass(frozen=True, slots=True)
class MaterializedView:
    """One view in the online store: `rows` users of the run with that `as_of`, written in `seconds`.

    `instruction` is `packed_history` for packed histories and `item_embedding` for items.
    """

    name: str
    rows: int
    seconds: float
    instruction: str
    as_of: str


def apply_repo(repo: Path | str) -> list[str]:
    """Registers the current publication, as `feast apply` does, in this process.

    Objects of earlier publications that are gone are removed along with their online data. Objects that do not come
    from this package are never touched; `feast apply` is there for those.

    Args:
        repo: Folder with `feature_store.yaml` and `instructue.yaml`.

    Returns:
        Names of the registered feature views.

    Raises:
        ConfigError: The folder is not such a repo, or nothing is published yet.
    """
    folder = Path(repo).resolve()
    store = open_store(folder)
    if current_publication(_output(folder)) is None:
        raise ConfigError(
            "nothing is published yet", "run `instructue backfill` first; it publishes unless told not to"
        )
    wanted = feature_views(folder / CONFIG_NAME)
    with quiet():
        registry, project = store.registry, store.project
        old = [
            *registry.list_feature_services(project),
            *registry.list_feature_views(project),
            *registry.list_data_sources(project),
            *registry.list_entities(project),
        ]
        sources = {view.batch_source.name for view in wanted.values() if isinstance(view, FeatureView)}
        gone = [
            one
            for one in old
            if one.tags.get(OWNER_TAG) == OWNER and one.name not in wanted and one.name not in sources
        ]
        store.apply(list(wanted.values()), objects_to_delete=gone, partial=False)
    return [name for name, one in wanted.items() if isinstance(one, FeatureView)]


def materialize(
    repo: Path | str, *, on_view: Callable[[MaterializedView], None] | None = None
) -> list[MaterializedView]:
    """Writes the newest run of every current view into the online store and checks that it is served.

    Each view gets an explicit window that holds exactly the `as_of` of its newest run. (An incremental materialization
    never goes back, so it would miss a run published late.) The views before the current ones keep the online data they
    have, for a rollback. After a rollback the online store goes back too: newer rows are replaced, and users whom only
    the withdrawn runs have are removed.

    Args:
        repo: Folder with `feature_store.yaml` and `instructue.yaml`; `apply_repo` must have registered the publication.
        on_view: Called after each view.

    Returns:
        One entry per current view, then the packed histories and the items of the current model.

    Raises:
        ConfigError: Nothing is published.
        VersionMismatchError: The registry does not hold the current publication.
        StorageError: The online store does not serve what was written.
        PublishConflictError: Another run was published meanwhile.
    """
    folder = Path(repo).resolve()
    output = _output(folder)
    publication = current_publication(output)
    if publication is None:
        raise ConfigError(
            "nothing is published yet", "run `instructue backfill` first; it publishes unless told not to"
        )
    store = open_store(folder)
    _check_registry(store, publication)
    # Redis skips a write whose event time is not newer, so a run published again for the same `as_of` would be lost.
    # Only the newest run of each view is ever written here, so nothing newer can be overwritten.
    if hasattr(store.config.online_store, "skip_dedup"):
        store.config.online_store.skip_dedup = True
    done = []
    for view in publication.current_views:
        started = time.monotonic()
        _write(store, output, publication, view, view.newest.as_of)
        rows = _verify(store, output, publication, view)
        seconds = round(time.monotonic() - started, 3)
        result = MaterializedView(view.name, rows, seconds, view.instruction, view.newest.as_of)
        done.append(result)
        if on_view:
            on_view(result)
    history = next((one for one in publication.histories if one.name == publication.current_history), None)
    if history:
        started = time.monotonic()
        _write(store, output, publication, history, history.as_of)
        _verify_histories(store, output, publication, history)
        seconds = round(time.monotonic() - started, 3)
        done.append(MaterializedView(history.name, history.rows, seconds, FEATURE, history.as_of))
        if on_view:
            on_view(done[-1])
    models = {view.model_version for view in publication.current_views}
    for items in item_sets(output):
        if items.model_version in models and items.view in registered_views(store):
            started, made = time.monotonic(), datetime.fromisoformat(items.created)
            with quiet():
                store.materialize(made - timedelta(seconds=1), made, feature_views=[items.view])
            seconds = round(time.monotonic() - started, 3)
            done.append(MaterializedView(items.view, items.items, seconds, ITEM_FEATURE, items.created))
            if on_view:
                on_view(done[-1])
    latest = current_publication(output)
    if latest is None or latest.id != publication.id:
        raise PublishConflictError(
            f"publication {publication.id} was replaced while it was materialized", "apply and materialize again"
        )
    return done


def _write(
    store: FeatureStore,
    output: OutputStore,
    publication: Publication,
    view: PublishedView | PublishedHistory,
    as_of: str,
) -> None:
    last = datetime.fromisoformat(as_of)
    withdrawn = withdrawn_runs(output, publication, view)
    # Who was in a withdrawn run and not in this one gets back what an earlier run had.
    first = _EPOCH if withdrawn else last - timedelta(seconds=1)
    with quiet(), overwriting(bool(withdrawn)):
        remove_withdrawn_users(store, output, publication, view, withdrawn)
        store.materialize(first, last, feature_views=[view.name])


def _output(folder: Path) -> OutputStore:
    return OutputStore(load_config(folder / CONFIG_NAME).output.path)


def registered_views(store: FeatureStore) -> set[str]:
    """Names of the feature views a registry holds."""
    with quiet():
        return {view.name for view in store.registry.list_feature_views(store.project)}


def _check_registry(store: FeatureStore, publication: Publication) -> None:
    """Refuses to work with views that still point into another publication."""
    with quiet():
        registered = {
            view.name: view.tags.get("publication") for view in store.registry.list_feature_views(store.project)
        }
    stale = [view.name for view in publication.current_views if registered.get(view.name) != publication.id]
    if stale:
        raise VersionMismatchError(
            f"the registry does not hold publication {publication.id} yet: {len(stale)} of its "
            f"{len(publication.current)} current views are missing or older, for one {stale[0]}",
            "run `feast apply` first",
        )


def _verify(store: FeatureStore, output: OutputStore, publication: Publication, view: PublishedView) -> int:
    """Counts the rows of the view's newest run and compares a sample of them with what is served.

    Raises:
        StorageError: A sampled user is not served, or with another vector.
    """
    folder = ("published", publication.id, view.name)
    names = [name for name in output.names(*folder) if name.rpartition("-")[0] == view.newest.run_id]
    sampled = set(names[:: max(1, len(names) // _SAMPLED_FILES)][:_SAMPLED_FILES])
    rows, wrong, asked = 0, 0, 0
    ttl = store.registry.get_feature_view(view.name, store.project, allow_cache=True).ttl
    outlived = bool(ttl) and datetime.now(UTC) - datetime.fromisoformat(view.newest.as_of) > ttl
    storage: Storage = getattr(store.config.online_store, "vector_storage", "float32")
    for name in names:
        with output.fs.open(output.path(*folder, name), "rb") as stream:
            file = pq.ParquetFile(stream)
            rows += file.metadata.num_rows
            if name not in sampled:
                continue
            batch = next(file.iter_batches(_SAMPLED_ROWS, columns=["user_id", view.instruction]))
        table = pa.Table.from_batches([batch])
        users = table.column("user_id").to_pylist()
        with quiet():
            served = {view.instruction: served_view(store, view.name)}
            vectors, found, _ = read_stored(store, served, users)[view.instruction]
        expected = as_stored(vector_matrix(table, view.instruction, view.name), storage)
        asked += len(users)
        # A store may have forgotten what nobody would be served, and whoever was erased meanwhile.
        lost = ~found & (not outlived) & ~Tombstones(output).contains(users)
        wrong += int(np.count_nonzero(lost | (found & (vectors != expected).any(axis=1))))
    if wrong:
        raise StorageError(
            f"view {view.name}: the online store serves {wrong} of {asked} sampled users not at all or with another "
            f"vector than run {view.newest.run_id} holds",
            "does another process write the same online store? Materialize again",
        )
    return rows


def _verify_histories(
    store: FeatureStore, output: OutputStore, publication: Publication, history: PublishedHistory
) -> None:
    """Compares a sample of the packed histories with what is served.

    Raises:
        StorageError: A sampled user's is not served, or another one.
    """
    folder = ("published", publication.id, history.name)
    names, wrong, asked = output.names(*folder), 0, 0
    for name in names[:: max(1, len(names) // _SAMPLED_FILES)][:_SAMPLED_FILES]:
        with output.fs.open(output.path(*folder, name), "rb") as stream:
            batch = next(pq.ParquetFile(stream).iter_batches(_SAMPLED_ROWS, columns=["user_id", FEATURE]), None)
        if batch is None:
            continue
        with quiet():
            served = read_histories(store, history.name, batch.column("user_id").to_pylist())
        asked += len(served)
        expected = batch.column(FEATURE).to_pylist()
        erased = Tombstones(output).contains(batch.column("user_id").to_pylist())
        wrong += sum(
            1
            for one, right, gone in zip(served, expected, erased, strict=True)
            if one != right and not (gone and not one)
        )
    if wrong:
        raise StorageError(
            f"view {history.name}: the online store serves {wrong} of {asked} sampled packed histories not at all or "
            f"differently than run {history.run_id} has them",
            "does another process write the same online store? Materialize again",
        )

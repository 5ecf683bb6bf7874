"""Going back to an earlier publication: a move of the pointer, nothing is computed again."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.errors import ConfigError, DataError, StorageError, did_you_mean
from instructue_feast.runs.ledger import note_published
from instructue_feast.runs.manifest import RunManifest
from instructue_feast.runs.progress import erased_users_in
from instructue_feast.runs.publish import (
    Publication,
    current_publication,
    move_pointer,
    publish_over,
    stored_publications,
)
from instructue_feast.runs.reader import finished_runs, run_manifest, verify_bucket
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones


def rollback(store: OutputStore, run_id: str | None = None, *, keep_runs: int = 400) -> Publication:
    """Makes an earlier run current again.

    While the publication of that run is still on disk (`output.keep_publications`), the pointer moves back to it and
    everything is as it was then. Otherwise a publication is made of the run's own files and of what is published of
    earlier `as_of`s; later ones leave the views, so that the run is what is served.

    Args:
        store: The project's output.
        run_id: The run to go back to, or forward again; by default, the one that was published before the current.
        keep_runs: How many runs each view keeps.

    Returns:
        The publication that is current now.

    Raises:
        ConfigError: Nothing is published, nothing was before, or the run is not there or is current already.
        DataError: It holds users who were erased since.
        PublishConflictError: Another publisher was faster.
        StorageError: A file is missing or damaged.
    """
    current = current_publication(store)
    if current is None:
        raise ConfigError("nothing is published, so there is nothing to roll back", "publish a run first")
    stored = [one for one in stored_publications(store) if one.id != current.id]
    if run_id is None:
        earlier = [one for one in stored if one.id < current.id and one.run_id != current.run_id]
        if not earlier:
            raise ConfigError(
                "no earlier publication is on disk", f"name a run to go back to: {', '.join(finished_runs(store))}"
            )
        return _restored(store, current, earlier[-1])
    if run_id == current.run_id:
        raise ConfigError(f"run {run_id} is current already", "name another run")
    same = [one for one in stored if one.run_id == run_id]
    if same:
        return _restored(store, current, same[-1])
    if run_id not in finished_runs(store):
        raise ConfigError(f"run {run_id} is not on disk", did_you_mean(run_id, finished_runs(store)))
    return _rebuilt(store, current, run_manifest(store, run_id), keep_runs)


def _restored(store: OutputStore, current: Publication, target: Publication) -> Publication:
    _refuse_erased(store, target.run_id, _erased_in_publication(store, target))
    move_pointer(store, current, dataclasses.asdict(target))
    note_published(store, target.run_id, current.run_id, "rolled back to")
    return target


def _rebuilt(store: OutputStore, current: Publication, manifest: RunManifest, keep_runs: int) -> Publication:
    for marker in manifest.buckets:
        verify_bucket(store, manifest, marker)
    _refuse_erased(store, manifest.run_id, erased_users_in(store, manifest.run_id, manifest.buckets))
    as_of = datetime.fromisoformat(manifest.as_of)
    views = []
    for view in current.views:
        runs = [run for run in view.runs if datetime.fromisoformat(run.as_of) < as_of]
        if runs:
            views.append(dataclasses.replace(view, runs=runs))
    left = {view.name for view in views}
    names = {instruction: name for instruction, name in current.current.items() if name in left}
    histories = [one for one in current.histories if datetime.fromisoformat(one.as_of) < as_of]
    previous = current.current_history if current.current_history in {one.name for one in histories} else None
    kept = dataclasses.replace(current, views=views, current=names, histories=histories, current_history=previous)
    publication = publish_over(store, manifest, current, kept, keep_runs)
    note_published(store, manifest.run_id, current.run_id, "rolled back to")
    return publication


def _refuse_erased(store: OutputStore, run_id: str, erased: int) -> None:
    if erased:
        raise DataError(
            f"run {run_id} holds {erased} rows of users who were erased since; {store.url('published.json')} stays",
            "make a new run with `instructue backfill`",
        )


def _erased_in_publication(store: OutputStore, publication: Publication) -> int:
    """Rows of erased users in a publication's files; the views of a run link the same files, so each is read once."""
    erased = Tombstones(store)
    if not len(erased):
        return 0
    folder = ("published", publication.id)
    files = {Path(path).name: path for view in publication.views for path in store.files(*folder, view.name)}
    for history in publication.histories:
        files |= {path: path for path in store.files(*folder, history.name)}
    found = 0
    for path in files.values():
        try:
            with store.fs.open(path, "rb") as stream:
                users = pq.ParquetFile(stream).read(columns=["user_id"]).column("user_id").to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{path} is missing or damaged ({type(error).__name__})", "restore the file") from None
        found += int(erased.contains(users).sum())
    return found

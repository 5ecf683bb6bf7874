"""Publishing: an immutable folder of links to verified run files, then one atomic move of `published.json`.

Why links, and why a folder for each feature view, is told in docs/adr/0001-publications-are-folders-of-links.md.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from instructue_feast.errors import (
    ConfigError,
    DataError,
    InstructueError,
    PublishConflictError,
    SchemaError,
    StorageError,
    VersionMismatchError,
)
from instructue_feast.runs.histories import PublishedHistory, history_view_name, publish_histories
from instructue_feast.runs.manifest import RunInstruction, RunManifest
from instructue_feast.runs.progress import erased_users_in
from instructue_feast.runs.reader import run_manifest, verify_bucket
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import bucket_folder

POINTER = "published.json"
SERVING = "serving.json"


class _Any(enum.Enum):
    ANY = "any"


ANY: Final = _Any.ANY
"""Publish whatever the pointer names when publishing starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """One run inside a view: one `as_of` of historical retrieval. `files` counts its Parquet files."""

    run_id: str
    as_of: str
    created: str
    rows: int
    files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedView:
    """One (instruction, embedding version); `runs` are ordered by `as_of`, at most one run for each."""

    name: str
    instruction: str
    embedding_version: str
    content_hash: str
    model_version: str
    trained: bool
    embedding_dim: int
    runs: list[PublishedRun]

    @property
    def newest(self) -> PublishedRun:
        """The run with the latest `as_of`: what the online store serves."""
        return self.runs[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What `published.json` holds.

    Attributes:
        id: Name of the folder `published/<id>/`.
        created: When it was published, ISO 8601 in UTC.
        run_id: The run whose publishing made it.
        as_of: That run's `as_of`.
        views: For each instruction the current view and the one before it, so that a rollback needs no recomputing.
        current: Instruction id -> name of its current view.
        histories: Packed histories: those the current run's model reads, and those of the model before.
        current_history: Name of the view of the former; `None` when the run's extract was gone.
    """

    id: str
    created: str
    run_id: str
    as_of: str
    views: list[PublishedView]
    current: dict[str, str]
    histories: list[PublishedHistory] = field(default_factory=list)
    current_history: str | None = None

    def view(self, name: str) -> PublishedView:
        """The view of that name."""
        return next(view for view in self.views if view.name == name)

    @property
    def current_views(self) -> list[PublishedView]:
        """The current view of each instruction, in the order of `current`."""
        return [self.view(name) for name in self.current.values()]


def current_publication(store: OutputStore) -> Publication | None:
    """What is published now; `None` before the first publishing.

    Raises:
        StorageError: The pointer cannot be read.
        SchemaError: It was written by another release.
    """
    if not store.exists(POINTER):
        return None
    return _parse(store.read_json(POINTER), store.url(POINTER))


def publish(
    store: OutputStore,
    run_id: str,
    *,
    keep_runs: int = 400,
    expected: str | Literal[_Any.ANY] | None = ANY,
    verified: str | None = None,
) -> Publication:
    """Verifies a finished run and makes it the current publication.

    Every row of the run is read and checked first. The pointer moves only if it still names what it named when
    publishing started, so of two concurrent publishers one wins. Whatever fails, the pointer and the publication it
    names stay as they were. Instructions the run does not hold keep the view they have.

    Args:
        store: The project's output.
        run_id: A finished run.
        keep_runs: How many runs each view keeps for historical retrieval; the newest by `as_of`.
        expected: Id of the publication that must be current (`None`: nothing is published). By default, whichever is.
        verified: Digest of the run, when this process has just read and checked every row of it; they are not read
            again then.

    Returns:
        The new publication.

    Raises:
        ConfigError: Unknown run, or its `as_of` is older than all the runs that are kept.
        RunConflictError: The run is not finished.
        StorageError, SchemaError, InvalidEmbeddingError: A file is damaged or its embeddings are invalid.
        VersionMismatchError: Two embedding versions would share a view name.
        PublishConflictError: Another publisher was faster, or `expected` is not current.
        DataError: It holds users who were erased.
    """
    if keep_runs < 1:
        raise ConfigError(f"cannot keep {keep_runs} runs", "keep at least one")
    before = current_publication(store)
    if expected is not ANY and expected != (before and before.id):
        raise _conflict(before, f"{expected!r} is not the current publication")
    manifest = run_manifest(store, run_id)
    if not manifest.users:
        raise ConfigError(f"run {run_id} holds no users", "publish a run with at least one user")
    if verified != manifest.digest:
        for marker in manifest.buckets:
            verify_bucket(store, manifest, marker)
    erased = erased_users_in(store, run_id, manifest.buckets)
    if erased:
        raise DataError(
            f"run {run_id} holds {erased} users who were erased since", "make a new run with `instructue backfill`"
        )
    return publish_over(store, manifest, before, before, keep_runs)


def publish_over(
    store: OutputStore, manifest: RunManifest, before: Publication | None, kept: Publication | None, keep_runs: int
) -> Publication:
    """Makes the publication of a verified run and moves the pointer to it.

    Args:
        store: The project's output.
        manifest: The run.
        before: The publication that must be current; its folder has the files of earlier runs.
        kept: What of it the new publication goes on with: all of it, unless something is rolled back.
        keep_runs: How many runs each view keeps.
    """
    now = datetime.now(UTC)
    current = dict(kept.current if kept else {}) | {one.id: one.view for one in manifest.instructions}
    publication = Publication(
        id=f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}",
        created=now.isoformat(),
        run_id=manifest.run_id,
        as_of=manifest.as_of,
        views=_with_promoted(store, kept, _views(kept, manifest, keep_runs)),
        current=current,
    )
    try:
        for view in publication.views:
            _fill(store, before, publication.id, view, manifest)
        publication = _with_histories(store, before, kept, publication, manifest)
        document = dataclasses.asdict(publication)
        store.write_json(document, "published", publication.id, "publication.json")
        move_pointer(store, before, document)
    except BaseException:
        _discard(store, publication.id)
        raise
    return publication


def prune_publications(store: OutputStore, keep: int = 3) -> list[str]:
    """Removes old publications: all but the current and the newest `keep`. Runs are never touched.

    A process that still holds the registry of a removed publication can no longer read history through it.

    Returns:
        Ids of the removed publications.

    Raises:
        ConfigError: `keep` is less than one.
    """
    if keep < 1:
        raise ConfigError(f"cannot keep {keep} publications", "keep at least one")
    return remove_publications(store, keep)


def remove_publications(store: OutputStore, keep: int, only: str | None = None) -> list[str]:
    """Removes outdated publications, or one of them, unless somebody rolls back to it just now; returns their ids."""
    if not store.names("published"):
        return []
    with pointer_lock(store):
        removed = [name for name in outdated_publications(store, keep) if only in (None, name)]
        for name in removed:
            store.remove("published", name)
    return removed


def outdated_publications(store: OutputStore, keep: int) -> list[str]:
    """The publications `prune_publications` would remove."""
    names = store.names("published")  # ids begin with the time, so this is oldest first
    complete = [name for name in names if store.exists("published", name, "publication.json")]
    latest = current_publication(store)
    kept = {*complete[-keep:], *([latest.id] if latest else [])}
    # A folder newer than all that are kept may be a publisher at work; an older unfinished one can no longer win.
    return [name for name in names if kept and name not in kept and name < max(kept)]


def stored_publications(store: OutputStore) -> list[Publication]:
    """All complete publications on disk, the oldest first."""
    names = [name for name in store.names("published") if store.exists("published", name, "publication.json")]
    parts = [("published", name, "publication.json") for name in names]
    return [_parse(store.read_json(*one), store.url(*one)) for one in parts]


def promoted_names(store: OutputStore) -> set[str]:
    """Views the feature service was moved to, and those before them (see `runs/serving.py`): publishing keeps them."""
    if not store.exists(SERVING):
        return set()
    document = store.read_json(SERVING)
    return {*document["views"].values(), *document["before"].values()}


def _with_promoted(store: OutputStore, before: Publication | None, views: list[PublishedView]) -> list[PublishedView]:
    names, promoted = {view.name for view in views}, promoted_names(store)
    return [*views, *(one for one in (before.views if before else []) if one.name in promoted - names)]


def _views(before: Publication | None, manifest: RunManifest, keep_runs: int) -> list[PublishedView]:
    """The views of the new publication: those of the run, and what each of their instructions had before."""
    known = {view.name: view for view in before.views} if before else {}
    views = []
    for one in manifest.instructions:
        views.append(_extended(known.get(one.view), one, manifest, keep_runs))
        previous = before.current.get(one.id) if before else None
        if previous == one.view:  # the version has not changed: keep the one that came before it
            views += [view for view in known.values() if view.instruction == one.id and view.name != previous]
        elif previous:
            views.append(known[previous])
    ours = {one.id for one in manifest.instructions}
    return [*views, *(view for view in known.values() if view.instruction not in ours)]


def _extended(known: PublishedView | None, one: RunInstruction, manifest: RunManifest, keep_runs: int) -> PublishedView:
    if known and known.embedding_version != one.embedding_version:
        raise VersionMismatchError(
            f"view {one.view} stands for embedding version {known.embedding_version}, run {manifest.run_id} has "
            f"{one.embedding_version}",
            "the first eight digits agree by accident; reword the instruction and run the backfill again",
        )
    run = PublishedRun(
        run_id=manifest.run_id,
        as_of=manifest.as_of,
        created=manifest.created,
        rows=manifest.users,
        files=sum(1 for marker in manifest.buckets if marker.rows),
    )
    as_of = datetime.fromisoformat(run.as_of)
    # The run published last stands for its as_of; Feast would otherwise pick by `created`, so that publishing an
    # earlier run again could not bring it back.
    others = [old for old in (known.runs if known else []) if datetime.fromisoformat(old.as_of) != as_of]
    runs = sorted([*others, run], key=lambda each: datetime.fromisoformat(each.as_of))[-keep_runs:]
    if run not in runs:
        raise ConfigError(
            f"run {run.run_id} has as_of {run.as_of}, before all of the {keep_runs} runs view {one.view} keeps",
            "raise `output.keep_runs`",
        )
    return PublishedView(
        name=one.view,
        instruction=one.id,
        embedding_version=one.embedding_version,
        content_hash=one.content_hash,
        model_version=manifest.model_version,
        trained=manifest.trained,
        embedding_dim=manifest.embedding_dim,
        runs=runs,
    )


def _fill(
    store: OutputStore, before: Publication | None, publication_id: str, view: PublishedView, manifest: RunManifest
) -> None:
    """Links the files of a view's runs into its folder.

    Those of the new run come from the run's own folder, the rest from the publication before: a run's folder may be
    deleted once it is published.
    """
    folder = ("published", publication_id, view.name)
    old = ("published", before.id, view.name) if before else ()
    published: dict[str, list[str]] = {}
    for name in store.names(*old) if old else ():
        published.setdefault(name.rpartition("-")[0], []).append(name)
    is_ours = view.name in {one.view for one in manifest.instructions}
    links = []
    for run in view.runs:
        if is_ours and run.run_id == manifest.run_id:
            links += [
                (
                    store.path("runs", run.run_id, bucket_folder(marker.bucket), "part.parquet"),
                    f"{run.run_id}-{marker.bucket:05d}.parquet",
                )
                for marker in manifest.buckets
                if marker.rows
            ]
            continue
        names = published.get(run.run_id, [])
        if len(names) != run.files:
            raise StorageError(
                f"{store.url(*old)} has {len(names)} files of run {run.run_id}, not {run.files}",
                f"restore that folder, or move {POINTER} away and publish the runs again",
            )
        links += [(store.path(*old, name), name) for name in names]
    try:
        store.fs.makedirs(store.path(*folder), exist_ok=True)
        for source, name in links:
            _link(store, source, store.path(*folder, name))
    except OSError as error:
        raise StorageError(
            f"cannot write {store.url(*folder)}: {error.strerror or error}", "free disk space or mend the rights"
        ) from None


def _with_histories(
    store: OutputStore,
    before: Publication | None,
    kept: Publication | None,
    publication: Publication,
    manifest: RunManifest,
) -> Publication:
    """Adds the packed histories of the run's model version, and keeps those of the one before."""
    name = history_view_name(manifest.model_version)
    known = {one.name: one for one in kept.histories} if kept else {}
    current = publish_histories(store, publication.id, manifest, known.get(name))
    previous = kept.current_history if kept else None
    others = [one for one in known.values() if one.name != name]
    if previous not in (None, name):
        promoted = promoted_names(store)
        models = {view.model_version for view in publication.views if view.name in promoted}
        others = [one for one in others if one.name == previous or one.model_version in models]
    histories = [*([current] if current else []), *others]
    for one in histories:
        if before and one == known.get(one.name):
            _link_histories(store, before.id, publication.id, one)
    return dataclasses.replace(publication, histories=histories, current_history=current.name if current else None)


def _link_histories(store: OutputStore, before: str, publication_id: str, history: PublishedHistory) -> None:
    old, new = ("published", before, history.name), ("published", publication_id, history.name)
    names = [name for name in store.names(*old) if not name.startswith(".")]
    if len(names) != history.files:
        raise StorageError(
            f"{store.url(*old)} has {len(names)} files, not {history.files}",
            f"restore that folder, or move {POINTER} away and publish the runs again",
        )
    try:
        store.fs.makedirs(store.path(*new), exist_ok=True)
        for name in names:
            _link(store, store.path(*old, name), store.path(*new, name))
    except OSError as error:
        raise StorageError(
            f"cannot write {store.url(*new)}: {error.strerror or error}", "free disk space or mend the rights"
        ) from None


def _link(store: OutputStore, source: str, target: str) -> None:
    if not store.is_local:
        store.fs.cp_file(source, target)
        return
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links here, or too many of this file
        shutil.copyfile(source, target)


def move_pointer(store: OutputStore, before: Publication | None, document: dict[str, Any]) -> None:
    """Compares and swaps: raises `PublishConflictError` if the pointer no longer names `before`."""
    with pointer_lock(store):
        latest = current_publication(store)
        if (latest and latest.id) != (before and before.id):
            raise _conflict(latest, "another publisher was faster")
        if not store.exists("published", document["id"], "publication.json"):
            raise _conflict(latest, f"publication {document['id']} was removed meanwhile")
        store.write_json(document, POINTER)


def _discard(store: OutputStore, publication_id: str) -> None:
    """Removes the folder of a publication that failed, unless an interrupt came just after the pointer moved."""
    with suppress(InstructueError, OSError):
        latest = current_publication(store)
        if latest is None or latest.id != publication_id:
            store.remove("published", publication_id)


@contextmanager
def pointer_lock(store: OutputStore) -> Iterator[None]:
    """Holds the lock under which the pointer is compared and moved.

    Locally an advisory lock on `published.lock`: the kernel drops it when its holder dies, so it is never stale. On an
    object store there is none: between the comparison and the write of one small object another publisher may come.
    """
    if not store.is_local:
        yield
        return
    with Path(store.path("published.lock")).open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _conflict(latest: Publication | None, what: str) -> PublishConflictError:
    now = f"publication {latest.id} of run {latest.run_id}" if latest else "nothing"
    return PublishConflictError(
        f"not published: {what}; {now} is current now", "look at what is current, then publish again if still wanted"
    )


def _parse(document: dict[str, Any], where: str) -> Publication:
    try:
        views = [
            PublishedView(**{**view, "runs": [PublishedRun(**run) for run in view["runs"]]})
            for view in document["views"]
        ]
        histories = [PublishedHistory(**one) for one in document.get("histories", [])]
        return Publication(**{**document, "views": views, "histories": histories})
    except (TypeError, KeyError) as error:
        raise SchemaError(f"{where} is not a publication: {error}", "was it written by another release?") from None

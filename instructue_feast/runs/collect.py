"""Garbage collection: what nobody needs any more, and the removal of exactly that.

Never collected, whatever is asked for: the current publication and its run, every publication
`output.keep_publications` keeps, what a live process owns, the base of an unfinished incremental run, the extract of a
run that stays, and anything touched within the grace period. The other runs whose embeddings are published stay as
well, unless `keep_folders` says that the newest so many are enough: a publication has its own links to their files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from instructue_feast.errors import ConfigError, RunConflictError
from instructue_feast.runs.ledger import RunState, read_ledger
from instructue_feast.runs.overview import RunStatus, run_status
from instructue_feast.runs.ownership import is_live, owner_of, take
from instructue_feast.runs.publish import (
    Publication,
    current_publication,
    outdated_publications,
    remove_publications,
    stored_publications,
)
from instructue_feast.runs.reader import run_manifest
from instructue_feast.runs.store import OutputStore

MIN_GRACE = timedelta(minutes=10)
_UNFINISHED = (RunState.PLANNED, RunState.RUNNING, RunState.WRITTEN, RunState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """A folder that can go: `kind` is `run`, `extract`, `publication` or `event vectors`; `size` is in bytes."""

    kind: str
    folder: tuple[str, ...]
    reason: str
    size: int
    touched: str

    @property
    def name(self) -> str:
        """The folder below the output's root."""
        return "/".join(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """What may be collected.

    Attributes:
        grace: Nothing touched within this time is garbage.
        keep_publications: As in `output.keep_publications`.
        unpublished: Also finished runs that were never published.
        extracts: Also finished extracts that no run was made of.
        keep_folders: How many published runs keep their folder, with model, soft tokens and extract; the newest by
            `as_of`, and whatever a view or its packed histories are read with. All of them for `None`.
    """

    grace: timedelta = timedelta(days=7)
    keep_publications: int = 3
    unpublished: bool = False
    extracts: bool = False
    keep_folders: int | None = None

    def __post_init__(self) -> None:
        if self.grace < MIN_GRACE:
            raise ConfigError(f"a grace period of {self.grace} is too short", f"give at least {MIN_GRACE}")
        if self.keep_folders is not None and self.keep_folders < 1:
            raise ConfigError(f"cannot keep the folders of {self.keep_folders} runs", "keep at least one")


def find_garbage(store: OutputStore, options: CollectOptions, *, now: datetime | None = None) -> list[Garbage]:
    """Finds what can be removed; removes nothing."""
    before = (now or datetime.now(UTC)) - options.grace
    outdated = set(outdated_publications(store, options.keep_publications))
    publication = current_publication(store)
    kept = [one for one in stored_publications(store) if one.id not in outdated]
    runs = {run.run_id: run.as_of for one in kept for view in one.views for run in view.runs}
    newest = sorted(runs, key=lambda run_id: datetime.fromisoformat(runs[run_id]))
    protected = _read_online(kept[-1:] + ([publication] if publication else []))
    protected.update(newest if options.keep_folders is None else newest[-options.keep_folders :])
    statuses = [run_status(store, run_id, publication) for run_id in store.names("runs")]
    bases = {one.base_run for one in statuses if one.state in _UNFINISHED}
    garbage = []
    for status in statuses:
        reason = _why_run(status, options)
        if reason and status.run_id not in protected | bases and status.owner is None:
            garbage += _old(store, "run", ("runs", status.run_id), reason, before)
    gone = {one.folder[1] for one in garbage}
    garbage += list(_extracts(store, options, gone, before))
    for name in sorted(outdated):
        garbage += _old(store, "publication", ("published", name), "a later one is current", before)
    for version in store.names("event_vectors"):
        for name in store.names("event_vectors", version):
            folder = ("event_vectors", version, name)
            if not store.exists(*folder, "_SUCCESS"):
                garbage += _old(store, "event vectors", folder, "its writer died", before)
    return garbage


def _read_online(publications: list[Publication]) -> set[str]:
    """Runs whose model or soft tokens answer lookups: the published ones, and the newest of each view and history."""
    found = {one.run_id for one in publications}
    for one in publications:
        found.update(view.newest.run_id for view in one.views)
        found.update(history.run_id for history in one.histories)
    return found


def remove_garbage(store: OutputStore, garbage: list[Garbage], options: CollectOptions) -> list[Garbage]:
    """Removes what is still garbage now; a run or extract is owned while it is removed.

    A finished run loses its manifest first, so that what an interrupted removal leaves is no run any more.

    Returns:
        What was removed.
    """
    still = {one.folder for one in find_garbage(store, options)}
    removed = []
    for one in garbage:
        if one.folder not in still:
            continue
        if one.kind in ("run", "extract"):
            try:
                lease = take(store, *one.folder)
            except RunConflictError:  # somebody has just resumed it
                continue
            publication = current_publication(store)
            if publication is not None and one.folder[1] == publication.run_id and one.kind == "run":
                lease.release()
                continue
            try:
                store.remove_file(*one.folder, "manifest.json")
                if not lease.remove():
                    continue
            finally:
                lease.release()
        elif one.kind == "publication":
            if not remove_publications(store, options.keep_publications, one.folder[1]):
                continue
        else:
            store.remove(*one.folder)
        removed.append(one)
    return removed


def _why_run(status: RunStatus, options: CollectOptions) -> str | None:
    if status.state in _UNFINISHED:
        return f"{status.state}, and nobody works on it"
    if status.state is RunState.SUPERSEDED:
        return "superseded, and no publication needs its folder"
    if status.state is RunState.AUDITED and options.unpublished:
        return "never published"
    return None


def _extracts(store: OutputStore, options: CollectOptions, gone: set[str], before: datetime) -> Iterator[Garbage]:
    """Extracts nobody refers to: half-made ones, those of removed runs, and on demand the others."""
    used: set[str | None] = set()
    orphaned: set[str | None] = set()
    for run_id in store.names("runs"):
        ledger = read_ledger(store, run_id)
        names = {ledger.extract_id, ledger.plan.extract_id} if ledger else set()
        if store.exists("runs", run_id, "manifest.json"):
            names.add(run_manifest(store, run_id).extract_id)
        made = {ledger.extract_id} if ledger else set()
        (orphaned if run_id in gone else used).update(made if run_id in gone else names)
    for name in store.names("extracts"):
        folder = ("extracts", name)
        owner = owner_of(store, *folder)
        if name in used or (owner is not None and is_live(store, owner, *folder)):
            continue
        if not store.exists(*folder, "manifest.json"):
            yield from _old(store, "extract", folder, "its writer died", before)
        elif name in orphaned:
            yield from _old(store, "extract", folder, "its run is removed", before)
        elif options.extracts:
            yield from _old(store, "extract", folder, "no run was made of it", before)


def _old(store: OutputStore, kind: str, folder: tuple[str, ...], reason: str, before: datetime) -> list[Garbage]:
    """The folder as garbage, unless something in it was touched within the grace period."""
    store.fs.invalidate_cache()
    files: dict[str, dict[str, Any]] = store.fs.find(store.path(*folder), detail=True)
    times = [_time(one) for one in files.values()]
    if not times:  # object stores know no empty folders, and on a file system an empty one has nobody to wait for
        times = [_time(store.fs.info(store.path(*folder)))]
    touched = max(times)
    if touched >= before:
        return []
    size = sum(int(one.get("size") or 0) for one in files.values())
    return [Garbage(kind=kind, folder=folder, reason=reason, size=size, touched=touched.isoformat())]


def _time(info: dict[str, Any]) -> datetime:
    """When a file was written, by the names fsspec's file systems give it; unknown counts as now."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime.now(UTC)

"""What runs there are, where each stands, and how two of them differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from instructue_feast.errors import ConfigError, did_you_mean
from instructue_feast.runs.audit import vector_matrix
from instructue_feast.runs.ledger import RunState, read_ledger
from instructue_feast.runs.manifest import RunManifest
from instructue_feast.runs.ownership import is_live, owner_of
from instructue_feast.runs.publish import Publication, current_publication
from instructue_feast.runs.reader import read_bucket, run_manifest
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finished_buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run in one line.

    Attributes:
        run_id: Its id.
        state: Its state; what the pointer says counts more than what the ledger says.
        as_of: Its `as_of`; empty when it was never planned.
        created: When it was planned.
        changed: When its ledger last changed.
        buckets: Finished buckets.
        of_buckets: All buckets; 0 when nobody knows.
        users: Users of the finished buckets.
        carried: How many of them were carried over from `base_run`.
        base_run: The run an incremental one started from.
        owner: The live process that works on it, if there is one.
        note: Of its last step.
    """

    run_id: str
    state: RunState
    as_of: str = ""
    created: str = ""
    changed: str = ""
    buckets: int = 0
    of_buckets: int = 0
    users: int = 0
    carried: int = 0
    base_run: str | None = None
    owner: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One instruction in two runs, over the users both have.

    Attributes:
        instruction: Its id.
        same_version: Whether both have the same embedding version; if not, only `users` means something.
        users: Users in both.
        identical: Users whose vectors agree in every bit.
        largest: Largest difference of a component; NaN without common users.
        cosine: Mean cosine of a user's two vectors; NaN without common users.
    """

    instruction: str
    same_version: bool
    users: int
    identical: int
    largest: float
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs: users only in one of them, and each instruction that is in both."""

    runs: tuple[str, str]
    same_digest: bool
    only_first: int
    only_second: int
    instructions: list[Difference]


def run_statuses(store: OutputStore) -> list[RunStatus]:
    """All runs, by id, which begins with the `as_of` unless it was chosen."""
    publication = current_publication(store)
    return [run_status(store, run_id, publication) for run_id in store.names("runs")]


def run_status(store: OutputStore, run_id: str, publication: Publication | None) -> RunStatus:
    """The status of a run under the current publication.

    Raises:
        ConfigError: No such run.
    """
    if run_id not in store.names("runs"):
        raise ConfigError(f"unknown run {run_id!r}", did_you_mean(run_id, store.names("runs")))
    ledger, owner = read_ledger(store, run_id), owner_of(store, "runs", run_id)
    live = str(owner) if owner is not None and is_live(store, owner, "runs", run_id) else None
    manifest = run_manifest(store, run_id) if store.exists("runs", run_id, "manifest.json") else None
    markers = manifest.buckets if manifest else finished_buckets(store, run_id)
    state = _state(run_id, ledger.state if ledger else None, manifest, publication)
    plan = ledger.plan if ledger else None
    return RunStatus(
        run_id=run_id,
        state=state,
        as_of=manifest.as_of if manifest else (plan.as_of if plan else ""),
        created=manifest.created if manifest else (ledger.created if ledger else ""),
        changed=ledger.changed if ledger else (manifest.created if manifest else ""),
        buckets=len(markers),
        of_buckets=plan.buckets if plan else len(manifest.buckets if manifest else ()),
        users=sum(marker.rows for marker in markers),
        carried=sum(marker.carried for marker in markers),
        base_run=plan.base_run if plan else None,
        owner=live,
        note=ledger.steps[-1].note if ledger and ledger.steps else "",
    )


def _state(
    run_id: str, state: RunState | None, manifest: RunManifest | None, publication: Publication | None
) -> RunState:
    if publication is not None and publication.run_id == run_id:
        return RunState.PUBLISHED
    if manifest is None:
        return state or RunState.RUNNING
    if state in (RunState.PUBLISHED, RunState.SUPERSEDED):
        return RunState.SUPERSEDED
    in_views = publication is not None and any(run.run_id == run_id for view in publication.views for run in view.runs)
    return RunState.SUPERSEDED if in_views else RunState.AUDITED


def compare_runs(store: OutputStore, first: str, second: str) -> Comparison:
    """Compares two finished runs user by user, bucket by bucket.

    Raises:
        ConfigError: No such finished run, or they have different numbers of buckets.
        StorageError: A file is missing or damaged.
    """
    left, right = run_manifest(store, first), run_manifest(store, second)
    if len(left.buckets) != len(right.buckets):
        raise ConfigError(
            f"run {first} has {len(left.buckets)} buckets and run {second} {len(right.buckets)}",
            "only runs with the same `output.buckets` can be compared",
        )
    versions = {one.id: one.embedding_version for one in right.instructions}
    names = [one.id for one in left.instructions if one.id in versions]
    alone = [0, 0]
    sums = {name: {"users": 0.0, "identical": 0.0, "largest": 0.0, "cosine": 0.0} for name in names}
    for marker in left.buckets:
        tables = [read_bucket(store, run, marker.bucket, ["user_id", *names]) for run in (first, second)]
        users = [table.column("user_id").combine_chunks() for table in tables]
        places = pc.index_in(users[0], value_set=users[1])
        common = pc.is_valid(places).to_numpy(zero_copy_only=False)
        shared = int(common.sum())
        alone[0] += len(users[0]) - shared
        alone[1] += len(users[1]) - shared
        if not shared:
            continue
        ours, theirs = tables[0].filter(pa.array(common)), tables[1].take(places.drop_null())
        for name in names:
            a, b = vector_matrix(ours, name, name), vector_matrix(theirs, name, name)
            one = sums[name]
            one["users"] += shared
            if a.shape != b.shape:
                continue
            one["identical"] += int((a == b).all(axis=1).sum())
            one["largest"] = max(one["largest"], float(np.abs(a - b).max()))
            one["cosine"] += float((a.astype(np.float64) * b).sum())
    found = [
        Difference(
            instruction=one.id,
            same_version=one.embedding_version == versions[one.id],
            users=int(sums[one.id]["users"]),
            identical=int(sums[one.id]["identical"]),
            largest=sums[one.id]["largest"] if sums[one.id]["users"] else math.nan,
            cosine=sums[one.id]["cosine"] / sums[one.id]["users"] if sums[one.id]["users"] else math.nan,
        )
        for one in left.instructions
        if one.id in versions
    ]
    return Comparison(
        runs=(first, second), same_digest=left.digest == right.digest, only_first=alone[0], only_second=alone[1],
        instructions=found,
    )  # fmt: skip

r"""The ledger of a run: how far it is, with which plan, and what happened to it.

    planned -> running -> written -> audited -> published -> superseded
                  \-> failed -> running

`runs/<id>/ledger.json` tells people and `--resume` where a run stands. It decides nothing that files decide better: a
bucket is done when its marker is there, a run when its manifest is there, published is what the pointer names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from instructue_feast.errors import ConfigError, RunConflictError, SchemaError, did_you_mean
from instructue_feast.runs.manifest import RunInstruction
from instructue_feast.runs.store import OutputStore


class RunState(StrEnum):
    """How far a run is."""

    PLANNED = "planned"
    """Its ledger exists."""
    RUNNING = "running"
    """A process extracts, encodes or embeds, or did when it died."""
    WRITTEN = "written"
    """Every bucket has its marker."""
    AUDITED = "audited"
    """Every row was read back and is valid, and the manifest is there; the run is immutable."""
    PUBLISHED = "published"
    """The pointer names it."""
    FAILED = "failed"
    """It stopped with an error that a resume may get past."""
    SUPERSEDED = "superseded"
    """It was published, and another run is now."""


_NEXT = {
    RunState.PLANNED: {RunState.RUNNING, RunState.FAILED},
    RunState.RUNNING: {RunState.RUNNING, RunState.WRITTEN, RunState.FAILED},
    RunState.WRITTEN: {RunState.RUNNING, RunState.AUDITED, RunState.FAILED},
    RunState.AUDITED: {RunState.AUDITED, RunState.PUBLISHED},
    RunState.PUBLISHED: {RunState.PUBLISHED, RunState.SUPERSEDED},
    RunState.SUPERSEDED: {RunState.PUBLISHED, RunState.SUPERSEDED},
    RunState.FAILED: {RunState.RUNNING, RunState.WRITTEN, RunState.FAILED},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A step of a run: the state it reached, when (ISO 8601, UTC), and why."""

    state: RunState
    at: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to compute; a resume with another plan is refused.

    Attributes:
        as_of: Exclusive upper bound on event time.
        project: Name of the project.
        history_digest: Hash of the history settings.
        model_version: Hash of the model.
        trained: Whether the model is trained.
        embedding_dim: Size of its embeddings.
        instructions: The instructions, with their embedding versions.
        buckets: Buckets of the run.
        extract_id: A finished extract that was asked for; `None` when the run makes its own.
        base_run: The run whose unchanged users are carried over; `None` for a full backfill.
        full_reason: Why it is a full backfill although an incremental one was asked for.
        publish: Whether it is to be published at the end.
    """

    as_of: str
    project: str
    history_digest: str
    model_version: str
    trained: bool
    embedding_dim: int
    instructions: list[RunInstruction]
    buckets: int
    extract_id: str | None = None
    base_run: str | None = None
    full_reason: str | None = None
    publish: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What `ledger.json` holds; `extract_id` is the extract in use, `attempts` counts processes that worked on it."""

    run_id: str
    created: str
    plan: Plan
    steps: list[Transition] = field(default_factory=list)
    extract_id: str | None = None
    attempts: int = 0

    @property
    def state(self) -> RunState:
        """The last state."""
        return self.steps[-1].state if self.steps else RunState.PLANNED

    @property
    def changed(self) -> str:
        """When the last step was made."""
        return self.steps[-1].at if self.steps else self.created

    def with_state(self, state: RunState, note: str = "") -> Ledger:
        """The ledger after one more step.

        Raises:
            RunConflictError: The run cannot come into that state from the one it is in.
        """
        if self.steps and state not in _NEXT[self.state]:
            raise RunConflictError(
                f"run {self.run_id} is {self.state} and cannot become {state}", "did another process work on it?"
            )
        step = Transition(state=state, at=datetime.now(UTC).isoformat(), note=note)
        return dataclasses.replace(self, steps=[*self.steps, step])


def read_ledger(store: OutputStore, run_id: str) -> Ledger | None:
    """The ledger of a run; `None` when it has none, like the runs of earlier releases.

    Raises:
        SchemaError: It was written by another release.
    """
    if not store.exists("runs", run_id, "ledger.json"):
        return None
    document = store.read_json("runs", run_id, "ledger.json")
    try:
        plan = dict(document["plan"])
        plan["instructions"] = [RunInstruction(**one) for one in plan["instructions"]]
        steps = [Transition(**{**one, "state": RunState(one["state"])}) for one in document["steps"]]
        return Ledger(**{**document, "plan": Plan(**plan), "steps": steps})
    except (TypeError, KeyError, ValueError) as error:
        raise SchemaError(
            f"{store.url('runs', run_id, 'ledger.json')} is not a ledger: {error}", "was it written by another release?"
        ) from None


def write_ledger(store: OutputStore, ledger: Ledger) -> None:
    """Replaces the ledger of a run in one step."""
    store.write_json(dataclasses.asdict(ledger), "runs", ledger.run_id, "ledger.json")


def note_state(store: OutputStore, run_id: str, state: RunState, note: str = "") -> None:
    """Adds a step to the ledger of a run, if it has one."""
    ledger = read_ledger(store, run_id)
    if ledger is not None:
        write_ledger(store, ledger.with_state(state, note))


def note_published(store: OutputStore, run_id: str, previous: str | None, note: str = "") -> None:
    """Notes that a run is published now, and that the previous one is superseded."""
    note_state(store, run_id, RunState.PUBLISHED, note)
    ledger = read_ledger(store, previous) if previous not in (None, run_id) else None
    if ledger is not None and ledger.state is RunState.AUDITED:  # its publisher died before it could say so
        ledger = ledger.with_state(RunState.PUBLISHED)
    if ledger is not None and ledger.state is RunState.PUBLISHED:
        write_ledger(store, ledger.with_state(RunState.SUPERSEDED, f"by {run_id}"))


def unfinished_runs(store: OutputStore) -> list[str]:
    """Runs that a resume could finish, the one that was touched last at the end."""
    found = []
    for run_id in store.names("runs"):
        ledger = read_ledger(store, run_id)
        if ledger is None or ledger.state in (RunState.PUBLISHED, RunState.SUPERSEDED):
            continue
        if ledger.state is not RunState.AUDITED or ledger.plan.publish:
            found.append((ledger.changed, run_id))
    return [run_id for _, run_id in sorted(found)]


def resolve_run(store: OutputStore, name: str) -> str:
    """The run to resume: `latest` stands for the unfinished run that was touched last.

    Raises:
        ConfigError: There is no such run, or nothing to resume.
    """
    unfinished = unfinished_runs(store)
    if name == "latest":
        if not unfinished:
            raise ConfigError("no run is unfinished", "start one with `instructue backfill --as-of ...`")
        return unfinished[-1]
    if not store.exists("runs", name, "ledger.json"):
        hint = did_you_mean(name, unfinished) if unfinished else "no run is unfinished"
        raise ConfigError(f"there is no run {name!r} to resume", hint)
    return name

"""The backfill job: extract, encode what is new, embed every user, finish the run, publish it.

    python -m instructue_spark.backfill --config instructue.yaml --as-of 2017-10-01T00:00:00Z
    python -m instructue_spark.backfill --config instructue.yaml --resume latest

Prints one JSON object per line (`instructue_spark.report`). A run that stops on the way can be resumed: its extract,
event vectors and finished buckets stay (docs/backfill.md). Only a run that failed on what a retry cannot mend, such as
broken weights, leaves nothing behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import (
    ConfigError,
    InstructueError,
    LeakageError,
    RunConflictError,
    StorageError,
    VersionMismatchError,
    did_you_mean,
)
from instructue_feast.inference.soft_prompts import soft_prompts_of
from instructue_feast.inference.version import embedding_version, model_version
from instructue_feast.instructions import Instruction
from instructue_feast.model.factory import load_model
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.runs.audit import combine_digests
from instructue_feast.runs.incremental import choose_base
from instructue_feast.runs.ledger import (
    Ledger,
    Plan,
    RunState,
    note_published,
    read_ledger,
    resolve_run,
    write_ledger,
)
from instructue_feast.runs.manifest import (
    ExtractManifest,
    RunInstruction,
    RunManifest,
    check_id,
    new_id,
    parse_as_of,
    to_json,
)
from instructue_feast.runs.ownership import Lease, take
from instructue_feast.runs.progress import complete_buckets, extract_manifest, intact_buckets
from instructue_feast.runs.publish import current_publication
from instructue_feast.runs.reader import run_manifest, verify_bucket
from instructue_feast.runs.release import release
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run
from instructue_spark.carry import BaseRun
from instructue_spark.claim import SETTLE_SECONDS, stop_jobs
from instructue_spark.embed import RunPlan, build_soft_tokens, embed_users, encode_new_texts
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session

PREPARED = "prepared.json"
"""Written into a run when model, soft-token table and soft prompts are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillRequest:
    """What to backfill.

    Attributes:
        config: The project.
        as_of: Exclusive upper bound on event time; taken from the run when one is resumed.
        instructions: Instruction ids; all declared ones for `None`.
        run_id: Id of the run; derived from `as_of` and the time when left out. An unfinished run of that id whose
            process is dead is continued, if it was planned with the same settings.
        extract_id: A finished extract to embed; a new one is made when left out.
        publish: Move the pointer to the run at the end.
        allow_leakage: Embed an `as_of` the model has seen in training.
        resume: Id of a run to finish, or `latest`.
        incremental: Embed only users whose packed history differs from the published run's, where that is possible.
        accept: Why the run is published even if a quality gate fails.
    """

    config: InstructueConfig
    as_of: datetime | None = None
    instructions: Sequence[str] | None = None
    run_id: str | None = None
    extract_id: str | None = None
    publish: bool = True
    allow_leakage: bool = False
    resume: str | None = None
    incremental: bool = False
    accept: str | None = None


@dataclass(slots=True)
class Work:
    """What a process did of a run, and what it found done."""

    attempt: int = 1
    extract_reused: bool = False
    texts_encoded: int = 0
    buckets_kept: int = 0
    buckets_embedded: int = 0
    model_loads: int = 0
    full_reason: str | None = None


def run_backfill(
    spark: SparkSession | Callable[[], SparkSession], request: BackfillRequest, reporter: Reporter
) -> RunManifest:
    """Makes one run, or finishes one.

    Args:
        spark: The session, or what starts it; a run whose buckets are all written is finished without Spark.
        request: What to backfill.
        reporter: Gets the stages `sources`, `phrasebook`, `history`, `encode`, `soft_tokens`, `embed`, `audit` and
            `publish`, as far as they are not done.

    Returns:
        The manifest of the finished run.

    Raises:
        ConfigError: An instruction is not declared, an id cannot be a folder's name, or there is nothing to resume.
        LeakageError: The model was trained on events at or after `as_of`.
        VersionMismatchError: A soft prompt was tuned with another model, or the run was planned with other settings.
        DataError: A raw table is missing, empty or unreadable.
        RunConflictError: The run is finished, or another live process is writing it.
        InvalidEmbeddingError: A vector is NaN, infinite or not of unit length; nothing is published.
        StorageError: Too little disk, or it failed; the run can be resumed.
    """
    return Backfill(spark, request, reporter).run()


class Backfill:
    """One process at work on a run; see `run_backfill`. `work` says afterwards what it did.

    Args:
        spark: The session, or what starts it.
        request: What to backfill.
        reporter: Gets the stages.
        model: The config's model where it is loaded already; several runs can share it.
    """

    def __init__(
        self,
        spark: SparkSession | Callable[[], SparkSession],
        request: BackfillRequest,
        reporter: Reporter,
        model: InstructUEModel | None = None,
    ) -> None:
        self.request, self.config, self.reporter = request, request.config, reporter
        self._model, self._shared = model, model is not None
        self.store = OutputStore(request.config.output.path)
        self.work = Work()
        self._spark, self._session = spark, spark if isinstance(spark, SparkSession) else None
        self._tag = ""
        self._verified: str | None = None
        self._found = self._begun = False

    def run(self) -> RunManifest:
        """Does what is missing."""
        request, store = self.request, self.store
        instructions = self.config.registry().select(request.instructions)
        if request.extract_id is not None:
            check_id("extract", request.extract_id)
        created = datetime.now(UTC)
        if request.resume is not None:
            run_id = resolve_run(store, request.resume)
        elif request.as_of is None:
            raise ConfigError("neither --as-of nor --resume is given", "say up to when events count")
        else:
            default = new_id(request.as_of, self.config.history_digest(), created.isoformat())
            run_id = check_id("run", request.run_id or default)
        store.require_free(self.config.output.min_free_gib)
        if store.exists("runs", run_id, "manifest.json"):
            self._refuse_finished(run_id)
        lease = take(store, "runs", run_id)
        self._tag, self._found = f"runs-{run_id}", store.exists("runs", run_id, "ledger.json")
        try:
            manifest = self._owned(run_id, created, instructions, lease)
        except BaseException as error:
            self._give_up(run_id, lease, error)
            raise
        lease.release()
        if self._session is not None:
            self._session.sparkContext.removeJobTag(self._tag)
        return manifest

    def _refuse_finished(self, run_id: str) -> None:
        """Raises unless there is something left to do of a run that has a manifest."""
        ledger = read_ledger(self.store, run_id)
        state = ledger.state if ledger is not None else None
        if self.request.resume is None:
            left = ledger is not None and state is RunState.AUDITED and ledger.plan.publish
        else:  # what was published once must not replace what is current by being resumed
            current = current_publication(self.store)
            was_published = state in (RunState.PUBLISHED, RunState.SUPERSEDED)
            left = not was_published or (current is not None and current.run_id == run_id)
        if not left:
            hint = f"publish it with `instructue publish {run_id}`, or choose another id"
            raise RunConflictError(f"run {run_id} is finished", hint)

    @property
    def spark(self) -> SparkSession:
        """The session, started when it is first needed."""
        if self._session is None:
            assert callable(self._spark)
            self._session = self._spark()
        self._session.sparkContext.addJobTag(self._tag)
        return self._session

    @property
    def model(self) -> InstructUEModel:
        """The config's model, loaded when it is first needed."""
        if self._model is None:
            self._model = load_model(self.config)
        return self._model

    def _owned(
        self, run_id: str, created: datetime, instructions: tuple[Instruction, ...], lease: Lease
    ) -> RunManifest:
        """The run from whatever state it is in, with the folder owned by this process."""
        store = self.store
        ledger = read_ledger(store, run_id)
        if ledger is None or not store.exists("runs", run_id, "manifest.json"):
            ledger = self._planned(ledger, run_id, created, instructions)
            manifest = self._computed(ledger, instructions, lease)
        else:
            self._check_plan(ledger, instructions)
            manifest = run_manifest(store, run_id)
            self.work.buckets_kept, self.work.extract_reused = len(manifest.buckets), True
        ledger = read_ledger(store, run_id)
        assert ledger is not None
        self.work.attempt, self.work.full_reason = ledger.attempts, ledger.plan.full_reason
        if ledger.state not in (RunState.AUDITED, RunState.PUBLISHED, RunState.SUPERSEDED):
            write_ledger(store, ledger.with_state(RunState.AUDITED))
        if self.request.publish and ledger.plan.publish:
            lease.check()
            self._publish(manifest)
        return manifest

    def _publish(self, manifest: RunManifest) -> None:
        store = self.store
        current = current_publication(store)
        if current is not None and current.run_id == manifest.run_id:  # died after it had moved the pointer
            note_published(store, manifest.run_id, None)
            return
        with self.reporter.stage("publish") as stage:
            stage.rows_in = stage.rows_out = manifest.users
            release(store, manifest.run_id, self.config, accept=self.request.accept, verified=self._verified)

    def _planned(
        self, ledger: Ledger | None, run_id: str, created: datetime, instructions: tuple[Instruction, ...]
    ) -> Ledger:
        """The ledger of the run: a new one, or the one there is if it fits the request."""
        if ledger is not None:
            self._check_plan(ledger, instructions)
            return ledger
        request = self.request
        assert request.as_of is not None
        model = self.model  # first, because a wrong model folder should fail before an hour of extraction
        check_leakage(model.config.trained_through, request)
        soft_prompts_of(self.config, instructions, model)
        if request.extract_id is not None:
            self._asked_extract(request.extract_id, request.as_of)
        plan = Plan(
            as_of=request.as_of.isoformat(),
            project=self.config.project,
            history_digest=self.config.history_digest(),
            model_version=model_version(model, self.config),
            trained=model.config.trained,
            embedding_dim=model.config.embedding_dim,
            instructions=_used(model, self.config, instructions),
            buckets=self.config.output.buckets,
            extract_id=request.extract_id,
            publish=request.publish,
        )
        if request.incremental:
            base, reason = choose_base(self.store, plan)
            plan = dataclasses.replace(plan, base_run=base, full_reason=reason)
        ledger = Ledger(run_id=run_id, created=created.isoformat(), plan=plan).with_state(RunState.PLANNED)
        write_ledger(self.store, ledger)
        return ledger

    def _check_plan(self, ledger: Ledger, instructions: tuple[Instruction, ...]) -> None:
        """Raises unless the request is for what the run was planned to be."""
        plan, request = ledger.plan, self.request
        asked = {one.id: one.content_hash for one in instructions}
        planned = {one.id: one.content_hash for one in plan.instructions}
        if request.resume is not None and request.instructions is None:  # instructions declared later do not matter
            asked = {name: value for name, value in asked.items() if name in planned}
        differs = [
            what
            for what, same in (
                ("as_of", request.as_of is None or request.as_of.isoformat() == plan.as_of),
                ("instructions", asked == planned),
                ("history settings", self.config.history_digest() == plan.history_digest),
                ("output.buckets", self.config.output.buckets == plan.buckets),
                ("extract", request.resume is not None or request.extract_id == plan.extract_id),
            )
            if not same
        ]
        if differs:
            raise VersionMismatchError(
                f"run {ledger.run_id} was planned with other settings: {', '.join(differs)}",
                "go back to those settings to resume it, or start another run",
            )

    def _computed(self, ledger: Ledger, instructions: tuple[Instruction, ...], lease: Lease) -> RunManifest:
        """Extracts, encodes, embeds and audits, as far as it is not done."""
        store, run_id = self.store, ledger.run_id
        started = datetime.now(UTC)
        instructions = tuple(one for one in instructions if one.id in {used.id for used in ledger.plan.instructions})
        self._took_over(ledger)
        extract = self._extracted(ledger)
        ledger = read_ledger(store, run_id) or ledger
        kept = intact_buckets(store, run_id)
        missing = sorted(set(range(extract.buckets)) - {marker.bucket for marker in kept})
        self.work.buckets_kept, self.work.buckets_embedded = len(kept), len(missing)
        if missing:
            self._prepare(ledger, extract, instructions)
            lease.check()
            self.work.model_loads = self._embedded(ledger, extract, instructions, lease, missing)
        lease.check()
        markers = complete_buckets(store, run_id, extract)
        ledger = (read_ledger(store, run_id) or ledger).with_state(RunState.WRITTEN)
        write_ledger(store, ledger)
        manifest = RunManifest(
            run_id=run_id,
            project=ledger.plan.project,
            as_of=extract.as_of,
            created=ledger.created,
            extract_id=extract.extract_id,
            history_digest=extract.history_digest,
            model_version=ledger.plan.model_version,
            trained=ledger.plan.trained,
            embedding_dim=ledger.plan.embedding_dim,
            instructions=ledger.plan.instructions,
            buckets=markers,
            users=sum(marker.rows for marker in markers),
            tokens=sum(marker.tokens for marker in markers),
            texts_encoded=self.work.texts_encoded,
            distinct_texts=extract.distinct_texts,
            digest=combine_digests([marker.digest for marker in markers]),
            seconds=round((datetime.now(UTC) - started).total_seconds(), 3),
            model_loads=self.work.model_loads,
            base_run=ledger.plan.base_run,
            carried=sum(marker.carried for marker in markers),
            empty=sum(marker.empty for marker in markers),
        )
        with self.reporter.stage("audit") as stage:
            for marker in markers:
                verify_bucket(store, manifest, marker)
            stage.rows_in = stage.rows_out = manifest.users
        lease.check()
        finish_run(store, manifest)
        self._verified = manifest.digest
        return manifest

    def _took_over(self, ledger: Ledger) -> None:
        note = "" if not ledger.attempts else f"resumed, was {ledger.state}"
        ledger = dataclasses.replace(ledger.with_state(RunState.RUNNING, note), attempts=ledger.attempts + 1)
        write_ledger(self.store, ledger)
        self.work.attempt, self._begun = ledger.attempts, True

    def _extracted(self, ledger: Ledger) -> ExtractManifest:
        """The run's extract: the one asked for, the one an earlier process finished, or a new one."""
        store, as_of = self.store, datetime.fromisoformat(ledger.plan.as_of)
        if ledger.plan.extract_id is not None:
            self.work.extract_reused = True
            return self._asked_extract(ledger.plan.extract_id, as_of)
        if ledger.extract_id is not None:
            found = extract_manifest(store, ledger.extract_id)
            if found is not None:
                self.work.extract_reused = True
                return found
            store.remove("extracts", ledger.extract_id)
        # Another name after a crash: a Spark process that outlives its driver for a moment may still write to the old.
        attempt = self.work.attempt
        extract_id = ledger.run_id if attempt == 1 else f"{ledger.run_id}.{attempt}"
        if store.exists("extracts", extract_id):
            raise RunConflictError(f"extract {extract_id} exists", "choose another run id")
        current = read_ledger(store, ledger.run_id) or ledger
        write_ledger(store, dataclasses.replace(current, extract_id=extract_id))
        return run_extract(self.spark, self.config, as_of, extract_id=extract_id, reporter=self.reporter)

    def _asked_extract(self, extract_id: str, as_of: datetime) -> ExtractManifest:
        """Opens the extract that was asked for and checks that it fits the config and `as_of`."""
        where, store = f"extract {extract_id}", self.store
        found = extract_manifest(store, extract_id)
        if found is None:
            finished = [name for name in store.names("extracts") if store.exists("extracts", name, "manifest.json")]
            raise ConfigError(f"there is no finished {where}", did_you_mean(extract_id, finished))
        if found.history_digest != self.config.history_digest() or found.as_of != as_of.isoformat():
            raise VersionMismatchError(
                f"{where} was made with as_of {found.as_of} and other settings or another as_of than asked for",
                "leave --extract out to extract anew",
            )
        return found

    def _prepare(self, ledger: Ledger, extract: ExtractManifest, instructions: tuple[Instruction, ...]) -> None:
        """Encodes new texts and puts model, soft-token table and soft prompts into the run, unless they are there."""
        store, run_id = self.store, ledger.run_id
        if store.exists("runs", run_id, PREPARED):
            return
        model = self.model
        if model_version(model, self.config) != ledger.plan.model_version:
            raise VersionMismatchError(
                f"run {run_id} was planned with another model", "go back to that model, or start another run"
            )
        prompts = soft_prompts_of(self.config, instructions, model)
        self.work.texts_encoded = encode_new_texts(self.spark, self.config, store, extract, self.reporter, run_id)
        with self.reporter.stage("soft_tokens") as stage:
            stage.rows_in = extract.distinct_texts
            stage.rows_out = build_soft_tokens(self.config, store, model, extract, run_id, prompts)
        store.write_json({"extract_id": extract.extract_id, "rows": stage.rows_out}, "runs", run_id, PREPARED)
        if not self._shared:
            self._model = None  # workers load their own; on one machine that is memory

    def _embedded(
        self,
        ledger: Ledger,
        extract: ExtractManifest,
        instructions: tuple[Instruction, ...],
        lease: Lease,
        missing: list[int],
    ) -> int:
        created, base = datetime.fromisoformat(ledger.created), None
        if ledger.plan.base_run is not None:
            base = BaseRun(ledger.plan.base_run, run_manifest(self.store, ledger.plan.base_run).extract_id)
        plan = RunPlan(
            root=self.store.root,
            run_id=ledger.run_id,
            extract_id=extract.extract_id,
            created_us=int(created.timestamp() * 1_000_000),
            num_sources=len(self.config.source_names),
            num_numeric=len(self.config.numeric_columns),
            instructions=instructions,
            embedding_dim=ledger.plan.embedding_dim,
            dtype=self.config.model.dtype,
            max_batch_tokens=self.config.model.max_batch_tokens,
            model_version=ledger.plan.model_version,
            owner=lease.token,
            base=base,
        )
        return embed_users(self.spark, plan, self.store, extract, missing, self.reporter)[1]

    def _give_up(self, run_id: str, lease: Lease, error: BaseException) -> None:
        """Leaves a run that can be resumed, or nothing; never touches what somebody else has taken over."""
        try:
            lease.check()
        except InstructueError:
            lease.release()  # where it is still ours
            return
        lease.revoke()  # workers still at it now refuse to write
        try:
            if self._session is not None:
                stop_jobs(self._session, self._tag)
                if isinstance(error, Exception):  # an interrupted command blocks this thread's connection to the JVM
                    with suppress(Exception):  # the JVM may be what has died
                        self._session.sparkContext.removeJobTag(self._tag)
            if not self._worth_keeping(run_id, error):
                lease.remove(SETTLE_SECONDS)
        finally:
            lease.release()

    def _worth_keeping(self, run_id: str, error: BaseException) -> bool:
        """Whether a run that has failed stays; notes the failure in its ledger, and removes an extract nobody needs."""
        store = self.store
        if store.exists("runs", run_id, "manifest.json"):
            return True  # finished; only its publication failed
        if self._found and not self._begun:
            return True  # somebody's unfinished run, which this request does not fit: it stays as it is
        try:
            ledger = read_ledger(store, run_id)
        except InstructueError:
            return True  # nobody knows what there is to lose
        mendable = isinstance(error, StorageError) or not isinstance(error, InstructueError)
        if ledger is not None and (mendable or ledger.attempts > 1):
            with suppress(InstructueError):  # on a full disk it stays `running`, which resumes as well
                write_ledger(store, ledger.with_state(RunState.FAILED, type(error).__name__))
            return True
        if ledger is not None and ledger.extract_id is not None and self.work.extract_reused is False:
            made = extract_manifest(store, ledger.extract_id)
            if made is not None:
                store.remove("extracts", ledger.extract_id)
        return False


def _used(
    model: InstructUEModel, config: InstructueConfig, instructions: tuple[Instruction, ...]
) -> list[RunInstruction]:
    return [
        RunInstruction(
            id=one.id,
            text=one.text,
            content_hash=one.content_hash,
            embedding_version=embedding_version(model, config, one),
        )
        for one in instructions
    ]


def check_leakage(trained_through: str | None, request: BackfillRequest) -> None:
    """Refuses to embed a moment the model has seen the future of.

    Raises:
        LeakageError: The model was trained on events at or after the request's `as_of`, and that is not allowed.
    """
    if trained_through is None or request.allow_leakage or request.as_of is None:
        return
    if datetime.fromisoformat(trained_through) > request.as_of:
        raise LeakageError(
            f"the model was trained on events up to {trained_through}, later than as_of {request.as_of.isoformat()}",
            "use a model trained on earlier data, or --allow-leakage where nobody measures with the result",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m instructue_spark.backfill` and of `spark-submit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="path of instructue.yaml")
    parser.add_argument("--as-of", help="exclusive upper bound on event time, ISO 8601 with time zone")
    parser.add_argument("--instruction", action="append", help="instruction id; repeat for several; default: all")
    parser.add_argument("--run-id", help="id of the run; an unfinished one is continued")
    parser.add_argument("--resume", help="finish this run, or the `latest` unfinished one")
    parser.add_argument(
        "--incremental", action="store_true", help="embed only users who changed since what is published"
    )
    parser.add_argument("--accept", help="why the run is published even if a quality gate fails")
    parser.add_argument("--extract", help="a finished extract to embed instead of extracting anew")
    parser.add_argument("--no-publish", action="store_true", help="finish the run but do not move the pointer")
    parser.add_argument("--allow-leakage", action="store_true", help="embed an as_of the model has seen in training")
    parser.add_argument("--cores", type=int, help="local cores; default: all")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, object]:
        config = load_config(arguments.config)
        request = BackfillRequest(
            config=config,
            as_of=parse_as_of(arguments.as_of) if arguments.as_of else None,
            instructions=arguments.instruction,
            run_id=arguments.run_id,
            extract_id=arguments.extract,
            publish=not arguments.no_publish,
            allow_leakage=arguments.allow_leakage,
            resume=arguments.resume,
            incremental=arguments.incremental,
            accept=arguments.accept,
        )
        config.registry().select(request.instructions)

        def session() -> SparkSession:
            return get_session(f"instructue backfill {config.project}", cores=arguments.cores)

        if "PYSPARK_GATEWAY_PORT" in os.environ:  # a cluster waits for the session, and not for long
            session()
        backfill = Backfill(session, request, reporter)
        manifest = backfill.run()
        extract: dict[str, Any] | None = None
        with suppress(StorageError):  # a finished run may have lost its extract to `instructue runs gc`
            extract = backfill.store.read_json("extracts", manifest.extract_id, "manifest.json")
        work = dataclasses.asdict(backfill.work)
        return {"run": to_json(manifest), "extract": extract, "published": request.publish, "work": work}

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())

"""A backfill that is killed, anywhere and again and again, ends as if nothing had happened.

One run dies in every state, each time resumed by the next process, and is compared with an undisturbed one. Then the
workers of a run die, or their disk or storage fails.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import instructue_spark.embed as embedding
from instructue_feast.config import InstructueConfig
from instructue_feast.errors import RunConflictError, SchemaError, StorageError, VersionMismatchError
from instructue_feast.runs.ledger import RunState, note_state, read_ledger, write_ledger
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.reader import read_run
from instructue_feast.runs.store import OutputStore
from instructue_spark.backfill import Backfill, BackfillRequest, run_backfill
from instructue_spark.report import Reporter
from tests.fake_runs import write_fake_run
from tests.projects import AS_OF, NUM_USERS, load, make_project
from tests.runs.test_ledger import FINISHED, ledger

pytestmark = pytest.mark.spark

ROOT = Path(__file__).parents[2]
BUCKETS = 6
SILENT = Reporter(stream=None)
NIGHT = ("--as-of", AS_OF.isoformat(), "--run-id", "night")
RESUME = ("--resume", "latest")


def no_spark() -> object:
    raise AssertionError("Spark was started for a run that needs none")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> InstructueConfig:
    folder = Path(tmp_path_factory.mktemp("killed"))
    make_project(folder, folder / "models", buckets=BUCKETS)
    return load(folder)


@pytest.fixture(scope="module")
def store(project) -> OutputStore:
    return OutputStore(project.output.path)


@pytest.fixture(scope="module")
def calm(spark, project) -> tuple[str, str]:
    """Digest and extract of an undisturbed run."""
    manifest = run_backfill(spark, BackfillRequest(config=project, as_of=AS_OF, run_id="calm", publish=False), SILENT)
    return manifest.digest, manifest.extract_id


def markers(store: OutputStore, run: str) -> dict[str, tuple[bytes, int]]:
    """Content and time of every marker: a bucket that is computed again gets another one."""
    files = [Path(store.path("runs", run, name, "marker.json")) for name in store.names("runs", run)]
    return {str(one): (one.read_bytes(), one.stat().st_mtime_ns) for one in files if one.is_file()}


def state(store: OutputStore, run: str) -> str:
    ledger = read_ledger(store, run)
    return str(ledger.state) if ledger else "none"


def killed(project: InstructueConfig, moment: str, arguments: tuple[str, ...]) -> tuple[int, list[dict]]:
    config = str(Path(project.output.path).parent / "instructue.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "tests.spark.killed_driver", moment, "--config", config, "--cores", "1", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_killed_in_every_state_ends_as_if_nothing_had_happened(spark, project, store, calm):
    old = write_fake_run(store, "2025-02-01T00:00:00Z")
    publish(store, old)
    kept: dict[str, tuple[bytes, int]] = {}
    for moment, arguments, left, buckets in (
        ("planned", NIGHT, "planned", 0),
        ("extracting", NIGHT, "running", 0),  # the very same command goes on as well, as a scheduler's retry does
        ("embedding", RESUME, "running", 2),
        ("terminated", RESUME, "failed", 4),
        ("written", RESUME, "written", BUCKETS),
        ("audited", RESUME, "audited", BUCKETS),
    ):
        code, lines = killed(project, moment, arguments)
        assert state(store, "night") == left, lines
        if moment == "terminated":
            assert code == 143
            assert lines[-1]["message"] == "the job was told to stop (SIGTERM)"
            assert "--resume" in lines[-1]["hint"]
        else:
            assert code == -signal.SIGKILL, lines
        now = markers(store, "night")
        assert len(now) == buckets
        assert kept.items() <= now.items()
        kept = now
        assert current_publication(store).run_id == old
    code, _ = killed(project, "pointer", RESUME)
    assert code == -signal.SIGKILL
    assert current_publication(store).run_id == "night"
    job = Backfill(no_spark, BackfillRequest(config=project, resume="night"), SILENT)
    manifest = job.run()
    assert manifest.digest == calm[0]
    assert markers(store, "night") == kept
    assert job.work.buckets_kept == BUCKETS
    assert job.work.buckets_embedded == 0
    assert state(store, "night") == "published"
    assert current_publication(store).run_id == "night"
    assert read_run(store, "night").num_rows == NUM_USERS
    with pytest.raises(RunConflictError, match="night is finished"):
        run_backfill(no_spark, BackfillRequest(config=project, as_of=AS_OF, run_id="night"), SILENT)


def faults() -> dict[str, Callable[[], None]]:
    """What befalls a worker. Nested, so that they travel to it by value: workers do not import tests."""

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def full() -> None:  # from here on no file of this worker may grow, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    def storage() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def network() -> None:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    return {"killed": killed, "full": full, "storage": storage, "network": network}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "a Python worker died"),
        ("full", r"cannot write .*bucket=0000.*File too large"),
        ("storage", "a worker could not reach its storage: OSError"),
        ("network", "a worker could not reach its storage: ConnectionResetError"),
    ],
)
def test_a_run_whose_workers_fail_is_resumed_without_computing_a_bucket_twice(
    spark, project, store, calm, monkeypatch, fault, message
):
    name = f"worker-{fault}"
    monkeypatch.setattr(embedding, "_embed_buckets", failing_at(3, faults()[fault], embedding._embed_buckets))
    request = BackfillRequest(config=project, as_of=AS_OF, run_id=name, extract_id=calm[1], publish=False)
    with pytest.raises(StorageError, match=message):
        run_backfill(spark, request, SILENT)
    monkeypatch.undo()
    assert state(store, name) == "failed"
    before = markers(store, name)
    assert 0 < len(before) < BUCKETS
    job = Backfill(spark, BackfillRequest(config=project, resume=name), SILENT)
    assert job.run().digest == calm[0]
    assert before.items() <= markers(store, name).items()
    assert (job.work.buckets_kept, job.work.buckets_embedded) == (len(before), BUCKETS - len(before))
    assert job.work.texts_encoded == 0


def failing_at(bucket: int, fault: Callable[[], None], real: Callable) -> Callable:
    """`_embed_buckets` with a fault before one bucket; nested functions travel to the workers by value."""

    def buckets(plan: embedding.RunPlan, missing: tuple[int, ...]) -> Callable:
        def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                if bucket in [missing[position] for position in batch.column("id").to_pylist()]:
                    fault()
                yield from real(plan, missing)(iter([batch]))

        return run

    return buckets


def test_a_damaged_bucket_is_the_only_one_that_is_computed_again(spark, project, store, calm):
    request = BackfillRequest(config=project, as_of=AS_OF, run_id="damaged", extract_id=calm[1], publish=False)
    run_backfill(spark, request, SILENT)
    store.remove_file("runs", "damaged", "manifest.json")
    Path(store.path("runs", "damaged", "bucket=00001", "part.parquet")).write_bytes(b"half a file")
    ledger = store.read_json("runs", "damaged", "ledger.json")
    store.write_json(ledger | {"steps": ledger["steps"][:-1]}, "runs", "damaged", "ledger.json")
    job = Backfill(spark, BackfillRequest(config=project, resume="damaged"), SILENT)
    assert job.run().digest == calm[0]
    assert (job.work.buckets_kept, job.work.buckets_embedded) == (BUCKETS - 1, 1)


def test_a_run_is_not_resumed_with_other_settings(project, store):
    with pytest.raises(VersionMismatchError, match="planned with other settings: instructions"):
        run_backfill(no_spark, BackfillRequest(config=project, resume="damaged", instructions=["taste"]), SILENT)
    assert len(markers(store, "damaged")) == BUCKETS


@pytest.mark.parametrize("how", [{"run_id": "killed-once", "as_of": AS_OF}, {"resume": "killed-once"}])
def test_a_refused_request_leaves_what_a_killed_first_attempt_has_made(project, store, how):
    write_ledger(store, dataclasses.replace(ledger("killed-once", RunState.RUNNING), attempts=1, extract_id="whole"))
    store.write_json({}, "runs", "killed-once", "bucket=00000", "marker.json")
    store.write_json({}, "extracts", "whole", "manifest.json")
    before = store.read_json("runs", "killed-once", "ledger.json")
    with pytest.raises(VersionMismatchError, match="planned with other settings"):
        run_backfill(no_spark, BackfillRequest(config=project, **how), SILENT)
    assert store.read_json("runs", "killed-once", "ledger.json") == before
    assert store.exists("runs", "killed-once", "bucket=00000", "marker.json")
    assert store.exists("extracts", "whole", "manifest.json")
    store.remove("runs", "killed-once")


def test_a_run_whose_ledger_cannot_be_read_is_not_removed(project, store):
    store.write_json({"plan": {}}, "runs", "unknown", "ledger.json")
    store.write_json({}, "runs", "unknown", "bucket=00000", "marker.json")
    with pytest.raises(SchemaError, match="not a ledger"):
        run_backfill(no_spark, BackfillRequest(config=project, as_of=AS_OF, run_id="unknown"), SILENT)
    assert store.exists("runs", "unknown", "bucket=00000", "marker.json")
    store.remove("runs", "unknown")


def test_resuming_a_run_that_was_superseded_does_not_bring_it_back(project, store):
    old, new = (write_fake_run(store, f"2025-01-0{day}T00:00:00Z") for day in (1, 2))
    write_ledger(store, ledger(old, *FINISHED))
    note_state(store, old, RunState.PUBLISHED)
    publish(store, new)
    with pytest.raises(RunConflictError, match=f"run {old} is finished"):
        run_backfill(no_spark, BackfillRequest(config=project, resume=old), SILENT)
    assert current_publication(store).run_id == new

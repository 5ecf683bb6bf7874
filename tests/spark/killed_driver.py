"""The backfill job with a moment at which it dies: `python -m tests.spark.killed_driver <moment> <arguments>`.

Moments: `planned`, `written`, `audited` (just after the ledger says so), `extracting` (the extract is claimed, nothing
of it is written), `embedding` (before bucket 2), `terminated` (before bucket 4, by SIGTERM), `pointer` (it has moved,
and the ledger does not know).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator

import pyarrow as pa

import instructue_feast.runs.release as releasing
import instructue_spark.backfill as job
import instructue_spark.embed as embedding
import instructue_spark.extract as extracting


def die(*_arguments: object, **_values: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(module: object, name: str, when: Callable[..., bool]) -> None:
    """Kills this process after a call of `module.name` whose arguments satisfy `when`."""
    real = getattr(module, name)

    def wrapped(*arguments: object) -> object:
        result = real(*arguments)
        if when(*arguments):
            die()
        return result

    setattr(module, name, wrapped)


def before_bucket(number: int, kind: signal.Signals) -> None:
    """Signals this process from the worker that is about to embed a bucket, which then waits for its end."""
    driver, real = os.getpid(), embedding._embed_buckets

    def buckets(plan: embedding.RunPlan, missing: tuple[int, ...]) -> Callable:
        def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for position in batch.column("id").to_pylist():
                    if missing[position] == number:
                        os.kill(driver, kind)
                        signal.pause()
                yield from real(plan, missing)(iter([batch]))

        return run

    embedding._embed_buckets = buckets


def main(moment: str, arguments: list[str]) -> int:
    if moment in ("planned", "written", "audited"):
        after(job, "write_ledger", lambda _store, ledger: ledger.state == moment)
    elif moment == "extracting":
        extracting._Job.run = die
    elif moment == "embedding":
        before_bucket(2, signal.SIGKILL)
    elif moment == "terminated":
        before_bucket(4, signal.SIGTERM)
    elif moment == "pointer":
        releasing.note_published = die
    else:
        raise SystemExit(f"unknown moment {moment}")
    return job.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))

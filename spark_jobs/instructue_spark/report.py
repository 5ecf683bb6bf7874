"""Progress of a job as JSON lines, for the command line that started it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pyspark import SparkContext

from instructue_feast.errors import InstructueError, StoppedError, StorageError
from instructue_feast.telemetry import Telemetry

STOPPED_HINT = "start it again; `instructue backfill --resume latest` goes on where a backfill was"
LOST_HINT = "mend the disk or the network; `instructue backfill --resume latest` goes on where a backfill was"
GRACE_SECONDS = 10.0
"""How long a job that is told to stop may take to notice that its Spark jobs were cancelled."""
BUG_HINT = "this is a bug or a failing cluster; the stack is in the job's log"


@dataclass(slots=True)
class Stage:
    """A stage in progress; the job fills in the rows."""

    name: str
    rows_in: int = 0
    rows_out: int = 0


@dataclass(slots=True)
class Reporter:
    """Writes one JSON object per line: `stage_started`, `progress`, `stage_done`, `result`, `error`.

    Every line has the time it was written and the job's name. No line holds a user id or a text.

    Args:
        stream: Where to; the job's standard output by default. `None` keeps silent.
        telemetry: Gets the stages as metrics and spans.
    """

    stream: TextIO | None = field(default_factory=lambda: sys.stdout)
    telemetry: Telemetry | None = None

    def emit(self, event: str, **values: Any) -> None:
        """Writes one event."""
        if self.stream is not None:
            stamp = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
            stamp |= {"job": self.telemetry.job} if self.telemetry else {}
            self.stream.write(json.dumps({"event": event, **values, **stamp}) + "\n")
            self.stream.flush()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Times a stage and reports its rows when it ends without an error."""
        self.emit("stage_started", name=name)
        started = time.monotonic()
        stage = Stage(name)
        with self.telemetry.span(name) if self.telemetry else nullcontext() as span:
            yield stage
            if span is not None:
                span.set_attributes({"rows_in": stage.rows_in, "rows_out": stage.rows_out})
        seconds = round(time.monotonic() - started, 3)
        if self.telemetry is not None:
            self.telemetry.stage(name, seconds, stage.rows_in, stage.rows_out)
        self.emit("stage_done", name=name, seconds=seconds, rows_in=stage.rows_in, rows_out=stage.rows_out)

    def progress(self, name: str, done: int, total: int, **values: Any) -> None:
        """Reports how far a stage is."""
        self.emit("progress", name=name, done=done, total=total, **values)

    def error(self, error: InstructueError) -> None:
        """Reports an error the user can mend."""
        self.emit("error", type=type(error).__name__, message=error.message, hint=error.hint)


def run_main(job: Callable[[Reporter], dict[str, Any]]) -> int:
    """Runs a job as a process: its result or its error becomes the last line, and the exit code.

    Anything that might write to standard output by accident (the JVM, a library) is sent to standard error, so that the
    lines stay JSON. SIGTERM ends the job like an error, so that it removes what it has half written. An unexpected
    exception is logged by its class and stack alone, because its message may quote a row. Metrics and spans go where
    the environment says (`instructue_feast.telemetry`).
    """
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    telemetry = Telemetry(Path(job.__code__.co_filename).stem)
    reporter = Reporter(stream, telemetry)
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    code, result = _run(job, reporter, stop)
    telemetry.finish(code, result)
    for warning in telemetry.warnings:
        reporter.emit("warning", message=warning)
    if result is not None:
        reporter.emit("result", value=result)
    return code


def _run(
    job: Callable[[Reporter], dict[str, Any]], reporter: Reporter, stop: _Stop
) -> tuple[int, dict[str, Any] | None]:
    """The exit code, and the result if there is one; an error is reported."""
    assert reporter.telemetry is not None
    try:
        with reporter.telemetry.span(reporter.telemetry.job):
            return 0, job(reporter)
    except BaseException as error:
        known = StoppedError("the job was told to stop (SIGTERM)", STOPPED_HINT) if stop.told else _explained(error)
        if known is not None:
            reporter.error(known)
            return known.exit_code, None
        if not isinstance(error, Exception):
            raise
        stack = "".join(traceback.format_tb(error.__traceback__))
        sys.stderr.write(f"{type(error).__module__}.{type(error).__qualname__}, message withheld\n{stack}")
        reporter.emit("error", type="InstructueError", message=f"unexpected {type(error).__name__}", hint=BUG_HINT)
        return InstructueError.exit_code, None


def _explained(error: BaseException) -> InstructueError | None:
    if isinstance(error, InstructueError):
        return error
    if not isinstance(error, OSError):
        return None
    sys.stderr.write("".join(traceback.format_tb(error.__traceback__)))
    of_spark = any("py4j" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    what = "the Spark process is gone" if of_spark else "the storage cannot be reached"
    return StorageError(f"{what}: {type(error).__name__}, {error.strerror or 'no reason given'}", LOST_HINT)


class _Stop:
    """Handles SIGTERM.

    An exception in the middle of a Spark action would leave the JVM's answer unread, and the next command, which
    PySpark sends while the exception passes, would wait for the end of the running job. So the jobs are cancelled
    first, from another thread, and the action itself ends with an error. Only where nothing happens for a while,
    because no job was running, an exception is raised here.
    """

    def __init__(self) -> None:
        self.told = False

    def __call__(self, *_: object) -> None:
        context = SparkContext._active_spark_context
        again, self.told = self.told, True
        if again or context is None:
            raise SystemExit(StoppedError.exit_code)
        threading.Thread(target=self._cancel, args=(context,), daemon=True).start()

    def _cancel(self, context: SparkContext) -> None:
        with suppress(Exception):  # the JVM may be gone already
            context.cancelAllJobs()
        time.sleep(GRACE_SECONDS)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

"""Starts a Spark job as a process and shows its progress.

The command line never imports Spark: a job is `python -m instructue_spark.<job>`, and speaks JSON lines.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from instructue_feast.cli.console import err
from instructue_feast.errors import InstructueError, error_from_name


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One finished stage."""

    name: str
    seconds: float
    rows_in: int
    rows_out: int


@dataclass(slots=True)
class JobResult:
    """What a job returned, and its stages."""

    value: dict[str, Any] = field(default_factory=dict)
    stages: list[StageResult] = field(default_factory=list)


def run_job(module: str, arguments: list[str], *, log: Path, quiet: bool = False) -> JobResult:
    """Runs `python -m <module>` and waits for it, with one progress line per stage on standard error.

    Args:
        module: The job's module, such as `instructue_spark.backfill`.
        arguments: Its command-line arguments.
        log: File that takes the job's standard error (Spark's log).
        quiet: Show no progress.

    Raises:
        InstructueError: The error the job reported, of the same class; or that it ended without saying why.
    """
    result = JobResult()
    error: InstructueError | None = None
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    with (
        log.open("w", encoding="utf-8") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, encoding="utf-8") as process,
        _sigterm_passed_on(process),
        StageDisplay(quiet=quiet) as display,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "result":
                    result.value = event["value"]
                elif event["event"] == "error":
                    error = error_from_name(event["type"], event["message"], event["hint"])
                elif event["event"] == "warning":
                    err.print(f"[yellow]{escape(event['message'])}[/]", soft_wrap=True)
                elif stage := display.show(event):
                    result.stages.append(stage)
        except BaseException:
            process.terminate()  # the job removes what it has half written
            raise
    if type(error) is InstructueError:  # nobody knows what it was
        raise InstructueError(error.message, f"{error.hint}: {log}")
    if error is not None:
        raise error
    if process.returncode:
        raise InstructueError(f"{module} ended with code {process.returncode} and did not say why", f"its log is {log}")
    return result


@contextmanager
def _sigterm_passed_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """SIGTERM is for the job: it stops, says so and how to go on, and this process ends with that error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StageDisplay:
    """One line per stage: a spinner and a bar while it runs, a check mark with rows and seconds when it is done."""

    def __init__(self, *, quiet: bool = False) -> None:
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True)
        self._quiet = quiet
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> StageDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: dict[str, Any]) -> StageResult | None:
        """Shows one event of a job; returns the stage it finished, if any."""
        name = event.get("name", "")
        if event["event"] == "stage_started":
            self._tasks[name] = self._progress.add_task(name, total=None, rate="")
        elif event["event"] == "progress":
            self._progress.update(
                self._tasks[name], completed=event["done"], total=event["total"], rate=event.get("rate", "")
            )
        elif event["event"] == "stage_done":
            stage = StageResult(
                name=name, seconds=event["seconds"], rows_in=event["rows_in"], rows_out=event["rows_out"]
            )
            self._progress.remove_task(self._tasks.pop(name))
            if not self._quiet:
                print_stage(stage)
            return stage
        return None

    def timed(self, name: str, work: Callable[[], tuple[int, int]]) -> StageResult:
        """Runs a stage of this process; `work` returns its rows in and out."""
        import time

        self.show({"event": "stage_started", "name": name})
        started = time.monotonic()
        rows_in, rows_out = work()
        seconds = round(time.monotonic() - started, 3)
        done = {"event": "stage_done", "name": name, "seconds": seconds, "rows_in": rows_in, "rows_out": rows_out}
        stage = self.show(done)
        assert stage is not None
        return stage


def print_stage(stage: StageResult) -> None:
    """Prints a finished stage on standard error."""
    err.print(f"[green]✓[/] {stage.name:<12} {stage.rows_in:>10,} in {stage.rows_out:>10,} out {stage.seconds:>8.1f} s")

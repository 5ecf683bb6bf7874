"""A progress bar with the numbers that matter, in place of the one of Transformers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_LINE = {
    "contrastive_loss": "contrastive", "chance_loss": "chance", "autoregressive_loss": "next-token",
    "accuracy": "accuracy", "temperature": "temperature", "pairs_per_second": "pairs/s",
    "tokens_per_second": "tokens/s",
}  # fmt: skip


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows steps and the last line of the log; prints validations as they come.

    Args:
        console: Where to; standard error in the command line.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(), TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("train", total=None, line="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the bar; a resumed run starts where it stopped."""
        del args, control
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        del args, control
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Shows a line of the log."""
        del args, control
        logs = logs or {}
        if "contrastive_loss" in logs:
            self._progress.update(self._task, line=summary(logs))
            if state.is_world_process_zero and not self._console.is_terminal:  # a log file shows no bar
                self._console.print(f"step {state.global_step:>6}: {summary(logs)}", soft_wrap=True)
        found = {name: value for name, value in logs.items() if name.startswith("eval_auc") and "questions" not in name}
        if found and state.is_world_process_zero:
            shown = "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in found.items())
            self._console.print(f"step {state.global_step:>6}: {shown}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the bar."""
        del args, state, control
        self._progress.stop()


def summary(logs: dict[str, float]) -> str:
    """A line of the log in words.

    >>> summary({"contrastive_loss": 0.51234, "chance_loss": 0.6931, "pairs_per_second": 120.4})
    'contrastive 0.512  chance 0.693  pairs/s 120'
    """
    parts = [(text, logs[name]) for name, text in _LINE.items() if name in logs]
    return "  ".join(f"{text} {value:.0f}" if text.endswith("/s") else f"{text} {value:.3f}" for text, value in parts)

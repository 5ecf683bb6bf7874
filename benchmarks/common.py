"""What all benchmarks share: interleaved timing, and results stamped with device, versions and date."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One row of a results file.

    Attributes:
        name: The benchmark.
        variant: What was measured.
        scale: How much of it, as `key=value` pairs.
        metric: For example `seconds`, `users_per_second`, `ratio`.
        unit: For example `s`, `1/s`, `1`.
        p50: Median over the repeats.
        p20: Lower quantile.
        p80: Upper quantile.
        device: Processor or accelerator, with threads.
        versions: Releases of what does the work.
        date: UTC.
    """

    name: str
    variant: str
    scale: str
    metric: str
    unit: str
    p50: float
    p20: float
    p80: float
    device: str
    versions: str
    date: str


def measure(
    name: str,
    variant: str,
    values: Sequence[float],
    *,
    scale: str,
    metric: str,
    unit: str,
    packages: Sequence[str] = (),
) -> Measurement:
    """Makes a stamped row out of repeated values."""
    p20, p50, p80 = (float(f"{one:.6g}") for one in np.quantile(np.asarray(values, float), [0.2, 0.5, 0.8]))
    return Measurement(
        name=name, variant=variant, scale=scale, metric=metric, unit=unit, p50=p50, p20=p20, p80=p80,
        device=device_name(), versions=versions(packages), date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )  # fmt: skip


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times functions in turns, so that whatever else the machine does touches all of them alike.

    Args:
        functions: What to time, by name.
        repeats: Turns that count.
        warmup: Turns before that do not.
        clock: Seconds; `time.process_time` for those this process computed, which other processes touch less.

    Returns:
        Seconds of each turn, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            started = clock()
            function()
            if turn >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def append_csv(file: Path, rows: Sequence[Measurement]) -> None:
    """Appends rows to a results file, with a header when it is new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [one.name for one in fields(Measurement)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_json(file: str | Path | None, rows: Sequence[Measurement], **values: object) -> None:
    """Writes rows and further values as one JSON document; nothing for `None`."""
    if file is not None:
        document = {**values, "measurements": [asdict(row) for row in rows]}
        Path(file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def device_name() -> str:
    """Accelerator, or processor with its cores and torch's threads."""
    try:
        import torch
    except ImportError:
        return f"{_processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def versions(packages: Sequence[str]) -> str:
    """Python and the named packages with their releases."""
    found = [f"python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return "; ".join(found)

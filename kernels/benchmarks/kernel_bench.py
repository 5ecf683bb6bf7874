"""What the kernels' benchmarks share: interleaved timing, peak memory, and rows stamped with device and versions."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a results file.

    Attributes:
        op: What was measured: `info_nce`, `adapter`, `step`.
        provider: By what: `ours`, `eager`, `compile`, a peer, `cublas`.
        mode: `forward`, `forward+backward`; with details after a space.
        n: Rows: queries, texts.
        m: Rows of the other side, or 0.
        d: Size of a vector.
        dtype: Of the inputs.
        metric: `time`, `memory`, `ratio`, `exponent`.
        unit: `ms`, `MiB`, `1`.
        p50: Median over the repeats.
        p20: Lower quantile.
        p80: Upper quantile.
        device: GPU, or processor with threads.
        driver: Of the GPU; empty on a CPU.
        torch: Release.
        triton: Release; empty if absent.
        date: UTC.
    """

    op: str
    provider: str
    mode: str
    n: int
    m: int
    d: int
    dtype: str
    metric: str
    unit: str
    p50: float
    p20: float
    p80: float
    device: str
    driver: str
    torch: str
    triton: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a row is about; fields as in `Row`."""

    op: str
    mode: str
    n: int
    m: int
    d: int
    dtype: str = "bfloat16"


def row(shape: Shape, provider: str, values: Sequence[float], *, metric: str, unit: str) -> Row:
    """Makes a stamped row of repeated values.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError(f"nothing was measured of {provider} at {shape}")
    p20, p50, p80 = (float(f"{one:.6g}") for one in _quantiles(values))
    return Row(
        **asdict(shape), provider=provider, metric=metric, unit=unit, p50=p50, p20=p20, p80=p80, device=device_name(),
        driver=driver(), torch=torch.__version__, triton=_release("triton"),
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )  # fmt: skip


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], statistics.median(values), deciles[7]


class Clock:
    """A time budget for a whole benchmark, so that one call ends in time whatever is slow."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    seconds: float = float("inf"),
    processor: bool = False,
) -> dict[str, list[float]]:
    """Times functions in turns, so that whatever else the machine does touches all of them alike.

    Args:
        functions: What to time, by name.
        repeats: Turns that count.
        warmup: Turns before that do not.
        seconds: No further turn starts after these, once each function has counted once.
        processor: Count the process's own processor time: on a busy machine steadier than what the clock says, and the
            same as that for one thread on an idle one. Not for a GPU.

    Returns:
        Milliseconds of each turn, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    clock = Clock(seconds)
    for turn in range(warmup + repeats):
        if turn > warmup and not clock.left:
            break
        for name, function in functions.items():
            milliseconds = _timed(function, processor=processor)
            if turn >= warmup:
                found[name].append(milliseconds)
    return found


def _timed(function: Callable[[], object], *, processor: bool) -> float:
    if processor or not torch.cuda.is_available():
        clock = time.process_time if processor else time.perf_counter
        started = clock()
        function()
        return (clock() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(function: Callable[[], object]) -> float:
    """MiB that a call needs beyond what is there before it: of the GPU, else of the process.

    Memory of a CPU process is read from its high-water mark, which Linux can reset.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with resident_peak() as peak:
        function()
    return peak[0]


@contextlib.contextmanager
def resident_peak() -> Iterator[list[float]]:
    """Yields a list that holds, after the block, by how many MiB the process grew in it at most (Linux)."""
    with contextlib.suppress(OSError, AttributeError):  # what the allocator kept would be used again and not be seen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to what is resident now
    before = _status("VmRSS")
    found: list[float] = []
    yield found
    found.append((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log values over log sizes: 1 grows in proportion, 2 with the square.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    import math

    slope, _ = statistics.linear_regression([math.log(one) for one in sizes], [math.log(one) for one in values])
    return slope


def append_csv(file: Path, rows: Sequence[Row]) -> None:
    """Appends rows to a results file, with a header when it is new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [one.name for one in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(one) for one in rows)


def show(rows: Sequence[Row]) -> None:
    """Prints rows, one a line."""
    for one in rows:
        size = f"{one.n}x{one.m}x{one.d}"
        print(f"{one.op:9} {one.mode:24} {size:18} {one.provider:14} {one.metric:8} {one.p50:12.4g} {one.unit}")


def device_name() -> str:
    """GPU, or processor with its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info, name = Path("/proc/cpuinfo"), platform.machine()
    if info.exists():
        models = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def driver() -> str:
    """Release of the GPU's driver; empty without one."""
    if not torch.cuda.is_available():
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""

"""`info_nce` by row chunks on a CPU against eager torch: time, peak memory and their ratios.

python kernels/benchmarks/info_nce_cpu.py                   # appends to results/info_nce_cpu.csv
python kernels/benchmarks/info_nce_cpu.py --large           # memory alone at N = 32768, where eager needs 20 GiB
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from info_nce_providers import Loss, eager, ours
from kernel_bench import RESULTS, Row, Shape, append_csv, interleaved, peak_mib, row, show

SCALE = 1 / 0.07


def calls(count: int, size: int, *, symmetric: bool, names: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Forward and backward by provider."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(count, size, generator=generator).requires_grad_() for _ in range(2)]
    leaves.append(torch.tensor(math.log(SCALE), requires_grad=True))
    known: dict[str, Loss] = {
        "chunked": ours("chunked", symmetric=symmetric),
        "eager": lambda *arguments: eager(*arguments, symmetric=symmetric),
    }

    def call(loss: Loss) -> None:
        for one in leaves:
            one.grad = None
        loss(*leaves).backward()

    return {name: lambda name=name: call(known[name]) for name in names}


def run(count: int, size: int, *, repeats: int, names: Sequence[str] = ("eager", "chunked")) -> Iterator[list[Row]]:
    """Rows for both directions together, then for one."""
    for symmetric in (True, False):
        found: list[Row] = []
        mode = f"forward+backward {'symmetric' if symmetric else 'one way'}"
        shape = Shape(op="info_nce", mode=mode, n=count, m=count, d=size, dtype="float32")
        functions = calls(count, size, symmetric=symmetric, names=names)
        memory = {name: [peak_mib(function)] for name, function in functions.items()}
        times, work = _times(functions, repeats) if repeats else ({}, {})
        for metric, unit, values in (("memory", "MiB", memory), ("time", "ms", times), ("cpu time", "ms", work)):
            if not values:
                continue
            found += [row(shape, name, values[name], metric=metric, unit=unit) for name in names]
            if "eager" in names:
                ratios = [a / max(b, 2**-10) for a, b in zip(values["chunked"], values["eager"], strict=True)]
                found.append(row(shape, "chunked", ratios, metric=f"{metric} over eager", unit="1"))
        yield found


def _times(
    functions: dict[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds in turns: by the clock, and of all threads of this process, which others' work changes less."""
    work: dict[str, list[float]] = {name: [] for name in functions}

    def timed(name: str) -> None:
        started = time.process_time()
        functions[name]()
        work[name].append((time.process_time() - started) * 1e3)

    times = interleaved({name: lambda name=name: timed(name) for name in functions}, repeats=repeats, warmup=1)
    return times, {name: values[1:] for name, values in work.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--large", action="store_true", help="N = 32768 without eager")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.large:
        rows = run(32768, options.size, repeats=0, names=("chunked",))
    else:
        rows = run(options.rows, options.size, repeats=options.repeats)
    for found in rows:  # at once, so that what was measured stays
        append_csv(options.out / "info_nce_cpu.csv", found)
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

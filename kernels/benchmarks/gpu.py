"""All GPU measurements of the kernels in one call with a time limit: `make bench-gpu`.

    python kernels/benchmarks/gpu.py --seconds 540        # appends to results/gpu.csv and draws results/*.png
    python kernels/benchmarks/gpu.py --smoke --out DIR    # the same code at tiny sizes, on any device

Parts are the modules `*_bench.py` beside this one: each has `run(seconds, smoke=...) -> list[Row]` and its SHARE of the
time.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from kernel_bench import RESULTS, Clock, Row, append_csv, show
from plots import draw

PARTS = tuple(sorted(one.stem for one in Path(__file__).parent.glob("*_bench.py") if one.stem != "kernel_bench"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, each within its share of the time; 1 if there is no GPU to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device: does the code run?")
    parser.add_argument("--part", choices=PARTS, action="append", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file and the plots")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        print("No CUDA device: nothing is measured. --smoke runs the same code at tiny sizes on a CPU.")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    clock, rows = Clock(options.seconds), list[Row]()
    parts = [importlib.import_module(name) for name in options.part or PARTS]
    for place, part in enumerate(parts):
        share = part.SHARE / sum(one.SHARE for one in parts[place:])
        found = part.run(clock.left * share, smoke=options.smoke)
        # At once, so that what was measured stays if a later part fails.
        append_csv(options.out / "gpu.csv", found)
        show(found)
        rows += found
    for file in draw(rows, options.out):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The adapter, texts in prompts, the next-token loss and a training step on one thread of a CPU, beside plain torch.

python kernels/benchmarks/adapter_cpu.py            # a few minutes; appends to results/adapter_cpu.csv
python kernels/benchmarks/adapter_cpu.py --smoke    # the same code at tiny sizes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import adapter_bench
import next_token_bench
import step_bench
import torch
from kernel_bench import RESULTS, Row, append_csv, show

ROWS = (2048, 8192, 32768)


def run() -> Iterator[list[Row]]:
    """Sizes of a batch in training (2,048 and 8,192 distinct texts) and of a phrasebook, part after part."""
    for number in ROWS:
        given = adapter_bench.make(number, adapter_bench.SIZES, "cpu", torch.float32)
        yield adapter_bench.measure_adapter(given, 40, repeats=7, peers=("eager", "grouped_mm"))
    for users in (32, 128):
        yield adapter_bench.measure_texts(users, 200, adapter_bench.SIZES[2], "cpu", 20, repeats=7)
    for dtype in (torch.float32, torch.bfloat16):
        yield next_token_bench.measure(512, next_token_bench.VOCABULARY, 576, dtype, 40, repeats=5)
    yield step_bench.measure(step_bench.CUT, 60, repeats=5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does the code run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = (adapter_bench, next_token_bench, step_bench)
    for rows in (part.run(10, smoke=True) for part in parts) if options.smoke else run():
        append_csv(options.out / "adapter_cpu.csv", rows)  # at once, so that a later failure costs nothing
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One full extraction of The Complete Journey: all households, all sources, the whole year.

    python benchmarks/extraction.py --repeats 3 --json extraction.json

Writes the raw tables to a temporary folder, then runs the job as a process and samples the memory of its whole process
tree (JVM and Python workers) four times a second. The target is two minutes and 4 GiB on two cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import RESULTS, Measurement, append_csv, measure, write_json

from instructue_feast.datasets.complete_journey import write_complete_journey

AS_OF = "2018-01-02T00:00:00Z"
WINDOW_DAYS = 400
PACKAGES = ("pyspark", "pyarrow")


def whole_year(folder: Path, households: int | None) -> Path:
    """Writes the data and widens the window of every source to the whole year; returns the config."""
    config = write_complete_journey(folder, households=households).config
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"(?m)^(\s*days: )\d+", rf"\g<1>{WINDOW_DAYS}", text), encoding="utf-8")
    return config


def run_once(config: Path, cores: int) -> tuple[float, float, int]:
    """Seconds, peak memory in GiB of the process tree, and events of one extraction."""
    command = [sys.executable, "-m", "instructue_spark.extract", "--config", str(config), "--as-of", AS_OF]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [*command, "--cores", str(cores)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(root))
            time.sleep(0.25)
        seconds = time.perf_counter() - started
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"the job failed:\n{output}")
    found = re.findall(r'"events": (\d+)', output)
    return seconds, peak / 2**30, int(found[-1])


def _resident(root: psutil.Process) -> int:
    total = 0
    for one in [root, *root.children(recursive=True)]:
        try:
            # PSS counts a page that forked Python workers share once; RSS would count it for each of them.
            info = one.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:  # it ended between the two calls
            continue
    return total


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--households", type=int, help="fewer households; default: all 2,469")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = whole_year(Path(scratch), arguments.households)
        runs = [run_once(config, arguments.cores) for _ in range(arguments.repeats)]
    scale = f"households={arguments.households or 2469} events={runs[0][2]} cores={arguments.cores}"
    rows: list[Measurement] = [
        measure("extraction", "complete-journey", [one[0] for one in runs], scale=scale, metric="seconds", unit="s",
                packages=PACKAGES),
        measure("extraction", "complete-journey", [one[1] for one in runs], scale=scale, metric="peak_memory",
                unit="GiB", packages=PACKAGES),
    ]  # fmt: skip
    for row in rows:
        print(f"{row.metric}: {row.p50:.3g} {row.unit} (median of {len(runs)}), {row.scale}")
    if not arguments.no_csv:
        append_csv(RESULTS / "extraction.csv", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()

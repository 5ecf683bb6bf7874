"""How extraction grows: 10 k, 100 k and 1 M synthetic users, beside a bare Spark read and shuffle of the same bytes.

    python benchmarks/scale.py --users 10000 100000 --repeats 3
    python benchmarks/scale.py --users 1000000 --repeats 1

The raw tables (about 30 events per user) are generated once into `--data` and kept. Two jobs then take turns, each a
process of its own with the same cores and heap:

- `extract`: `python -m instructue_spark.extract`, all of it: quarantine, phrasebook, packed histories, counts.
- `read_and_shuffle`: reads the columns the extraction reads, and no others, shuffles their rows by user, and writes
  them nowhere. It is the least any Spark job pays that brings the events of a user together.

`seconds` is the time inside the job, after its session is up, in both; `wall_seconds` the life of the process.
`cpu_seconds` is what all its processes used of all processors, which other work on the machine hardly changes.
`ratio_to_read_and_shuffle` and `cpu_ratio_to_read_and_shuffle` divide what the same turn took. `peak_memory` is that of
the whole process tree (JVM and Python workers), sampled four times a second, with shared pages counted once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from common import RESULTS, Measurement, append_csv, measure, write_json

from instructue_feast.config import InstructueConfig, load_config

AS_OF = "2025-06-01T00:00:00Z"
PACKAGES = ("pyspark", "pyarrow")


@dataclass(frozen=True, slots=True)
class Job:
    """What one process took: seconds inside the job, of the process, of all processors, peak GiB; what it returned."""

    seconds: float
    wall: float
    cpu: float
    peak_gib: float
    result: dict[str, object]


def data(root: Path, users: int) -> Path:
    """The project of so many users, generated when it is not there; returns its config."""
    folder = root / str(users)
    config = folder / "instructue.yaml"
    if not config.exists():
        print(f"generating {users:,} users into {folder}", flush=True)
        command = ["-c", "from instructue_feast.cli.main import run; run()", "data", "synthetic", "--json"]
        subprocess.run(
            [sys.executable, *command, "--out", str(folder), "--users", str(users), "--seed", "0"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return config


def run_process(command: list[str]) -> Job:
    """Runs a job whose last line on standard output is its result, and samples the memory of its tree."""
    started, peak = time.perf_counter(), 0
    cpu: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _sample(root, cpu))
            time.sleep(0.25)
        wall = time.perf_counter() - started
        lines = process.stdout.read().splitlines() if process.stdout else []
    last = json.loads(lines[-1]) if lines else {}
    if process.returncode or last.get("event") != "result":
        raise SystemExit(f"{command} failed: {last}")
    return Job(float(last["value"]["seconds"]), wall, sum(cpu.values()), peak / 2**30, last["value"])


def _sample(root: psutil.Process, cpu: dict[int, float]) -> int:
    """Memory of a process tree now, in bytes; notes the processor seconds of each of its processes."""
    total = 0
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for one in tree:
        try:
            info, times = one.memory_full_info(), one.cpu_times()
            cpu[one.pid] = times.user + times.system
            total += getattr(info, "pss", info.rss)
        except psutil.Error:  # it ended between the two calls
            continue
    return total


def extract(config: Path, cores: int) -> Job:
    """One extraction, removed afterwards."""
    command = [sys.executable, "-m", "instructue_spark.extract", "--config", str(config), "--as-of", AS_OF]
    job = run_process([*command, "--cores", str(cores)])
    shutil.rmtree(Path(load_config(config).output.path) / "extracts" / str(job.result["extract_id"]))
    return job


def read_and_shuffle(config: Path, cores: int) -> Job:
    """One bare read and shuffle."""
    return run_process([sys.executable, __file__, "--bare", str(config), "--cores", str(cores)])


def bare(config: InstructueConfig, cores: int) -> None:
    """Body of the bare job: what anybody would write to bring the rows of a user together."""
    from instructue_spark.session import get_session

    spark = get_session("bare read and shuffle", cores=cores)
    started, rows = time.monotonic(), 0
    tables = [(one.table, one.user_id, one.columns) for one in config.sources.values()]
    if config.users is not None:
        tables.append((config.users.table, config.users.user_id, (config.users.user_id,)))
    for table, user, columns in tables:
        frame = spark.read.format(table.format).options(**table.options).load(table.path).select(*columns)
        partitions = int(spark.conf.get("spark.sql.shuffle.partitions") or 200)
        frame.repartition(partitions, user).write.format("noop").mode("overwrite").save()
        rows += 1
    value = {"seconds": round(time.monotonic() - started, 3), "tables": rows}
    print(json.dumps({"event": "result", "value": value}))


def rows_of(users: int, runs: list[tuple[Job, Job]], cores: int) -> list[Measurement]:
    """The measurements of one scale."""
    events = runs[0][0].result["events"]
    scale = f"users={users} events={events} cores={cores}"
    found = []
    for variant, jobs in (("extract", [one for one, _ in runs]), ("read_and_shuffle", [one for _, one in runs])):
        for metric, unit, values in (
            ("seconds", "s", [job.seconds for job in jobs]),
            ("wall_seconds", "s", [job.wall for job in jobs]),
            ("cpu_seconds", "s", [job.cpu for job in jobs]),
            ("peak_memory", "GiB", [job.peak_gib for job in jobs]),
        ):
            found.append(measure("scale", variant, values, scale=scale, metric=metric, unit=unit, packages=PACKAGES))
    ratios = [one.seconds / other.seconds for one, other in runs]
    cpu_ratios = [one.cpu / other.cpu for one, other in runs]
    per_million = [1e6 * one.seconds / float(str(events)) for one, _ in runs]
    for metric, unit, values in (
        ("ratio_to_read_and_shuffle", "1", ratios),
        ("cpu_ratio_to_read_and_shuffle", "1", cpu_ratios),
        ("seconds_per_million_events", "s", per_million),
    ):
        found.append(measure("scale", "extract", values, scale=scale, metric=metric, unit=unit, packages=PACKAGES))
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--data", type=Path, default=Path("build/scale"), help="where the raw tables are kept")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(load_config(arguments.bare), arguments.cores)
        return
    rows: list[Measurement] = []
    for users in arguments.users:
        config = data(arguments.data, users)
        runs = []
        for turn in range(arguments.repeats):
            runs.append((extract(config, arguments.cores), read_and_shuffle(config, arguments.cores)))
            one, other = runs[-1]
            print(f"{users:,} users, turn {turn + 1}: extract {one.seconds:.1f} s and {one.peak_gib:.2f} GiB, "
                  f"bare {other.seconds:.1f} s, ratio {one.seconds / other.seconds:.2f}, "
                  f"cpu {one.cpu:.0f} s and {other.cpu:.0f} s", flush=True)  # fmt: skip
        rows += rows_of(users, runs, arguments.cores)
    for row in rows:
        print(f"{row.variant} {row.metric}: {row.p50:.3g} {row.unit}, {row.scale}")
    if not arguments.no_csv:
        append_csv(RESULTS / "scale.csv", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()

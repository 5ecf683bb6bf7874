"""Is `instructue plan` right? Its prediction for many synthetic users, made from few, beside the run it predicts.

Writes a synthetic data set of each size and a model of two layers that reads 16 texts of each source, extracts the
small one, calibrates, predicts the large one, then runs `instructue backfill` on it. What the run computed is counted
over its whole process tree (JVM and Python workers), so that other work on the machine matters little.

    python benchmarks/plan_check.py --users 20000 --json plan_check.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import RESULTS, append_csv, measure, write_json

from instructue_feast.cli.plan import calibrate
from instructue_feast.config import load_config
from instructue_feast.model.factory import untrained
from instructue_feast.runs.plan import Calibration, Workload, plan

NAME = "plan_check"
PACKAGES = ("instructue-feast", "torch", "pyspark")
INSTRUCTUE = [sys.executable, "-c", "from instructue_feast.cli.main import run; run()"]


def main() -> None:
    """Predicts, runs, compares; appends to `results/plan_check.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--small", type=int, default=2_000, help="users the prediction is made from")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of the calibration")
    parser.add_argument("--folder", help="keep data, calibration and runs here, and use what is there")
    parser.add_argument("--prepare", action="store_true", help="write data and models into --folder, and stop")
    parser.add_argument(
        "--predict", action="store_true", help="extract the small one, calibrate into --folder, and stop"
    )
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        check(args, Path(args.folder or scratch))


def check(args: argparse.Namespace, folder: Path) -> None:
    """The whole comparison."""
    small, large = (project(folder / f"users-{number}", number, args.dtype) for number in (args.small, args.users))
    if args.prepare:
        return
    calibration = folder / "calibration.json"
    if not calibration.exists():
        as_of = ["--as-of", as_of_of(small)]
        run(["extract", "--config", str(small), "--extract-id", "small", "--cores", str(args.cores), *as_of])
        calibrate(load_config(small), seconds=args.seconds).save(calibration)
    if args.predict:
        return
    measured = Calibration.load(calibration)
    config = load_config(large)
    predicted = plan(
        measured,
        Workload(
            users=args.users, instructions=len(config.instructions), workers=args.cores, buckets=config.output.buckets
        ),
    )
    started = time.perf_counter()
    document, core_seconds = run(
        ["backfill", "--config", str(large), "--as-of", as_of_of(large), "--cores", str(args.cores), "--no-publish"]
    )
    seconds = time.perf_counter() - started
    made = document["run"]
    output = Path(config.output.path)
    pairs = {
        "tokens": (predicted.full.tokens, made["tokens"], "1"),
        "core_seconds": (predicted.full.core_seconds, core_seconds, "s"),
        "seconds": (predicted.full.seconds, seconds, "s"),
        "distinct_texts": (predicted.distinct_texts, made["distinct_texts"], "1"),
        "run_bytes": (predicted.storage_bytes["run"], size(output / "runs" / made["run_id"], "part.parquet"), "B"),
        "history_bytes": (
            predicted.storage_bytes["packed histories"],
            size(output / "extracts" / made["extract_id"] / "history", "*.parquet"),
            "B",
        ),
    }
    scale = f"users={args.users},from={args.small},instructions={len(config.instructions)},dtype={args.dtype}"
    rows = []
    print(f"{scale}; stages: " + ", ".join(f"{one['name']} {one['seconds']:.0f} s" for one in document["stages"]))
    for name, (guess, truth, unit) in pairs.items():
        print(f"  {name:<16} predicted {guess:>16,.0f}  measured {truth:>16,.0f}  ratio {guess / truth:.2f}")
        for variant, value in (("predicted", guess), ("measured", truth)):
            rows.append(measure(NAME, variant, [value], scale=scale, metric=name, unit=unit, packages=PACKAGES))
        ratio = [guess / truth]
        variant = "predicted / measured"
        rows.append(measure(NAME, variant, ratio, scale=scale, metric=name, unit="1", packages=PACKAGES))
    print("  wanted: ratios of tokens and core_seconds from 0.7 to 1.3; seconds too, where nothing else runs")
    if not args.no_csv:
        append_csv(RESULTS / f"{NAME}.csv", rows)
    write_json(args.json, rows, ratios={name: guess / truth for name, (guess, truth, _) in pairs.items()})


def project(folder: Path, users: int, dtype: str) -> Path:
    """A synthetic data set and a model of two layers, untrained, for it; returns the config."""
    file = folder / "instructue.yaml"
    if not (folder / "model").exists():
        made, _ = run(["data", "synthetic", "--users", str(users), "--out", str(folder)])
        (folder / "as_of").write_text(made["as_of"], encoding="utf-8")
        config = load_config(file)
        model = untrained(
            encoders={source: config.encoder_of(source) for source in config.source_names},
            numeric_columns=config.numeric_columns,
            llm_layers=2,
            prompt_texts=16,
        )
        model.save_pretrained(folder / "model")
        text = file.read_text(encoding="utf-8")
        text = text.replace("  embedding_dim: 128\n", f"  embedding_dim: 128\n  path: ./model\n  dtype: {dtype}\n", 1)
        file.write_text(text, encoding="utf-8")
    return file


def as_of_of(config: Path) -> str:
    """The `as_of` its data set was made for."""
    return (config.parent / "as_of").read_text(encoding="utf-8")


def run(arguments: list[str]) -> tuple[dict, float]:
    """Runs `instructue ... --json`; what it printed, and the seconds that all of its processes computed."""
    seen: dict[int, float] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stream:
        with subprocess.Popen([*INSTRUCTUE, *arguments, "--json"], stdout=stream) as process:
            root = psutil.Process(process.pid)
            while process.poll() is None:
                for one in [root, *root.children(recursive=True)]:
                    try:
                        times = one.cpu_times()
                        seen[one.pid] = times.user + times.system
                    except psutil.Error:  # it ended between the two calls
                        continue
                time.sleep(0.2)
        stream.seek(0)
        output = stream.read()
    if process.returncode:
        raise SystemExit(f"instructue {' '.join(arguments)} failed:\n{output}")
    return json.loads(output), sum(seen.values())


def size(folder: Path, pattern: str) -> int:
    """Bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob(pattern))


if __name__ == "__main__":
    main()

"""An incremental backfill beside a full one, over the same extract: 1% of the users changed, and nobody.

    python benchmarks/incremental.py --users 800 --json incremental.json

Synthetic users and the default models. The extraction is the same for both kinds of backfill and is reported on its
own; the second night's extract is the first one's with one event more for every hundredth user. What an incremental
backfill costs when nobody has changed is the fixed overhead: encoding nothing, the soft-token table, reading, writing.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, append_csv, measure, write_json

from instructue_feast.config import load_config
from instructue_feast.datasets.project import write_project
from instructue_feast.runs.manifest import parse_as_of
from instructue_feast.runs.overview import compare_runs
from instructue_feast.runs.store import OutputStore
from instructue_spark.backfill import Backfill, BackfillRequest
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from instructue_spark.session import get_session
from instructue_spark.synthetic import write_synthetic

PACKAGES = ("pyspark", "torch", "transformers")
AS_OF = "2025-06-01T00:00:00Z"


def second_night(store: OutputStore, first: str, second: str, every: int) -> int:
    """Copies an extract; every so-manieth user has seen the last text once more. Returns how many that are."""
    root = Path(store.path("extracts"))
    shutil.copytree(root / first, root / second)
    manifest = store.read_json("extracts", second, "manifest.json")
    store.write_json(manifest | {"extract_id": second}, "extracts", second, "manifest.json")
    changed = seen = 0
    for file in sorted((root / second / "history").rglob("*.parquet")):
        table = pq.ParquetFile(file).read()
        rows = table.to_pylist()
        for row in rows:
            seen += 1
            if seen % every == 0:
                if row["text_id"]:
                    row["count_bucket"][-1] = 1 + row["count_bucket"][-1] % 3
                row["num_events"][0] += 1
                changed += 1
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return changed


def timed(spark: object, config: object, extract: str, run: str, *, incremental: bool) -> dict[str, float]:
    """Seconds of a backfill after its extraction, as a whole and of its stages."""
    stream = io.StringIO()
    request = BackfillRequest(
        config=config, as_of=parse_as_of(AS_OF), extract_id=extract, run_id=run, incremental=incremental, publish=False
    )
    started = time.perf_counter()
    Backfill(spark, request, Reporter(stream=stream)).run()
    seconds = {"total": time.perf_counter() - started}
    for line in stream.getvalue().splitlines():
        event = json.loads(line)
        if event["event"] == "stage_done":
            seconds[event["name"]] = event["seconds"]
    return seconds


def main() -> None:
    """Runs both kinds of backfill and appends the figures to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=800)
    parser.add_argument("--every", type=int, default=100, help="one of so many users has changed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", help="write the results there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spark = get_session("incremental benchmark", cores=arguments.cores)
        write_synthetic(spark, folder, users=arguments.users, seed=1)
        write_project(folder, "synthetic")
        config = load_config(folder / "instructue.yaml")
        store = OutputStore(config.output.path)
        started = time.perf_counter()
        run_extract(spark, config, parse_as_of(AS_OF), extract_id="one", reporter=Reporter(stream=None))
        extraction = time.perf_counter() - started
        changed = second_night(store, "one", "two", arguments.every)
        base = BackfillRequest(config=config, as_of=parse_as_of(AS_OF), extract_id="one", run_id="base")
        Backfill(spark, base, Reporter(stream=None)).run()
        seconds: dict[str, list[dict[str, float]]] = {"full": [], "changed": [], "nobody": []}
        for turn in range(arguments.repeats):
            seconds["nobody"].append(timed(spark, config, "one", f"nobody-{turn}", incremental=True))
            seconds["changed"].append(timed(spark, config, "two", f"changed-{turn}", incremental=True))
            seconds["full"].append(timed(spark, config, "two", f"full-{turn}", incremental=False))
        found = compare_runs(store, "changed-0", "full-0")
        carried = store.read_json("runs", "changed-0", "manifest.json")["carried"]
    if found.only_first or found.only_second or carried != arguments.users - changed:
        raise SystemExit(f"not equal: {found}, {carried} carried")
    scale = f"users={arguments.users} changed={changed} instructions={len(config.instructions)}"
    rows = []

    def add(variant: str, metric: str, values: list[float], unit: str) -> None:
        rows.append(measure("incremental", variant, values, scale=scale, metric=metric, unit=unit, packages=PACKAGES))

    add("both", "extraction_seconds", [extraction], "s")
    for variant, name in (("full", "full"), ("one in a hundred changed", "changed"), ("nobody changed", "nobody")):
        add(variant, "seconds_after_extraction", [one["total"] for one in seconds[name]], "s")
        add(variant, "embed_seconds", [one["embed"] for one in seconds[name]], "s")
    turns = list(zip(seconds["changed"], seconds["nobody"], seconds["full"], strict=True))
    add(
        "one in a hundred changed",
        "cost_over_fixed",
        [(a["total"] - b["total"]) / c["total"] for a, b, c in turns],
        "of full",
    )
    add("one in a hundred changed", "cost_with_fixed", [a["total"] / c["total"] for a, _, c in turns], "of full")
    add("one in a hundred changed", "largest_difference", [max(one.largest for one in found.instructions)], "1")
    append_csv(RESULTS / "incremental.csv", rows)
    write_json(arguments.json, rows, seconds=seconds)
    for row in rows:
        print(f"{row.variant:26} {row.metric:26} {row.p50:10.4g} {row.unit}")


if __name__ == "__main__":
    main()

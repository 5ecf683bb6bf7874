"""An incremental backfill beside a full one, over the same extract: 1% of the users changed, and nobody.

    python benchmarks/incremental.py --users 3000 --json incremental.json

Synthetic users. The extraction is the same for both kinds of backfill and is reported on its own; the second night's
extract is the first one's with one event more for every hundredth user. What an incremental backfill costs when two
users have changed, who make both workers load the model, is the fixed overhead: models, soft-token table, reading and
writing.

By default the LLM and the text encoder are the default ones cut to a few narrow layers of random weights, so that one
per cent of the users are more than a handful in a run of a minute. `--default-models` takes the real ones: then a user
costs more, and the fixed overhead counts for less. `--in-process` leaves Spark out: made-up packed histories, buckets
one after the other in this process, in processor seconds, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import RESULTS, Measurement, append_csv, measure, write_json
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import instructue_spark.backfill as backfill
import instructue_spark.embed as embed
from instructue_feast import schema
from instructue_feast.config import InstructueConfig, ModelSettings, load_config
from instructue_feast.datasets.project import write_project
from instructue_feast.model.bundled import resolve
from instructue_feast.model.encoders import describe_encoder
from instructue_feast.runs.manifest import BucketMarker, ExtractManifest, parse_as_of, to_json
from instructue_feast.runs.overview import compare_runs
from instructue_feast.runs.store import OutputStore
from instructue_spark.backfill import Backfill, BackfillRequest
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from instructue_spark.session import get_session
from instructue_spark.synthetic import write_synthetic

PACKAGES = ("pyspark", "torch", "transformers")
AS_OF = "2025-06-01T00:00:00Z"


def cut_models(folder: Path) -> dict[str, str]:
    """Saves narrow, shallow, random models with the configs and tokenizers of the default ones."""
    settings = ModelSettings()
    llm, encoder = (Path(resolve(name)) for name in (settings.llm, settings.text_encoder))
    narrow = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(llm, **narrow, num_key_value_heads=3, head_dim=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llm")
        config = AutoConfig.from_pretrained(encoder, num_hidden_layers=1)
        AutoModel.from_config(config).save_pretrained(folder / "encoder")
    for source, name in ((llm, "llm"), (encoder, "encoder")):
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    return {"llm": str(folder / "llm"), "text_encoder": str(folder / "encoder")}


def second_night(store: OutputStore, first: str, second: str, chosen: Callable[[int], bool]) -> int:
    """Copies an extract; the chosen users, by number, have one event more. Returns how many they are."""
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
            if chosen(seen):
                if row["text_id"]:
                    row["count_bucket"][-1] = 1 + row["count_bucket"][-1] % 3
                row["num_events"][0] += 1
                changed += 1
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return changed


def made_up_extract(store: OutputStore, config: InstructueConfig, name: str, users: int) -> None:
    """Writes an extract without Spark: a few dozen random texts of the first source per user, and their vectors."""
    rng, texts, buckets = np.random.default_rng(0), 2000, config.output.buckets
    root, source = Path(store.path("extracts", name)), config.source_names[0]
    book = {"source": [source] * texts, "text_id": range(texts), "text": [f"text {one}" for one in range(texts)]}
    (root / "phrasebook").mkdir(parents=True)
    pq.write_table(pa.Table.from_pydict(book, schema=schema.PHRASEBOOK), root / "phrasebook" / "part-0.parquet")
    version = describe_encoder(config.encoder_of(source)).version
    vectors = rng.normal(size=(texts, describe_encoder(config.encoder_of(source)).dim)).astype(np.float32)
    folder = Path(store.path("event_vectors", version[:16], name))
    folder.mkdir(parents=True)
    table = pa.Table.from_pydict({"text_id": range(texts), "vector": list(vectors)}, schema=schema.EVENT_VECTORS)
    pq.write_table(table, folder / "part-0.parquet")
    (folder / "_SUCCESS").touch()
    tokens = 0
    for bucket in range(buckets):
        rows = []
        for user in range(bucket, users, buckets):
            size = int(rng.integers(10, 60))
            tokens += size
            rows.append(
                {
                    "user_id": f"u{user:06d}", "as_of": parse_as_of(AS_OF), "source_index": [0] * size,
                    "text_id": rng.choice(texts, size, replace=False), "count_bucket": rng.integers(0, 5, size),
                    "age_bucket": rng.integers(0, 9, size),
                    "num_events": [size] + [0] * (len(config.source_names) - 1),
                    "tabular_numeric": rng.normal(size=len(config.numeric_columns)),
                }
            )  # fmt: skip
        (root / "history" / f"bucket={bucket}").mkdir(parents=True)
        table = pa.Table.from_pylist(rows, schema=schema.PACKED_HISTORY)
        pq.write_table(table, root / "history" / f"bucket={bucket}" / "part-0.parquet")
    manifest = ExtractManifest(
        extract_id=name, as_of=parse_as_of(AS_OF).isoformat(), created=AS_OF, history_digest=config.history_digest(),
        sources=list(config.source_names), buckets=buckets, users=users, events=tokens, distinct_texts=texts,
        tokens=tokens, counts={}, seconds=0.0,
    )  # fmt: skip
    store.write_json(to_json(manifest), "extracts", name, "manifest.json")


def without_spark() -> None:
    """Makes backfills of this process embed their buckets here, one after the other; their texts are encoded."""

    def embed_here(
        _spark: object, plan: embed.RunPlan, _store: object, _extract: object, buckets: list[int], *_: object
    ) -> tuple[list[BucketMarker], int]:
        return [embed._embed_bucket(plan, bucket) for bucket in buckets], 0

    backfill.embed_users = embed_here
    backfill.encode_new_texts = lambda *_: 0
    backfill.Backfill.spark = None


def timed(spark: object, config: object, extract: str, run: str, *, incremental: bool) -> dict[str, float]:
    """Seconds of a backfill after its extraction, as a whole and of its stages."""
    stream = io.StringIO()
    request = BackfillRequest(
        config=config, as_of=parse_as_of(AS_OF), extract_id=extract, run_id=run, incremental=incremental, publish=False
    )
    clock = time.process_time if spark is None else time.perf_counter
    embed._worker_embedder.cache_clear()
    embed._loaded.key = None  # here every backfill loads its model; a Spark worker keeps that of the base run
    started = clock()
    Backfill(spark, request, Reporter(stream=stream)).run()
    seconds = {"total": clock() - started}
    for line in stream.getvalue().splitlines():
        event = json.loads(line)
        if event["event"] == "stage_done":
            seconds[event["name"]] = event["seconds"]
    return seconds


def main() -> None:
    """Runs both kinds of backfill and appends the figures to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100, help="one of so many users has changed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--in-process", action="store_true", help="without Spark, in processor seconds")
    parser.add_argument("--default-models", action="store_true", help="the real ones, slower")
    parser.add_argument("--json", help="write the results there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_project(folder, "synthetic")
        config = load_config(folder / "instructue.yaml")
        if not arguments.default_models:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, **cut_models(folder)))
        store = OutputStore(config.output.path)
        spark, extraction = None, []
        if arguments.in_process:
            torch.set_num_threads(1)
            made_up_extract(store, config, "one", arguments.users)
            without_spark()
        else:
            spark = get_session("incremental benchmark", cores=arguments.cores)
            write_synthetic(spark, folder, users=arguments.users, seed=1)
            started = time.perf_counter()
            run_extract(spark, config, parse_as_of(AS_OF), extract_id="one", reporter=Reporter(stream=None))
            extraction = [time.perf_counter() - started]
        last = arguments.users
        changed = second_night(store, "one", "two", lambda number: number % arguments.every == 0)
        second_night(store, "one", "few", lambda number: number in (1, last))
        base = BackfillRequest(config=config, as_of=parse_as_of(AS_OF), extract_id="one", run_id="base", accept="bench")
        Backfill(spark, base, Reporter(stream=None)).run()
        seconds: dict[str, list[dict[str, float]]] = {"full": [], "changed": [], "few": []}
        for turn in range(arguments.repeats):
            seconds["few"].append(timed(spark, config, "few", f"few-{turn}", incremental=True))
            seconds["changed"].append(timed(spark, config, "two", f"changed-{turn}", incremental=True))
            seconds["full"].append(timed(spark, config, "two", f"full-{turn}", incremental=False))
        found = compare_runs(store, "changed-0", "full-0")
        carried = store.read_json("runs", "changed-0", "manifest.json")["carried"]
    if found.only_first or found.only_second or carried != arguments.users - changed:
        raise SystemExit(f"not equal: {found}, {carried} carried")
    llm = "default" if arguments.default_models else "llama-6x192"
    how = "in-process" if arguments.in_process else f"local[{arguments.cores}]"
    scale = f"users={arguments.users} changed={changed} instructions={len(config.instructions)} llm={llm} {how}"
    clock = "processor_seconds" if arguments.in_process else "seconds"
    one = f"one in {arguments.every} changed"

    def row(variant: str, metric: str, values: list[float], unit: str) -> Measurement:
        return measure("incremental", variant, values, scale=scale, metric=metric, unit=unit, packages=PACKAGES)

    turns = list(zip(seconds["changed"], seconds["few"], seconds["full"], strict=True))
    rows = [row("both", "extraction_seconds", extraction, "s")] if extraction else []
    for variant, name in (("full", "full"), (one, "changed"), ("two users changed", "few")):
        rows.append(row(variant, f"{clock}_after_extraction", [each["total"] for each in seconds[name]], "s"))
        if not arguments.in_process:
            rows.append(row(variant, "embed_seconds", [each["embed"] for each in seconds[name]], "s"))
    rows += [
        row(one, "cost_over_fixed", [(a["total"] - b["total"]) / c["total"] for a, b, c in turns], "of full"),
        row(one, "cost_with_fixed", [a["total"] / c["total"] for a, _, c in turns], "of full"),
        row(one, "largest_difference", [max(each.largest for each in found.instructions)], "1"),
    ]
    append_csv(RESULTS / "incremental.csv", rows)
    write_json(arguments.json, rows, seconds=seconds)
    for one_row in rows:
        print(f"{one_row.variant:26} {one_row.metric:26} {one_row.p50:10.4g} {one_row.unit}")


if __name__ == "__main__":
    main()

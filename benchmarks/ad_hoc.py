"""What an instruction nobody planned for costs online: `UserEmbeddings.embed`, from the SQLite store to the vector.

    python benchmarks/ad_hoc.py --threads 2

One user and eight, an instruction seen before and a new one, beside the forward pass alone; with the tokens of a
prompt. Random histories and weights: neither changes what a pass costs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import RESULTS, Measurement, append_csv, interleaved, measure, write_json
from instructions_one_pass import INSTRUCTIONS, prepare
from lookup import make_repo

from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.instructions import Instruction
from instructue_feast.runs.audit import combine_digests
from instructue_feast.runs.manifest import ExtractManifest, RunInstruction, RunManifest, to_json
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run, write_bucket
from instructue_feast.schema import PACKED_HISTORY, embeddings_schema

PACKAGES = ("torch", "transformers", "feast", "instructue-feast")
AS_OF = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)


def write_run(store: OutputStore, embedder: object, history: object, vectors: np.ndarray) -> None:
    """A run of one instruction with its extract, model and soft tokens."""
    lists = {
        name: [getattr(history, name)[a:b] for a, b in itertools.pairwise(history.offsets.tolist())]
        for name in ("source_index", "text_id", "count_bucket", "age_bucket")
    }
    lists |= {name: list(getattr(history, name)) for name in ("num_events", "tabular_numeric")}
    table = pa.table(
        {"user_id": history.user_ids, "as_of": pa.array([AS_OF] * len(history), PACKED_HISTORY.field("as_of").type)}
        | lists,
        schema=PACKED_HISTORY,
    )
    folder = store.path("extracts", "night-1", "history", "bucket=0")
    store.fs.makedirs(folder)
    pq.write_table(table, f"{folder}/part-0.parquet")
    extract = ExtractManifest(
        extract_id="night-1", as_of=AS_OF.isoformat(), created=AS_OF.isoformat(), history_digest="none", sources=[],
        buckets=1, users=len(history), events=0, distinct_texts=0, tokens=0, counts={}, seconds=0.1,
    )  # fmt: skip
    store.write_json(to_json(extract), "extracts", "night-1", "manifest.json")
    embedder.model.save_pretrained(store.path("runs", "night-1", "model"))
    embedder.table.save(store.path("runs", "night-1", "soft_tokens.safetensors"))
    schema = embeddings_schema(["churn"])
    times = [AS_OF] * len(history)
    columns = [history.user_ids, times, times, list(vectors)]
    arrays = [pa.array(one, kind) for one, kind in zip(columns, schema.types, strict=True)]
    marker = write_bucket(store, "night-1", 0, pa.table(arrays, schema=schema), tokens=1, seconds=0.1)
    instruction = Instruction("churn", "What about churn?")
    used = RunInstruction(
        id="churn", text=instruction.text, content_hash=instruction.content_hash, embedding_version="ab" * 32
    )
    finish_run(
        store,
        RunManifest(
            run_id="night-1", project="bench", as_of=AS_OF.isoformat(), created=AS_OF.isoformat(),
            extract_id="night-1", history_digest="none", model_version="cd" * 32, trained=False,
            embedding_dim=vectors.shape[1], instructions=[used], buckets=[marker], users=len(history), tokens=1,
            texts_encoded=1, distinct_texts=1, digest=combine_digests([marker.digest]), seconds=0.1,
        ),
    )  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--llm", default="smollm2-135m-instruct")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--no-csv", action="store_true", help="do not append to the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    embedder, history = prepare(args)
    with tempfile.TemporaryDirectory() as scratch:
        repo = Path(scratch) / "repo"
        store = make_repo(repo, "sqlite", None, ours=True)
        batch = embedder.encode(history, INSTRUCTIONS[:1])
        write_run(store, embedder, history, batch[:, 0])
        publish(store, "night-1")
        apply_repo(repo)
        materialize(repo)
        embeddings = UserEmbeddings(repo)
        users, text = history.user_ids, INSTRUCTIONS[0].text
        first = embeddings.embed(users, text)  # loads the model
        lowest = float((first.vectors * batch[:, 0]).sum(axis=1).min())
        number = itertools.count()
        seconds = interleaved(
            {
                "1 user, known instruction": lambda: embeddings.embed(users[:1], text),
                "1 user, new instruction": lambda: embeddings.embed(users[:1], f"{text} {next(number)}"),
                "1 user, forward pass alone": lambda: embedder.encode(history.take([0]), INSTRUCTIONS[:1]),
                f"{len(users)} users, known instruction": lambda: embeddings.embed(users, text),
            },
            args.repeats,
        )
        tokens = embeddings.embed(users[:1], text).tokens
    scale = f"tokens={tokens} dtype={args.dtype} threads={args.threads}"
    rows: list[Measurement] = [
        measure("ad_hoc", name, values, scale=scale, metric="latency", unit="s", packages=PACKAGES)
        for name, values in seconds.items()
    ]
    print(f"lowest cosine with the batch: {lowest:.8f}; {tokens} prompt tokens for one user, {args.threads} threads")
    for row in rows:
        print(f"{row.variant:<32} {row.p50:.3f} s (p20 {row.p20:.3f}, p80 {row.p80:.3f})")
    if not args.no_csv:
        append_csv(RESULTS / "ad_hoc.csv", rows)
    write_json(args.json, rows, lowest_cosine=lowest)


if __name__ == "__main__":
    main()

"""A run made by a real, tiny model, with its extract, for tests of what is embedded online."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.runs.audit import combine_digests
from instructue_feast.runs.manifest import ExtractManifest, RunInstruction, RunManifest, to_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run, finished_buckets, write_bucket
from instructue_feast.schema import embeddings_schema
from tests.model_data import history_table

AS_OF = datetime(2017, 10, 1, tzinfo=UTC)


def write_real_run(
    store: OutputStore,
    embedder: UserEmbedder,
    history: PackedHistory,
    instructions: Sequence[Instruction],
    *,
    run_id: str = "night-1",
    as_of: datetime = AS_OF,
    model_version: str = "ab" * 32,
) -> np.ndarray:
    """Writes extract and run in two buckets; returns the embeddings `[U, K, D]`."""
    vectors = embedder.encode(history, instructions)
    table = history_table(history)
    moments = pa.array([as_of] * len(history), table.schema.field("as_of").type)
    table = table.set_column(1, table.schema.field("as_of"), moments)
    embedder.model.save_pretrained(store.path("runs", run_id, "model"))
    embedder.table.save(store.path("runs", run_id, "soft_tokens.safetensors"))
    schema = embeddings_schema([one.id for one in instructions])
    for bucket in range(2):
        rows = list(range(bucket, len(history), 2))
        folder = store.path("extracts", run_id, "history", f"bucket={bucket}")
        store.fs.makedirs(folder)
        pq.write_table(table.take(rows), f"{folder}/part-0.parquet")
        columns = [[history.user_ids[row] for row in rows], [as_of] * len(rows), [as_of] * len(rows)]
        columns += [list(vectors[rows, number]) for number in range(len(instructions))]
        write_bucket(
            store,
            run_id,
            bucket,
            pa.table([pa.array(one, kind) for one, kind in zip(columns, schema.types, strict=True)], schema=schema),
            tokens=1,
            seconds=0.1,
            dim=vectors.shape[2],
        )
    common = {"as_of": as_of.isoformat(), "created": as_of.isoformat(), "extract_id": run_id}
    extract = ExtractManifest(
        **common, history_digest="history", sources=[], buckets=2, users=len(history), events=0, distinct_texts=0,
        tokens=0, counts={}, seconds=0.1,
    )  # fmt: skip
    store.write_json(to_json(extract), "extracts", run_id, "manifest.json")
    markers = finished_buckets(store, run_id)
    used = [
        RunInstruction(
            id=one.id,
            text=one.text,
            content_hash=one.content_hash,
            embedding_version=hashlib.sha256(f"{model_version} {one.content_hash}".encode()).hexdigest(),
        )
        for one in instructions
    ]
    finish_run(
        store,
        RunManifest(
            **common, run_id=run_id, project="tests", history_digest="history", model_version=model_version,
            trained=False, embedding_dim=vectors.shape[2], instructions=used, buckets=markers, users=len(history),
            tokens=1, texts_encoded=1, distinct_texts=1, digest=combine_digests([one.digest for one in markers]),
            seconds=0.1,
        ),
    )  # fmt: skip
    return vectors

"""Writes small, valid runs through the real writer: random unit vectors instead of a model's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from instructue_feast.instructions import Instruction
from instructue_feast.runs.audit import combine_digests
from instructue_feast.runs.manifest import RunInstruction, RunManifest, new_id, parse_as_of
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run, finished_buckets, write_bucket
from instructue_feast.schema import embeddings_schema

INSTRUCTIONS = ("churn", "next_basket", "taste")
CONFIG = """\
project: tests
sources:
  app:
    table: {path: raw/app.parquet}
    user_id: user
    time: time
    text: "{page}"
instructions:
%s
model: {embedding_dim: 8}
output: {path: %s}
feast: {ttl_days: %d}
"""


def user_names(count: int, first: int = 0) -> list[str]:
    """Ids of made-up users."""
    return [f"user-{number:04d}" for number in range(first, first + count)]


def unit_vectors(seed: int, users: Sequence[str], instruction: str, dim: int = 8) -> np.ndarray:
    """`[U, D]` float32 unit vectors, a function of seed, user and instruction alone."""
    if not users:
        return np.empty((0, dim), dtype=np.float32)
    rows = []
    for user in users:
        digest = hashlib.sha256(f"{seed}/{instruction}/{user}".encode()).digest()
        rows.append(np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=dim))
    vectors = np.asarray(rows)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def bucket_table(
    users: Sequence[str],
    as_of: datetime,
    *,
    seed: int = 0,
    instructions: Sequence[str] = INSTRUCTIONS,
    dim: int = 8,
    created: datetime | None = None,
) -> pa.Table:
    """A bucket's table."""
    columns = [list(users), [as_of] * len(users), [created or as_of] * len(users)]
    columns += [list(unit_vectors(seed, users, name, dim)) for name in instructions]
    schema = embeddings_schema(list(instructions))
    return pa.table([pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)], schema=schema)


def fake_manifest(store: OutputStore, run_id: str, as_of: str, **changes: object) -> RunManifest:
    """A manifest for the buckets that are on disk, with any field changed."""
    markers = finished_buckets(store, run_id)
    values: dict[str, object] = {
        "run_id": run_id, "project": "tests", "as_of": parse_as_of(as_of).isoformat(),
        "created": datetime.now(UTC).isoformat(), "extract_id": "extract", "history_digest": "history",
        "model_version": "model", "trained": False, "embedding_dim": 8, "instructions": [], "buckets": markers,
        "users": sum(marker.rows for marker in markers), "tokens": 100, "texts_encoded": 3, "distinct_texts": 3,
        "digest": combine_digests(marker.digest for marker in markers), "seconds": 0.1,
    }  # fmt: skip
    return RunManifest(**{**values, **changes})  # type: ignore[arg-type]


def write_fake_run(
    store: OutputStore,
    as_of: str = "2017-10-01T00:00:00Z",
    *,
    users: Sequence[str] | int = 12,
    instructions: Sequence[str] = INSTRUCTIONS,
    versions: dict[str, str] | None = None,
    seed: int = 0,
    dim: int = 8,
    buckets: int = 3,
    created: datetime | None = None,
    finish: bool = True,
    model_version: str = "model",
) -> str:
    """Writes a run and returns its id.

    `versions` gives some instructions another embedding version than the default `v1`; `seed` other vectors.
    """
    when = parse_as_of(as_of)
    names = user_names(users) if isinstance(users, int) else list(users)
    run_id = new_id(when, repr((names[:1], len(names), list(instructions), versions, seed, dim, model_version)))
    for bucket in range(buckets):
        table = bucket_table(
            names[bucket::buckets], when, seed=seed, instructions=instructions, dim=dim, created=created
        )
        write_bucket(store, run_id, bucket, table, tokens=10, seconds=0.01, dim=dim)
    if finish:
        used = [
            RunInstruction(
                id=name,
                text=f"What about {name}?",
                content_hash=Instruction(name, f"What about {name}?").content_hash,
                embedding_version=hashlib.sha256(f"{name}/{(versions or {}).get(name, 'v1')}".encode()).hexdigest(),
            )
            for name in instructions
        ]
        finish_run(
            store,
            fake_manifest(store, run_id, as_of, instructions=used, embedding_dim=dim, model_version=model_version),
        )
    return run_id


REPO_FILES = ("feature_store.yaml", "definitions.py", ".feastignore", "instructue.yaml")


def write_feast_repo(
    folder: Path, *, instructions: Sequence[str] = INSTRUCTIONS, ttl_days: int = 0, files: Sequence[str] = REPO_FILES
) -> OutputStore:
    """Makes a Feast repo of the project's own files and a small `instructue.yaml`; returns its output store."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = "\n".join(f'  - {{id: {name}, text: "What about {name}?"}}' for name in instructions)
    for name in files:
        source = Path(__file__).parents[1] / "feature_repo" / name
        text = CONFIG % (listed, "data/output", ttl_days) if name == "instructue.yaml" else source.read_text()
        (folder / name).write_text(text)
    return OutputStore(str(folder / "data" / "output"))


def use_stock(repo: Path) -> None:
    """Makes a repo use Feast's own batch engine and online store on the same data."""
    file = repo / "feature_store.yaml"
    text = file.read_text()
    for ours, stock in (
        ("type: instructue_feast.feature_store.engine.EmbeddingEngine", "type: local"),
        ("type: instructue_feast.feature_store.sqlite.InstructueSqliteOnlineStore", "type: sqlite"),
        ("type: instructue_feast.feature_store.redis.InstructueRedisOnlineStore", "type: redis"),
    ):
        text = text.replace(ours, stock)
    file.write_text(text)


def use_redis(repo: Path, address: str, project: str) -> None:
    """Points a repo at Redis; each test has its own Feast project there."""
    file = repo / "feature_store.yaml"
    text = file.read_text()
    sqlite = "sqlite.InstructueSqliteOnlineStore\n  path: data/online.db"
    assert sqlite in text
    text = text.replace(sqlite, f"redis.InstructueRedisOnlineStore\n  connection_string: {address}")
    file.write_text(text.replace("project: instructue", f"project: {project}"))

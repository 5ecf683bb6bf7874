"""Encode new texts once, then embed one bucket of users after the other into a run.

Both stages run model code in `mapInArrow`, with the model loaded once per Python worker. A bucket is written by the
worker that made it: the Parquet file first, the marker last, so a finished bucket is known by its marker alone.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from instructue_feast import schema
from instructue_feast.config import InstructueConfig
from instructue_feast.errors import DataError, RunConflictError, VersionMismatchError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.instructions import Instruction
from instructue_feast.runs.manifest import BucketMarker, ExtractManifest
from instructue_feast.runs.ownership import still_owned
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import bucket_folder, finished_buckets, write_bucket
from instructue_feast.soft_prompt_file import SoftPrompt
from instructue_spark.carry import BaseRun, carry_over, read_history
from instructue_spark.device import task_device
from instructue_spark.io import emit, spark_errors, spark_schema
from instructue_spark.report import Reporter

if TYPE_CHECKING:
    from instructue_feast.inference.embedder import UserEmbedder
    from instructue_feast.model.encoders import TextEncoder
    from instructue_feast.model.modeling import InstructUEModel

TEXTS_PER_TASK = 512
TEXTS_PER_SLICE = 131_072
"""Texts encoded before their vectors count; a resumed run encodes at most so many again."""
_MARKER_ROW = pa.schema(
    [
        pa.field("bucket", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("carried", pa.int64(), nullable=False),
        pa.field("empty", pa.int64(), nullable=False),
        pa.field("loads", pa.int64(), nullable=False),
    ]
)


# ---------------------------------------------------------------------------------------------------------- encoding


@lru_cache(maxsize=4)
def _worker_encoder(name: str, version: str, device: str) -> TextEncoder:
    """Loads an encoder once per Python worker and device and checks that it is the driver's.

    Raises:
        VersionMismatchError: The files of this host are not those of the driver.
    """
    from instructue_feast.model.encoders import TextEncoder

    _limit_threads()
    encoder = TextEncoder.load(name, device=device)
    if encoder.version != version:
        raise VersionMismatchError(
            f"text encoder {name} is {encoder.version[:12]} on a worker and {version[:12]} on the driver",
            "ship the same model files to every host",
        )
    return encoder


def _encode_texts(name: str, version: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        encoder = _worker_encoder(name, version, task_device())
        for batch in batches:
            if batch.num_rows:
                vectors = encoder.encode(batch.column("text").to_pylist())
                offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
                lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.ravel(), pa.float32()))
                yield from emit(pa.table({"text_id": batch.column("text_id"), "vector": lists}), schema.EVENT_VECTORS)

    return run


def encode_new_texts(
    spark: SparkSession,
    config: InstructueConfig,
    store: OutputStore,
    extract: ExtractManifest,
    reporter: Reporter,
    run_id: str,
) -> int:
    """Encodes the texts of an extract that were never encoded before, each exactly once.

    Args:
        spark: The session.
        config: The project.
        store: Where event vectors live, by encoder version.
        extract: The extract whose phrasebook is encoded.
        reporter: Gets the stage `encode`.
        run_id: The run they are encoded for; two runs of one extract write to folders of their own.

    Returns:
        How many texts were encoded.

    Raises:
        DataError: The encoder returned another number of vectors than it was given texts.
    """
    from instructue_feast.model.encoders import describe_encoder

    with reporter.stage("encode") as stage:
        stage.rows_in = extract.distinct_texts
        phrasebook = spark.read.parquet(store.url("extracts", extract.extract_id, "phrasebook"))
        groups: dict[str, tuple[str, list[str]]] = {}  # by version, because two names can be one encoder
        for source in config.source_names:
            name = config.encoder_of(source)
            groups.setdefault(describe_encoder(name).version, (name, []))[1].append(source)
        for version, (encoder_name, sources) in groups.items():
            texts = phrasebook.where(F.col("source").isin(sources)).select("text_id", "text")
            known = _complete_vector_folders(store, version)
            if known:
                urls = [store.url(*folder) for folder in known]
                texts = texts.join(spark.read.parquet(*urls).select("text_id"), "text_id", "left_anti")
            stage.rows_out += _encode_missing(spark, store, texts, encoder_name, version, run_id, reporter)
    return stage.rows_out


def _encode_missing(
    spark: SparkSession,
    store: OutputStore,
    texts: DataFrame,
    encoder_name: str,
    version: str,
    run_id: str,
    reporter: Reporter,
) -> int:
    texts = texts.persist()
    try:
        with spark_errors():
            missing = texts.count()
        slices = -(-missing // TEXTS_PER_SLICE)
        for index in range(slices):
            part = texts if slices == 1 else texts.where(F.pmod("text_id", F.lit(slices)) == index)
            name = run_id if slices == 1 else f"{run_id}-{index:05d}-of-{slices:05d}"
            _encode_slice(spark, store, part, encoder_name, version, name, missing // slices, reporter)
        return missing
    finally:
        texts.unpersist()


def _encode_slice(
    spark: SparkSession,
    store: OutputStore,
    texts: DataFrame,
    encoder_name: str,
    version: str,
    name: str,
    about: int,
    reporter: Reporter,
) -> None:
    """Encodes a part of the texts into a folder of its own, which counts when it is complete."""
    folder = _new_vector_folder(store, version, name)
    tasks = max(1, -(-about // TEXTS_PER_TASK))
    vectors = texts.repartition(tasks, "text_id").mapInArrow(
        _encode_texts(encoder_name, version), spark_schema(schema.EVENT_VECTORS)
    )
    with _TaskProgress(spark, "encode", about, reporter), spark_errors():
        expected = texts.count()
        vectors.write.mode("overwrite").parquet(store.url(*folder))
    written = int(ds.dataset(store.path(*folder), filesystem=store.fs).count_rows()) if expected else 0
    if written != expected:
        store.remove(*folder)
        raise DataError(f"{written} vectors were made of {expected} texts", "run the backfill again")


def _new_vector_folder(store: OutputStore, version: str, name: str) -> tuple[str, ...]:
    """A folder for new vectors: never one that is complete, as a slice of an earlier attempt may be."""
    folder, number = ("event_vectors", version[:16], name), 1
    while store.exists(*folder, "_SUCCESS"):
        number += 1
        folder = (*folder[:-1], f"{name}.{number}")
    return folder


def _complete_vector_folders(store: OutputStore, version: str) -> list[tuple[str, ...]]:
    """Folders of event vectors whose write finished; Spark puts `_SUCCESS` there last."""
    base = ("event_vectors", version[:16])
    return [(*base, name) for name in store.names(*base) if store.exists(*base, name, "_SUCCESS")]


# --------------------------------------------------------------------------------------------------------- embedding


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a worker must know to embed a bucket. Small, picklable, and the key of the worker's cache.

    `owner` is the token of the process that owns the run; `base` is the run whose unchanged users are carried over.
    """

    root: str
    run_id: str
    extract_id: str
    created_us: int
    num_sources: int
    num_numeric: int
    instructions: tuple[Instruction, ...]
    embedding_dim: int
    dtype: str
    max_batch_tokens: int | None
    model_version: str
    owner: str
    base: BaseRun | None = None


def build_soft_tokens(
    config: InstructueConfig,
    store: OutputStore,
    model: InstructUEModel,
    extract: ExtractManifest,
    run_id: str,
    soft_prompts: Mapping[str, SoftPrompt] | None = None,
) -> int:
    """Turns the event vectors of an extract into the run's soft-token table; saves model, table and prompts in the run.

    Args:
        config: The project.
        store: Where the run lives.
        model: The model.
        extract: The extract.
        run_id: The run.
        soft_prompts: Tuned soft prompts of its instructions, by content hash.

    Returns:
        Rows of the table.

    Raises:
        DataError: A text of the phrasebook has no event vector.
    """
    from instructue_feast.inference.soft_prompts import save_run_soft_prompts
    from instructue_feast.inference.soft_tokens import SoftTokenTable
    from instructue_feast.model.encoders import describe_encoder

    phrasebook = ds.dataset(store.path("extracts", extract.extract_id, "phrasebook"), filesystem=store.fs)
    schema.check(phrasebook.schema.empty_table(), schema.PHRASEBOOK, f"phrasebook of extract {extract.extract_id}")
    phrases = phrasebook.to_table(columns=["source", "text_id"])
    text_ids, source_index, vectors = [], [], {}
    for index, name in enumerate(config.source_names):
        wanted = phrases.filter(pc.field("source") == name).column("text_id").combine_chunks()
        version = describe_encoder(config.encoder_of(name)).version
        text_ids.append(wanted.to_numpy())
        source_index.append(np.full(len(wanted), index, dtype=np.int32))
        vectors[name] = _aligned_vectors(store, version, wanted)
    table = SoftTokenTable.build(model, np.concatenate(text_ids), np.concatenate(source_index), vectors)
    with tempfile.TemporaryDirectory() as scratch:
        table.save(Path(scratch) / "soft_tokens.safetensors")
        model.save_pretrained(Path(scratch) / "model")
        save_run_soft_prompts(soft_prompts or {}, Path(scratch))
        store.fs.put(f"{scratch}/", store.path("runs", run_id) + "/", recursive=True)
    return len(phrases)


def _aligned_vectors(store: OutputStore, version: str, wanted: pa.Array) -> np.ndarray:
    """Reads `[N, dim]` event vectors in the order of `wanted`."""
    if not len(wanted):
        return np.empty((0, 0), dtype=np.float32)
    files = [file for folder in _complete_vector_folders(store, version) for file in store.files(*folder)]
    found = ds.dataset(files, filesystem=store.fs).to_table(filter=pc.field("text_id").isin(wanted))
    position = pc.index_in(wanted, value_set=found.column("text_id").combine_chunks())
    if position.null_count:
        raise DataError(f"{position.null_count} texts have no event vector", "run the backfill again")
    matrix = found.column("vector").combine_chunks().flatten().to_numpy().reshape(len(found), -1)
    return np.ascontiguousarray(matrix[position.to_numpy()], dtype=np.float32)


@dataclass(slots=True)
class _Loaded:
    """The model a Python worker has loaded last; the runs of a series share it. `loads` counts."""

    key: tuple[str, str, str] | None = None
    model: InstructUEModel | None = None
    loads: int = 0


_loaded = _Loaded()


def _model_loads() -> int:
    """How often this process has loaded a model; a function, as what Spark ships to a worker holds copies of values."""
    return _loaded.loads


@lru_cache(maxsize=1)
def _worker_embedder(plan: RunPlan, device: str) -> UserEmbedder:
    """Opens the soft-token table of a run, and loads its model, once per Python worker and device."""
    from instructue_feast.inference.from_run import open_embedder, open_model

    _limit_threads()
    store, key = OutputStore(plan.root), (plan.model_version, plan.dtype, device)
    if _loaded.key != key:
        _loaded.key = _loaded.model = None
        _worker_embedder.cache_clear()  # frees the other one first
        _loaded.model = open_model(store, plan.run_id, dtype=plan.dtype).to(device)
        _loaded.key, _loaded.loads = key, _loaded.loads + 1
    return open_embedder(
        store, plan.run_id, dtype=plan.dtype, max_batch_tokens=plan.max_batch_tokens, model=_loaded.model
    )


def _embed_buckets(
    plan: RunPlan, buckets: tuple[int, ...]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for position in batch.column("id").to_pylist():
                before = _model_loads()
                marker = dataclasses.asdict(_embed_bucket(plan, buckets[int(position)]))
                marker["loads"] = _model_loads() - before
                yield from emit(pa.Table.from_pylist([marker]), _MARKER_ROW)

    return run


def _embed_bucket(plan: RunPlan, bucket: int) -> BucketMarker:
    """Embeds the users of one bucket, except those it can carry over, and writes all of them into the run."""
    started = time.monotonic()
    store = OutputStore(plan.root)
    names = [one.id for one in plan.instructions]
    tokens = 0

    def count(_users: int, batch_tokens: int) -> None:
        nonlocal tokens
        tokens += batch_tokens

    table = read_history(store, plan.extract_id, bucket)
    history = PackedHistory.from_arrow(
        table, num_sources=plan.num_sources, num_numeric=plan.num_numeric, where=f"history of bucket {bucket}"
    )
    vectors = np.empty((len(history), len(names), plan.embedding_dim), dtype=np.float32)
    carried = np.zeros(len(history), dtype=np.bool_)
    if plan.base is not None:
        carried = carry_over(store, plan.base, bucket, table, names, vectors)
    changed = np.flatnonzero(~carried)
    if len(changed):
        rows = history if len(changed) == len(history) else history.take(changed)
        vectors[changed] = _worker_embedder(plan, task_device()).encode(rows, plan.instructions, on_batch=count)
    offsets = pa.array(np.arange(0, len(history) * plan.embedding_dim + 1, plan.embedding_dim, dtype=np.int32))
    columns: list[pa.Array] = []
    for position in range(len(names)):
        flat = np.ascontiguousarray(vectors[:, position]).ravel()
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(flat, pa.float32())))
    created = np.full(len(history), plan.created_us, dtype=np.int64)
    run = pa.Table.from_arrays(
        [
            pa.array(history.user_ids, pa.string()),
            pa.array(history.as_of_us, pa.int64()).cast(schema.TIMESTAMP),
            pa.array(created, pa.int64()).cast(schema.TIMESTAMP),
            *columns,
        ],
        schema=schema.embeddings_schema(names),
    )
    if not still_owned(store, plan.owner, "runs", plan.run_id):
        raise RunConflictError(
            f"run {plan.run_id} was given up or taken over", "its backfill failed, or another process resumed it"
        )
    return write_bucket(
        store, plan.run_id, bucket, run, tokens=tokens, seconds=time.monotonic() - started, dim=plan.embedding_dim,
        carried=int(carried.sum()), empty=int((history.num_events.sum(axis=1) == 0).sum()),
    )  # fmt: skip


def embed_users(
    spark: SparkSession,
    plan: RunPlan,
    store: OutputStore,
    extract: ExtractManifest,
    buckets: Sequence[int],
    reporter: Reporter,
) -> tuple[list[BucketMarker], int]:
    """Embeds the users of some buckets: one Spark task per bucket, K instructions in one forward pass per batch.

    Args:
        spark: The session.
        plan: What the workers need.
        store: Where the run lives.
        extract: The extract.
        buckets: The buckets that are missing.
        reporter: Gets the stage `embed` and its progress in users.

    Returns:
        The marker of each of those buckets, in order, and how often a worker loaded the model.

    Raises:
        InvalidEmbeddingError: A vector is NaN, infinite or not of unit length.
    """
    with reporter.stage("embed") as stage:
        stage.rows_in = extract.users
        if not buckets:
            return [], 0
        positions = spark.range(0, len(buckets), 1, numPartitions=len(buckets))
        rows = positions.mapInArrow(_embed_buckets(plan, tuple(buckets)), spark_schema(_MARKER_ROW))
        with _MarkerProgress(store, plan.run_id, extract.users, reporter), spark_errors():
            found = rows.collect()
        rows_by_bucket = sorted((row.asDict() for row in found), key=lambda row: int(row["bucket"]))
        loads = sum(int(row.pop("loads")) for row in rows_by_bucket)
        markers = [BucketMarker(**row) for row in rows_by_bucket]
        stage.rows_out = sum(marker.rows for marker in markers)
    return markers, loads


def _limit_threads() -> None:
    """Gives a Python worker the cores of its task: more would fight with the other tasks of the host."""
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("INSTRUCTUE_TORCH_THREADS", "1"))))


class _Ticker:
    """Calls `tick` twice a second on a thread while a Spark action blocks the driver."""

    def __enter__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(0.5):
            self.tick()

    def tick(self) -> None:
        """Looks once; overridden."""


class _MarkerProgress(_Ticker):
    """Counts the users of finished buckets by their markers."""

    def __init__(self, store: OutputStore, run_id: str, users: int, reporter: Reporter) -> None:
        self._store, self._run_id, self._users, self._reporter = store, run_id, users, reporter
        # Buckets of an earlier attempt count as done, but not into the rate.
        self._rows = {bucket_folder(one.bucket): one.rows for one in finished_buckets(store, run_id)}
        self._before = sum(self._rows.values())
        self._tokens = 0
        self._started = time.monotonic()

    def tick(self) -> None:
        """Reads the markers that are new."""
        for name in self._store.names("runs", self._run_id):
            is_new = name.startswith("bucket=") and name not in self._rows
            if is_new and self._store.exists("runs", self._run_id, name, "marker.json"):
                marker = self._store.read_json("runs", self._run_id, name, "marker.json")
                self._rows[name] = int(marker["rows"])
                self._tokens += int(marker["tokens"])
                seconds, users = time.monotonic() - self._started, sum(self._rows.values())
                rate = f"{(users - self._before) / seconds:.1f} users/s, {self._tokens / seconds:,.0f} tokens/s"
                self._reporter.progress("embed", users, self._users, rate=rate)


class _TaskProgress(_Ticker):
    """Estimates progress by the finished tasks of the running Spark stage."""

    def __init__(self, spark: SparkSession, name: str, rows: int, reporter: Reporter) -> None:
        self._tracker, self._name, self._rows, self._reporter = spark.sparkContext.statusTracker(), name, rows, reporter

    def tick(self) -> None:
        """Looks at the newest active stage."""
        for stage_id in sorted(self._tracker.getActiveStageIds(), reverse=True)[:1]:
            info = self._tracker.getStageInfo(stage_id)
            if info is not None and info.numTasks:
                done = self._rows * info.numCompletedTasks // info.numTasks
                self._reporter.progress(self._name, done, self._rows)

"""What this machine does with a model, measured in a minute: seconds per user and text, bytes per user.

On a CPU one thread of every core embeds at the same time, as the workers of a backfill do, and the time they computed
counts, so that something else on the machine touches it little.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from instructue_feast import schema
from instructue_feast.history.buckets import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.from_run import open_folder
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.runs.audit import bucket_digest, check_embeddings
from instructue_feast.runs.plan import Line

FEW, MANY = 1, 8
"""Numbers of instructions a line is drawn through."""

_ROWS = 2_048
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRates:
    """Times of one worker, and sizes; see `runs.plan.Calibration`."""

    prefix_tokens: float
    embed_seconds: Line
    load_seconds: float
    encode_seconds: float
    write_seconds: Line
    run_bytes: Line


@dataclass(frozen=True, slots=True)
class _Job:
    folder: str
    dtype: str
    max_batch_tokens: int | None
    history: PackedHistory
    instructions: tuple[Instruction, ...]
    seconds: float


def measure_model(
    model: InstructUEModel,
    history: PackedHistory,
    texts: Sequence[str],
    instructions: Sequence[Instruction],
    *,
    dtype: str = "float32",
    max_batch_tokens: int | None = None,
    workers: int | None = None,
    seconds: float = 10.0,
) -> ModelRates:
    """Measures a model on a sample of users.

    Args:
        model: The model.
        history: Users as they are; their texts may be any.
        texts: Texts to time the encoder with.
        instructions: Of the project; repeated up to `MANY`.
        dtype: Compute type of the LLM.
        max_batch_tokens: See `UserEmbedder`.
        workers: Processes that embed at once on a CPU; one for every core when left out.
        seconds: Each of them embeds at least this long for each number of instructions.
    """
    many = tuple(Instruction(f"plan_{row}", _words(instructions, row)) for row in range(MANY))
    table = random_table(model, history)
    prefix = float(model.prefix_lengths(history).mean())
    if torch.cuda.is_available():
        started = time.perf_counter()
        on_gpu = model.to("cuda")
        torch.cuda.synchronize()
        load = time.perf_counter() - started
        embedder = UserEmbedder(on_gpu, table, max_batch_tokens=max_batch_tokens)
        few, all_of_them = (_seconds_per_user(embedder, history, one, seconds) for one in (many[:FEW], many))
        model.to("cpu")
    else:
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(Path(scratch) / "model")
            table.save(Path(scratch) / "soft_tokens.safetensors")
            job = _Job(scratch, dtype, max_batch_tokens, history, many, seconds)
            number = workers or os.cpu_count() or 1
            with ProcessPoolExecutor(number, _CONTEXT) as pool:
                found = np.array(list(pool.map(_embed_alone, [job] * number)))
        load, few, all_of_them = (float(one) for one in np.median(found, axis=0))
    write = [_measure_writing(model.config.embedding_dim, number) for number in (FEW, MANY)]
    return ModelRates(
        prefix_tokens=prefix,
        embed_seconds=_line(few, all_of_them),
        load_seconds=load,
        encode_seconds=_measure_encoder(model, texts, seconds / 2),
        write_seconds=_line(write[0][0], write[1][0]),
        run_bytes=_line(write[0][1], write[1][1]),
    )


def random_table(model: InstructUEModel, history: PackedHistory) -> SoftTokenTable:
    """A table of the texts of some users whose soft tokens are random: time does not depend on their values."""
    ids, first = np.unique(history.text_id, return_index=True)
    generator = torch.Generator().manual_seed(0)
    scale = float(model.llm.get_input_embeddings().weight.float().std())  # type: ignore[operator]
    soft_NH = torch.randn(len(ids), model.config.hidden_size, generator=generator) * scale
    keys_NF = torch.nn.functional.normalize(torch.randn(len(ids), model.focus_dim, generator=generator), dim=-1)
    return SoftTokenTable(ids, history.source_index[first], soft_NH, keys_NF, model.weights_digest())


def random_history(texts: Sequence[int], numeric: int, *, users: int = 256, seed: int = 0) -> PackedHistory:
    """Made-up users, where there are none to look at.

    Args:
        texts: Mean number of texts of each source; a user has from none to twice as many.
        numeric: Numeric columns.
        users: How many.
        seed: The same seed, the same users.
    """
    rng = np.random.default_rng(seed)
    sizes_UR = np.stack([rng.integers(0, 2 * mean + 1, users) for mean in texts], axis=1)
    source_T = np.repeat(np.tile(np.arange(len(texts)), users), sizes_UR.ravel()).astype(np.int32)
    total = len(source_T)
    return PackedHistory(
        user_ids=[f"user-{row}" for row in range(users)],
        as_of_us=np.zeros(users, np.int64),
        offsets=np.concatenate([[0], np.cumsum(sizes_UR.sum(1))]).astype(np.int64),
        source_index=source_T,
        text_id=rng.integers(0, 512, total) * len(texts) + source_T,
        count_bucket=rng.integers(0, NUM_COUNT_BUCKETS, total).astype(np.int32),
        age_bucket=rng.integers(0, NUM_AGE_BUCKETS, total).astype(np.int32),
        num_events=sizes_UR.astype(np.int32),
        tabular_numeric=rng.normal(0, 1, (users, numeric)).astype(np.float32),
    )


def _words(instructions: Sequence[Instruction], row: int) -> str:
    own = instructions[row % len(instructions)].text
    return own if row < len(instructions) else f"{own} ({row})"


def _line(few: float, many: float) -> Line:
    slope = max(0.0, (many - few) / (MANY - FEW))
    return Line(base=few - slope * FEW, slope=slope)


def _embed_alone(job: _Job) -> tuple[float, float, float]:
    """Seconds to load, and per user with few and many instructions; in a process of its own."""
    torch.set_num_threads(1)
    started = time.process_time()
    embedder = open_folder(Path(job.folder), job.dtype, job.max_batch_tokens)
    load = time.process_time() - started
    few, many = (
        _seconds_per_user(embedder, job.history, one, job.seconds) for one in (job.instructions[:FEW], job.instructions)
    )
    return load, few, many


def _seconds_per_user(
    embedder: UserEmbedder, history: PackedHistory, instructions: tuple[Instruction, ...], seconds: float
) -> float:
    on_gpu = embedder.model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    few = history.take(range(min(8, len(history))))
    embedder.encode(few, instructions)  # reads the instructions
    before = clock()
    embedder.encode(few, instructions)
    # As many users at once as a fourth of the time allows: batches of like lengths want many to choose from.
    number = min(len(history), max(8, int(seconds / 4 * len(few) / (clock() - before))))
    done, started = 0, clock()
    while not done or clock() - started < seconds:
        embedder.encode(history.take([(done + row) % len(history) for row in range(number)]), instructions)
        done += number
    return (clock() - started) / done


def _measure_encoder(model: InstructUEModel, texts: Sequence[str], seconds: float) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder = model.text_encoder(model.config.encoder_names[0])
        some = list(texts) or ["nothing is known"]
        encoder.encode(some[:8])
        done, started = 0, time.process_time()
        while not done or time.process_time() - started < seconds:
            encoder.encode(some[:256])
            done += len(some[:256])
        return (time.process_time() - started) / done
    finally:
        torch.set_num_threads(threads)


def _measure_writing(dim: int, instructions: int) -> tuple[float, float]:
    """Seconds and bytes per user of auditing and writing a bucket."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(_ROWS, instructions, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    names = [f"plan_{row}" for row in range(instructions)]
    offsets = pa.array(np.arange(0, _ROWS * dim + 1, dim, dtype=np.int32))
    times = pa.array(np.zeros(_ROWS, np.int64)).cast(schema.TIMESTAMP)
    columns: list[Any] = [pa.array([f"user-{row:012d}" for row in range(_ROWS)]), times, times]
    columns += [pa.ListArray.from_arrays(offsets, pa.array(vectors[:, k].ravel())) for k in range(instructions)]
    table = pa.Table.from_arrays(columns, schema=schema.embeddings_schema(names))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "part.parquet"
        started = time.process_time()
        check_embeddings(table, "calibration", dim=dim)
        bucket_digest(table)
        pq.write_table(table, file, compression="zstd", use_dictionary=False)
        return (time.process_time() - started) / _ROWS, file.stat().st_size / _ROWS

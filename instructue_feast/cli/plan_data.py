"""What `instructue plan` knows of the users: counted in the latest extract, or stated defaults."""

from __future__ import annotations

import dataclasses
import math
import os

import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.config import EventSourceConfig, InstructueConfig
from instructue_feast.errors import ConfigError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.runs.plan import DataStatistics, ExtractionRates, Line
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import parquet_bytes

SAMPLE = 2_048
"""Users that are looked at."""

EXTRACTION = ExtractionRates(
    source="synthetic users, 0.2 to 21.9 million events on 2 cores (benchmarks/results/scale.csv)",
    fixed_core_seconds=30.0,
    fixed_seconds=16.0,
    core_seconds_per_event=2.5e-6,
)
"""Where no extract of at least `_EVENTS` events says how fast Spark is; what is fixed includes the command's start."""

_EVENTS = 5_000_000
_START_SECONDS = 9.0
"""Of an extraction with hardly any events, once the session is up."""
_DEFAULT_EVENTS = 30.0
_DEFAULT_SHARE = 0.25


def look_at(project: InstructueConfig) -> tuple[PackedHistory, list[str], DataStatistics, ExtractionRates]:
    """Users to measure with, some of their texts, and what is known of all."""
    from instructue_feast.evaluation.extracts import extract_manifest, latest_extract

    store = OutputStore(project.output.path)
    try:
        name = latest_extract(project)
    except ConfigError:
        return _made_up(project)
    manifest = extract_manifest(store, name)
    history, book, files = _sample(project, store, name)
    half = len(set(history.text_id[: history.offsets[len(history) // 2]].tolist()))
    whole = len(set(history.text_id.tolist()))
    data = DataStatistics(
        source=f"extract {name} of {project.project}",
        users=manifest.users,
        events_per_user=manifest.events / manifest.users,
        texts_per_user=manifest.tokens / manifest.users,
        distinct_texts=manifest.distinct_texts,
        text_growth=min(1.0, max(0.0, math.log2(whole / half))) if half else 1.0,
        history_bytes=files.history.slope,
        phrase_bytes=files.phrasebook / max(1, manifest.distinct_texts),
        file_bytes=files.history.base,
    )
    extraction = EXTRACTION
    if manifest.events >= _EVENTS and manifest.seconds >= 4 * _START_SECONDS:  # or the start says more than the events
        cores = os.cpu_count() or 1
        rate = (manifest.seconds - _START_SECONDS) * cores / manifest.events
        source = f"extract {name} took {manifest.seconds:.0f} s, on {cores} cores like these"
        extraction = dataclasses.replace(EXTRACTION, source=source, core_seconds_per_event=rate)
    return history, book, data, extraction


@dataclasses.dataclass(frozen=True, slots=True)
class _FileSizes:
    """Bytes of a file of packed histories over its users, and of the phrasebook."""

    history: Line
    phrasebook: int


def history_file(table: pa.Table) -> Line:
    """From the halves of the sample: a file's headers and dictionaries are paid once, whatever the users in it."""
    half = len(table) // 2
    whole = float(parquet_bytes(table, repeats=True))
    if not half:
        return Line(base=0.0, slope=whole)
    slope = min((whole - parquet_bytes(table.slice(0, half), repeats=True)) / (len(table) - half), whole / len(table))
    return Line(base=whole - len(table) * slope, slope=slope)


def _sample(project: InstructueConfig, store: OutputStore, extract: str) -> tuple[PackedHistory, list[str], _FileSizes]:
    """Up to `SAMPLE` users of an extract, some texts, and the sizes of its files."""
    files = store.files("extracts", extract, "history", "bucket=*")
    tables, rows = [], 0
    for file in files:
        if rows >= SAMPLE:
            break
        with store.fs.open(file, "rb") as stream:
            tables.append(pq.read_table(stream))
        rows += tables[-1].num_rows
    table = pa.concat_tables(tables).slice(0, SAMPLE)
    history = PackedHistory.from_arrow(
        table, num_sources=len(project.source_names), num_numeric=len(project.numeric_columns)
    )
    books = store.files("extracts", extract, "phrasebook")
    with store.fs.open(books[0], "rb") as stream:
        texts = pq.read_table(stream, columns=["text"]).slice(0, SAMPLE).column("text").to_pylist()
    return history, texts, _FileSizes(history_file(table), sum(map(store.fs.size, books)))


def _made_up(project: InstructueConfig) -> tuple[PackedHistory, list[str], DataStatistics, ExtractionRates]:
    """Stated defaults: a quarter of each source's room is used, categorical columns are all known."""
    from instructue_feast.inference.calibrate import random_history

    texts = [
        max(1, int(_DEFAULT_SHARE * one.max_texts)) if isinstance(one, EventSourceConfig) else len(one.categorical)
        for one in project.sources.values()
    ]
    history = random_history(texts, len(project.numeric_columns))
    data = DataStatistics(
        source=f"no extract yet, so a default: {_DEFAULT_SHARE:.0%} of `max_texts` of each source",
        users=1_000_000,
        events_per_user=_DEFAULT_EVENTS,
        texts_per_user=float(history.num_tokens.mean()),
        distinct_texts=50_000,
        text_growth=0.5,
        history_bytes=12.0 * float(history.num_tokens.mean()) + 64,
        phrase_bytes=48.0,
    )
    return history, [f"some event of kind {row}" for row in range(256)], data, EXTRACTION

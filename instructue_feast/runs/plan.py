"""What a backfill will cost, before it runs: arithmetic over what a calibration measured. No torch, no Spark.

core seconds = extraction + encoding of new texts + embedding + writing, each a rate times a size
wall time    = fixed part + core seconds of the buckets, dealt out to the workers
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructue_feast.errors import ConfigError, DataError

FORMAT = 1
"""Of the calibration's JSON."""

MOST_USERS = 10_000_000_000
BUCKET_BYTES = 256 << 20
"""A worker holds one bucket: its histories and its vectors. `plan` proposes buckets of at most this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A quantity that grows linearly with the number of instructions: `base + slope * instructions`."""

    base: float
    slope: float

    def at(self, instructions: int) -> float:
        """Its value."""
        return self.base + self.slope * instructions


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStatistics:
    """What is known of the users.

    Attributes:
        source: Where the figures come from, for people.
        users: How many they were counted over.
        events_per_user: Events in the window of the history.
        texts_per_user: Texts of a packed history.
        distinct_texts: Texts of the phrasebook of `users` users.
        text_growth: Distinct texts grow as users to this power.
        history_bytes: Of a packed history on disk, per user.
        file_bytes: Of a file of packed histories, beside its users: headers and dictionaries.
        phrase_bytes: Of a phrasebook on disk, per text.
    """

    source: str
    users: int
    events_per_user: float
    texts_per_user: float
    distinct_texts: float
    text_growth: float
    history_bytes: float
    phrase_bytes: float
    file_bytes: float = 0.0

    def texts_of(self, users: int) -> float:
        """Distinct texts of that many users."""
        return float(self.distinct_texts * (users / self.users) ** self.text_growth)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionRates:
    """What Spark costs.

    Attributes:
        source: Where the figures come from, for people.
        fixed_core_seconds: Start of the session, compilation, planning; of a job of any size.
        fixed_seconds: Wall time of the same.
        core_seconds_per_event: Of reading, shuffling and packing.
    """

    source: str
    fixed_core_seconds: float
    fixed_seconds: float
    core_seconds_per_event: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a machine does with a model; times are of one worker: a core, or a GPU.

    Attributes:
        device: Processor or accelerator.
        accelerator: Whether embedding ran on a GPU.
        model: LLM, layers and compute type, for people.
        versions: Releases of what did the work.
        date: UTC.
        data: Of the users.
        extraction: Of Spark.
        prefix_tokens: Mean tokens of a prefix.
        embed_seconds: Per user.
        write_seconds: Auditing, digest and Parquet, per user.
        encode_seconds: Per text.
        load_seconds: Model and table, once per worker.
        embedding_dim: Size of an embedding.
        encoder_dim: Size of an event vector.
        hidden_size: Size of a soft token.
        focus_dim: Size of a focus key.
        run_bytes: Of a run on disk, per user.
        online_bytes: Of an online store, per user, by its name.
        format: See `FORMAT`.
    """

    device: str
    accelerator: bool
    model: str
    versions: str
    date: str
    data: DataStatistics
    extraction: ExtractionRates
    prefix_tokens: float
    embed_seconds: Line
    write_seconds: Line
    encode_seconds: float
    load_seconds: float
    embedding_dim: int
    encoder_dim: int
    hidden_size: int
    focus_dim: int
    run_bytes: Line
    online_bytes: Mapping[str, Line]
    format: int = FORMAT

    def save(self, file: str | Path) -> None:
        """Writes it as JSON."""
        Path(file).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            DataError: It is missing, or no calibration of this release.
        """
        try:
            values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            found = values["format"]
            values["data"] = DataStatistics(**values["data"])
            values["extraction"] = ExtractionRates(**values["extraction"])
            for name in ("embed_seconds", "write_seconds", "run_bytes"):
                values[name] = Line(**values[name])
            values["online_bytes"] = {name: Line(**one) for name, one in values["online_bytes"].items()}
            calibration = cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is not a calibration: {error}", "delete it to calibrate again") from None
        if found != FORMAT:
            raise DataError(f"{file} is of format {found}, this release reads {FORMAT}", "delete it to calibrate again")
        return calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be planned.

    Attributes:
        users: U.
        instructions: K.
        days: Days the nightly job runs; the first is a full backfill.
        workers: Cores, or GPUs, that embed at the same time; extraction has as many cores.
        changed: Share of users whose history changes from one day to the next.
        new_texts: Share of the phrasebook that is new every day.
        buckets: Buckets of the run; as many as `BUCKET_BYTES` asks for when left out.

    Raises:
        ConfigError: A number out of range.
    """

    users: int
    instructions: int
    days: int = 1
    workers: int = 1
    changed: float = 0.05
    new_texts: float = 0.01
    buckets: int | None = None

    def __post_init__(self) -> None:
        for name, most in (("users", MOST_USERS), ("instructions", 4096), ("days", 36_500), ("workers", 1_000_000)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}", f"give a number from 1 to {most:,}")
        for name in ("changed", "new_texts"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", "give a share from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one job.

    Attributes:
        tokens: The LLM reads.
        core_seconds: Of Spark, encoder and writing, and of embedding on a CPU.
        gpu_seconds: Of embedding on a GPU.
        seconds_by_stage: Wall time by stage.
        seconds: Wall time.
    """

    tokens: float
    core_seconds: float
    gpu_seconds: float
    seconds_by_stage: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is predicted.

    Attributes:
        workload: For what.
        buckets: Buckets of the run that were assumed.
        distinct_texts: Texts of the phrasebook.
        full: A full backfill.
        incremental: A nightly incremental one.
        all_days: The first day full, all others incremental.
        all_days_full: Every day full.
        storage_bytes: On disk, by what it is: of one day, except `all days`, with every day's run and extract kept.
        online_bytes: Of the online store, by its name.
        worker_bytes: Memory of one worker beside the model.
        assumptions: What it rests on, for people.
    """

    workload: Workload
    buckets: int
    distinct_texts: float
    full: Cost
    incremental: Cost
    all_days: Cost
    all_days_full: Cost
    storage_bytes: dict[str, float]
    online_bytes: dict[str, float]
    worker_bytes: float
    assumptions: list[str]


def plan(calibration: Calibration, workload: Workload) -> Plan:
    """Predicts time, storage and memory.

    Example:
        >>> plan(Calibration.load("calibration.json"), Workload(users=10**9, instructions=8))  # doctest: +SKIP
    """
    users, instructions, data = workload.users, workload.instructions, calibration.data
    texts = data.texts_of(users)
    run = users * calibration.run_bytes.at(instructions)
    in_memory = users * (4.0 * calibration.embedding_dim * instructions + 24 * data.texts_per_user)
    buckets = workload.buckets or max(16, math.ceil(in_memory / BUCKET_BYTES))
    history = users * data.history_bytes + buckets * data.file_bytes
    full = _cost(calibration, workload, buckets, embedded=users, encoded=texts)
    some = _cost(calibration, workload, buckets, embedded=users * workload.changed, encoded=texts * workload.new_texts)
    phrasebook = texts * data.phrase_bytes
    vectors = texts * 4.0 * calibration.encoder_dim
    table = texts * (4.0 * (calibration.hidden_size + calibration.focus_dim) + 12)
    daily = run + history + phrasebook + table
    storage = {
        "run": run,
        "packed histories": history,
        "phrasebook": phrasebook,
        "event vectors": vectors,
        "soft-token table": table,
        "all days": workload.days * daily + vectors * (1 + (workload.days - 1) * workload.new_texts),
    }
    return Plan(
        workload=workload,
        buckets=buckets,
        distinct_texts=texts,
        full=full,
        incremental=some,
        all_days=_sum(full, some, workload.days - 1),
        all_days_full=_sum(full, full, workload.days - 1),
        storage_bytes=storage,
        online_bytes={name: users * one.at(instructions) for name, one in calibration.online_bytes.items()},
        worker_bytes=in_memory / buckets,
        assumptions=_assumptions(calibration, workload),
    )


def _cost(calibration: Calibration, workload: Workload, buckets: int, *, embedded: float, encoded: float) -> Cost:
    users, workers, instructions = workload.users, workload.workers, workload.instructions
    rates = calibration.extraction
    extract = users * calibration.data.events_per_user * rates.core_seconds_per_event
    encode = encoded * calibration.encode_seconds
    embed = embedded * calibration.embed_seconds.at(instructions)
    write = users * calibration.write_seconds.at(instructions)
    # Whole buckets are dealt out: the last round leaves workers without one.
    rounds = math.ceil(buckets / workers) / buckets
    loads = min(workers, buckets) * calibration.load_seconds
    stages = {
        "start": rates.fixed_seconds,
        "extract": extract / workers,
        "encode": encode / workers,
        "embed": embed * rounds + calibration.load_seconds,
        "write": write * rounds,
    }
    on_gpu = calibration.accelerator
    return Cost(
        tokens=embedded * (calibration.prefix_tokens + 2 * instructions),
        core_seconds=rates.fixed_core_seconds + extract + encode + write + loads + (0.0 if on_gpu else embed),
        gpu_seconds=embed if on_gpu else 0.0,
        seconds_by_stage=stages,
        seconds=sum(stages.values()),
    )


def _sum(first: Cost, other: Cost, times: int) -> Cost:
    stages = {name: one + times * other.seconds_by_stage[name] for name, one in first.seconds_by_stage.items()}
    return Cost(
        tokens=first.tokens + times * other.tokens,
        core_seconds=first.core_seconds + times * other.core_seconds,
        gpu_seconds=first.gpu_seconds + times * other.gpu_seconds,
        seconds_by_stage=stages,
        seconds=sum(stages.values()),
    )


def _assumptions(calibration: Calibration, workload: Workload) -> list[str]:
    data = calibration.data
    return [
        f"measured on {calibration.device} with {calibration.model}, {calibration.versions}, {calibration.date}; all "
        f"{workload.workers:,} workers are as fast, and nothing else runs on them",
        f"users are like {data.source}: {data.events_per_user:.1f} events in the window, {data.texts_per_user:.1f} "
        f"texts, {calibration.prefix_tokens:.1f} tokens of prefix",
        f"{data.distinct_texts:,.0f} distinct texts of {data.users:,} users grow with the users to the power of "
        f"{data.text_growth:.2f}; a catalogue that is complete grows less",
        f"extraction: {calibration.extraction.source}; it reads the whole window every day, also incrementally",
        f"{workload.changed:.1%} of users and {workload.new_texts:.1%} of texts change from one day to the next",
        "every day's run is whole, also an incremental one; nothing is collected; event vectors are shared by all days",
        "storage, network and scheduler keep up; online memory without replicas, indexes and fragmentation",
    ]

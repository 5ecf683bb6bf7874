"""The extract job: raw tables in, packed histories and phrasebook out.

Run it with `python -m instructue_spark.extract --config instructue.yaml --as-of 2017-10-01T00:00:00Z`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import reduce
from typing import Any

import pyarrow.parquet as pq
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from instructue_feast import schema
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import ConfigError, DataError
from instructue_feast.runs.manifest import ExtractManifest, SourceCounts, check_id, new_id, parse_as_of, to_json
from instructue_feast.runs.store import OutputStore
from instructue_spark import history, sources
from instructue_spark.claim import claimed
from instructue_spark.io import spark_errors, spark_schema
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session, settle
from instructue_spark.sources import FIRST_QUARANTINED, IN_WINDOW, ROSTER, STATUSES

ROSTER_NAME = "(roster)"
"""Key of the roster in a manifest's `counts`; no source can have that name."""

_Counts = dict[tuple[int, int], int]


def run_extract(
    spark: SparkSession, config: InstructueConfig, as_of: datetime, *, extract_id: str, reporter: Reporter
) -> ExtractManifest:
    """Extracts packed histories and the phrasebook of one `as_of`.

    Writes `<output>/extracts/<extract_id>/` with `history/bucket=N/*.parquet` (`schema.PACKED_HISTORY`, sorted by user;
    a bucket without users has no folder), `phrasebook/`, `quarantine/`, and `manifest.json` last. Whatever fails, the
    folder is removed.

    Args:
        spark: The session; gets the settings of `session.settle`.
        config: The project.
        as_of: Exclusive upper bound of event times, with a time zone.
        extract_id: Name of the extract; must be new.
        reporter: Gets the stages `sources`, `phrasebook` and `history`.

    Returns:
        The manifest.

    Raises:
        ConfigError: A wrong `where` condition, time zone or extract id; `as_of` without a time zone.
        DataError: A raw table is missing, empty, corrupt or, as `SchemaError`, of the wrong shape; nobody is left.
        RunConflictError: The extract exists, or somebody else is writing it.
        StorageError: Too little disk, or a write failed.
    """
    if as_of.tzinfo is None:
        raise ConfigError("as_of has no time zone", "pass an aware datetime")
    check_id("extract", extract_id)
    started = time.monotonic()
    store = OutputStore(config.output.path)
    store.require_free(config.output.min_free_gib)
    folder = ("extracts", extract_id)
    with claimed(spark, store, *folder), spark_errors(), _caches() as caches:
        job = _Job(settle(spark), config, as_of.astimezone(UTC), reporter, store, folder, caches)
        manifest = job.run(extract_id, started)
        store.write_json(to_json(manifest), *folder, "manifest.json")
    return manifest


class _Job:
    """One extract while it runs: its inputs, and the frames to unpersist at the end."""

    def __init__(
        self,
        spark: SparkSession,
        config: InstructueConfig,
        as_of: datetime,
        reporter: Reporter,
        store: OutputStore,
        folder: tuple[str, ...],
        caches: list[DataFrame],
    ) -> None:
        self.spark, self.config, self.as_of = spark, config, as_of
        self.reporter, self.store, self.folder, self.caches = reporter, store, folder, caches

    def run(self, extract_id: str, started: float) -> ExtractManifest:
        config, names = self.config, self.config.source_names
        with self.reporter.stage("sources") as stage:
            events, snapshots, counts, kept = self._canonical()
            stage.rows_in, stage.rows_out = sum(counts.values()), _total(counts, IN_WINDOW)
            self._write_quarantine([one for one in (events, snapshots) if one is not None], counts)
        with self.reporter.stage("phrasebook") as stage:
            selected = tokens = None
            if snapshots is not None:
                selected = self._cache(history.select_snapshots(snapshots))
                tokens = history.snapshot_tokens(selected, config)
            texts = history.build_texts(self._cache(history.rendered_texts(events, tokens, config)))
            texts.phrasebook.write.parquet(self.store.url(*self.folder, "phrasebook"))
            stage.rows_in, stage.rows_out = _total(counts, IN_WINDOW), texts.num_texts
        with self.reporter.stage("history") as stage:
            half = None if events is None else history.pack_events(events, texts, config, self.as_of)
            other = None
            if selected is not None and tokens is not None:
                other = history.pack_snapshots(selected, tokens, texts, config)
            packed = history.packed_history(half, other, config, self.as_of)
            users, num_tokens, kept_events = self._write_history(packed)
            kept.update(kept_events)
            stage.rows_in, stage.rows_out = _total(counts, IN_WINDOW), users
        indexes = {**dict(enumerate(names)), **({ROSTER: ROSTER_NAME} if config.users else {})}
        return ExtractManifest(
            extract_id=extract_id,
            as_of=self.as_of.isoformat(),
            created=datetime.now(UTC).isoformat(),
            history_digest=config.history_digest(),
            sources=list(names),
            buckets=config.output.buckets,
            users=users,
            events=sum(kept.get(index, 0) for index, name in enumerate(names) if name in config.event_sources),
            distinct_texts=texts.num_texts,
            tokens=num_tokens,
            counts={name: _source_counts(counts, index, kept.get(index, 0)) for index, name in indexes.items()},
            seconds=round(time.monotonic() - started, 3),
        )

    def _canonical(self) -> tuple[DataFrame | None, DataFrame | None, _Counts, dict[int, int]]:
        """Events and snapshots, cached; their rows by source and status; kept snapshots by source."""
        spark, config = self.spark, self.config
        events = [sources.canonical_events(spark, name, config, self.as_of) for name in config.event_sources]
        snapshots = [sources.canonical_snapshots(spark, name, config, self.as_of) for name in config.tabular_sources]
        if config.users is not None:
            snapshots.append(sources.canonical_roster(spark, config.users, config))
        unions = [self._cache(reduce(DataFrame.unionByName, group)) if group else None for group in (events, snapshots)]
        counts: _Counts = {} if unions[0] is None else sources.count_statuses(unions[0])
        kept: dict[int, int] = {}
        if unions[1] is not None:
            snapshot_counts, kept = sources.count_snapshots(unions[1])
            counts.update(snapshot_counts)
        for index, (name, source) in enumerate(config.sources.items()):
            read = sum(number for (src, _), number in counts.items() if src == index)
            if not read and not source.allow_empty:
                raw = sources.open_source(spark, f"source {name}", _without_conditions(source))
                if raw.frame.isEmpty():
                    hint = "is the job that writes it done? `allow_empty: true` accepts it"
                    raise DataError(f"source {name}: table {source.table.location} has no rows", hint)
        if not _total(counts, IN_WINDOW):
            raise DataError(
                f"no source has a row before {self.as_of.isoformat()} and inside its window, and no user is listed",
                "check as_of, `history.days` and the `where` conditions",
            )
        return unions[0], unions[1], counts, kept

    def _write_quarantine(self, frames: list[DataFrame], counts: _Counts) -> None:
        if any(status >= FIRST_QUARANTINED for _, status in counts):
            rows = sources.quarantine(frames, self.config.source_names)
            rows.write.parquet(self.store.url(*self.folder, "quarantine"))
            return
        folder = self.store.path(*self.folder, "quarantine")
        self.store.fs.makedirs(folder, exist_ok=True)
        pq.write_table(schema.QUARANTINE.empty_table(), f"{folder}/part-0.parquet", filesystem=self.store.fs)

    def _write_history(self, packed: DataFrame) -> tuple[int, int, dict[int, int]]:
        """Writes the packed history and reads back its users, tokens, and kept events by source."""
        url = self.store.url(*self.folder, "history")
        packed.sortWithinPartitions("bucket", "user_id").write.partitionBy("bucket").parquet(url)
        sums = [F.sum(F.get("num_events", index)) for index in range(len(self.config.source_names))]
        written = self.spark.read.schema(spark_schema(schema.PACKED_HISTORY)).parquet(url)
        row = written.agg(F.count("*"), F.sum(F.size("text_id")), *sums).collect()[0]
        names = enumerate(self.config.source_names)
        kept = {index: int(row[2 + index]) for index, name in names if name in self.config.event_sources}
        return int(row[0]), int(row[1]), kept

    def _cache(self, frame: DataFrame) -> DataFrame:
        self.caches.append(frame.persist(StorageLevel.MEMORY_AND_DISK))
        return self.caches[-1]


@contextmanager
def _caches() -> Iterator[list[DataFrame]]:
    """Unpersists the frames put into the list, unless the process is being stopped.

    An interrupt leaves a command to the JVM unanswered; the next one would wait until the running job ends.
    """
    frames: list[DataFrame] = []
    try:
        yield frames
    except Exception:
        _unpersist(frames)
        raise
    _unpersist(frames)


def _unpersist(frames: list[DataFrame]) -> None:
    for frame in frames:
        frame.unpersist()


def _without_conditions(source: Any) -> Any:
    return dataclasses.replace(source, where=())


def _total(counts: _Counts, status: int) -> int:
    return sum(number for (_, one), number in counts.items() if one == status)


def _source_counts(counts: _Counts, src: int, kept: int) -> SourceCounts:
    mine = {STATUSES[status]: number for (index, status), number in counts.items() if index == src}
    return SourceCounts(
        read=sum(mine.values()),
        kept=kept,
        duplicates=mine.get("in_window", 0) - kept,
        at_or_after_as_of=mine.get("at_or_after_as_of", 0),
        before_window=mine.get("before_window", 0),
        quarantined={reason: mine[reason] for reason in STATUSES[FIRST_QUARANTINED:] if reason in mine},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job from the command line; JSON lines on standard output.

    Returns:
        The exit code: 0, or the `exit_code` of the error that was reported.
    """
    parser = argparse.ArgumentParser(prog="python -m instructue_spark.extract", description=__doc__)
    parser.add_argument("--config", required=True, help="the project's instructue.yaml")
    parser.add_argument(
        "--as-of", required=True, help="exclusive upper bound of event times, for example 2017-10-01T00:00:00Z"
    )
    parser.add_argument("--extract-id", help="name of the extract; a new one by default")
    parser.add_argument("--cores", type=int, help="cores of a local session; all by default")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, Any]:
        config = load_config(arguments.config)
        as_of = parse_as_of(arguments.as_of)
        extract_id = arguments.extract_id or new_id(as_of, config.history_digest(), datetime.now(UTC).isoformat())
        spark = get_session(f"instructue extract {config.project}", cores=arguments.cores)
        return to_json(run_extract(spark, config, as_of, extract_id=extract_id, reporter=reporter))

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())

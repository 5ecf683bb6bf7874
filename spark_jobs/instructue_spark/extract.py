"""The extract job: raw tables in, packed histories and phrasebook out.

Run it with `python -m instructue_spark.extract --config instructue.yaml --as-of 2017-10-01T00:00:00Z`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from instructue_feast import schema
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import ConfigError, DataError
from instructue_feast.runs.manifest import ExtractManifest, SourceCounts, check_id, new_id, parse_as_of, to_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import write_parquet
from instructue_spark import history, sources
from instructue_spark.claim import claimed
from instructue_spark.extract_files import ExtractFiles
from instructue_spark.io import spark_errors
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session, settle
from instructue_spark.sources import FIRST_QUARANTINED, IN_WINDOW, ROSTER_NAME, STATUSES
from instructue_spark.windows import ROSTER, Windows

_Counts = dict[tuple[int, int], int]
"""Rows by `(src, status)`."""


def run_extract(
    spark: SparkSession, config: InstructueConfig, as_of: datetime, *, extract_id: str, reporter: Reporter
) -> ExtractManifest:
    """Extracts packed histories and the phrasebook of one `as_of`; see `run_extracts`."""
    return run_extracts(spark, config, [as_of], extract_ids=[extract_id], reporter=reporter)[0]


def run_extracts(
    spark: SparkSession,
    config: InstructueConfig,
    as_ofs: Sequence[datetime],
    *,
    extract_ids: Sequence[str],
    reporter: Reporter,
) -> list[ExtractManifest]:
    """Extracts packed histories and phrasebooks of several `as_of`s in one pass over the raw tables.

    Writes for each `<output>/extracts/<extract_id>/` with `history/bucket=N/*.parquet` (`schema.PACKED_HISTORY`, sorted
    by user; a bucket without users has no folder), `phrasebook/`, `quarantine/`, and `manifest.json` last. Each is what
    an extraction of that `as_of` alone would write. Whatever fails, the folders without manifest are removed.

    Args:
        spark: The session; gets the settings of `session.settle`.
        config: The project.
        as_ofs: Exclusive upper bounds of event times, with time zones.
        extract_ids: Names of the extracts; must be new.
        reporter: Gets the stages `sources`, `history` and `phrasebook`.

    Returns:
        The manifests, in the order of `as_ofs`.

    Raises:
        ConfigError: A wrong `where` condition, time zone or extract id; `as_of` without a time zone.
        DataError: A raw table is missing, empty, corrupt or, as `SchemaError`, of the wrong shape; nobody is left.
        RunConflictError: An extract exists, or somebody else is writing it.
        StorageError: Too little disk, or a write failed.
    """
    if not as_ofs or len(as_ofs) != len(extract_ids):
        raise ConfigError(f"{len(as_ofs)} as_ofs and {len(extract_ids)} extract ids", "name one extract per as_of")
    if any(one.tzinfo is None for one in as_ofs):
        raise ConfigError("as_of has no time zone", "pass an aware datetime")
    for one in extract_ids:
        check_id("extract", one)
    started = time.monotonic()
    store = OutputStore(config.output.path)
    store.require_free(config.output.min_free_gib)
    moments = [one.astimezone(UTC) for one in as_ofs]
    with ExitStack() as claims, spark_errors():
        tokens = [claims.enter_context(claimed(spark, store, "extracts", one)).token for one in extract_ids]
        files = ExtractFiles(root=config.output.path, extract_ids=tuple(extract_ids), tokens=tuple(tokens))
        job = _Job(settle(spark), config, moments, files, reporter, store)
        manifests = job.run(started)
        for manifest in manifests:
            store.write_json(to_json(manifest), "extracts", manifest.extract_id, "manifest.json")
    return manifests


class _Job:
    """An extraction while it runs."""

    def __init__(
        self,
        spark: SparkSession,
        config: InstructueConfig,
        as_ofs: list[datetime],
        files: ExtractFiles,
        reporter: Reporter,
        store: OutputStore,
    ) -> None:
        self.spark, self.config, self.as_ofs, self.files = spark, config, as_ofs, files
        self.reporter, self.store = reporter, store
        self.windows = Windows(config, as_ofs)

    def run(self, started: float) -> list[ExtractManifest]:
        config, names = self.config, self.config.source_names
        with self.reporter.stage("sources") as stage:
            rows = reduce(DataFrame.unionByName, self._canonical())
            counts = self._counts(rows)
            read = sum(counts[0].values())
            inside = sum(_total(one, IN_WINDOW) for one in counts)
            stage.rows_in, stage.rows_out = read, inside
        with self.reporter.stage("history") as stage:
            totals = history.write(rows, config, self.windows, self.files)
            stage.rows_in, stage.rows_out = inside, sum(one.users for one in totals)
        with self.reporter.stage("phrasebook") as stage:
            for extract_id, one in zip(self.files.extract_ids, totals, strict=True):
                self._complete(extract_id, one.files)
            stage.rows_in, stage.rows_out = inside, sum(one.texts for one in totals)
        indexes = {**dict(enumerate(names)), **({ROSTER: ROSTER_NAME} if config.users else {})}
        manifests = []
        for moment, (as_of, extract_id) in enumerate(zip(self.as_ofs, self.files.extract_ids, strict=True)):
            made, mine = totals[moment], counts[moment]
            manifest = ExtractManifest(
                extract_id=extract_id,
                as_of=as_of.isoformat(),
                created=datetime.now(UTC).isoformat(),
                history_digest=config.history_digest(),
                sources=list(names),
                buckets=config.output.buckets,
                users=made.users,
                events=sum(made.kept[index] for index, name in enumerate(names) if name in config.event_sources),
                distinct_texts=made.texts,
                tokens=made.tokens,
                counts={name: _source_counts(mine, index, made.kept[index], name) for index, name in indexes.items()},
                seconds=round(time.monotonic() - started, 3),
            )
            manifests.append(manifest)
        return manifests

    def _canonical(self) -> list[DataFrame]:
        """The rows of every source, in one shape."""
        spark, config, windows = self.spark, self.config, self.windows
        frames = [sources.canonical_events(spark, name, config, windows) for name in config.event_sources]
        frames += [sources.canonical_snapshots(spark, name, config, windows) for name in config.tabular_sources]
        if config.users is not None:
            frames.append(sources.canonical_roster(spark, config.users, config, windows))
        return frames

    def _counts(self, rows: DataFrame) -> list[_Counts]:
        """Counts the rows for each `as_of`; refuses tables without rows, and an `as_of` nobody is left for."""
        found = sources.count_statuses(rows)
        for index, (name, source) in enumerate(self.config.sources.items()):
            if not source.allow_empty and not any(src == index for src, _, _ in found):
                raw = sources.open_source(self.spark, f"source {name}", _without_conditions(source))
                if raw.frame.isEmpty():
                    hint = "is the job that writes it done? `allow_empty: true` accepts it"
                    raise DataError(f"source {name}: table {source.table.location} has no rows", hint)
        result = []
        for moment, as_of in enumerate(self.as_ofs):
            counts: _Counts = {}
            for (src, status, cell), number in found.items():
                verdict = self.windows.status(moment, src, cell) if status == IN_WINDOW else status
                counts[src, verdict] = counts.get((src, verdict), 0) + number
            if not _total(counts, IN_WINDOW):
                raise DataError(
                    f"no source has a row before {as_of.isoformat()} and inside its window, and no user is listed",
                    "check as_of, `history.days` and the `where` conditions",
                )
            result.append(counts)
        return result

    def _complete(self, extract_id: str, files: dict[str, set[str]]) -> None:
        """Removes files that no finished task has named, and writes the tables without rows."""
        for table in self.files.tables:
            folder = self.store.path("extracts", extract_id, table)
            named = {f"{folder}/{one}" for one in files.get(table, ())}
            for pattern in ("*.parquet", "bucket=*/*.parquet"):
                for one in self.store.files("extracts", extract_id, table, pattern=pattern):
                    if one not in named:
                        self.store.fs.rm_file(one)
        for table, columns in (("phrasebook", schema.PHRASEBOOK), ("quarantine", schema.QUARANTINE)):
            if table not in files:
                write_parquet(self.store, columns.empty_table(), "extracts", extract_id, table, "part-0.parquet")


def _without_conditions(source: Any) -> Any:
    return dataclasses.replace(source, where=())


def _total(counts: _Counts, status: int) -> int:
    return sum(number for (_, one), number in counts.items() if one == status)


def _source_counts(counts: _Counts, src: int, kept: int, name: str) -> SourceCounts:
    if kept > counts.get((src, IN_WINDOW), 0):
        raise DataError(f"source {name}: its table changed while it was read", "run again once its writer is done")
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
        "--as-of",
        required=True,
        action="append",
        help="exclusive upper bound of event times, for example 2017-10-01T00:00:00Z; repeat for an extract each",
    )
    parser.add_argument("--extract-id", help="name of the extract; a new one by default")
    parser.add_argument("--cores", type=int, help="cores of a local session; all by default")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, Any]:
        config = load_config(arguments.config)
        as_ofs = [parse_as_of(one) for one in arguments.as_of]
        if arguments.extract_id and len(as_ofs) > 1:
            raise ConfigError("--extract-id names one extract", "leave it out, or pass one --as-of")
        stamp = datetime.now(UTC).isoformat()
        names = [arguments.extract_id or new_id(one, config.history_digest(), stamp) for one in as_ofs]
        spark = get_session(f"instructue extract {config.project}", cores=arguments.cores)
        made = run_extracts(spark, config, as_ofs, extract_ids=names, reporter=reporter)
        return to_json(made[0]) if len(made) == 1 else {"extracts": [to_json(one) for one in made]}

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())

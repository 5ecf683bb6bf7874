"""The UserQA job: what users did around many cut-offs, as questions with answers.

Run it with `python -m instructue_spark.user_qa --config instructue.yaml --as-ofs 2017-04-01T00:00:00Z,... --cut ...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from instructue_feast import schema
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import ConfigError, DataError, LeakageError
from instructue_feast.generators.choose import make_generator
from instructue_feast.question_specs import AttributeSpec, ChangeSpec, QuestionSpec, UserQAConfig
from instructue_feast.runs.manifest import ExtractManifest, check_id, new_id, parse_as_of, to_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.user_qa import tables
from instructue_feast.user_qa.questions import Draft, require_distinct_wordings
from instructue_feast.user_qa.tables import SPLITS, FamilySummary, UserQAManifest
from instructue_feast.user_qa.values import answer_weights
from instructue_spark import sources
from instructue_spark.claim import claimed
from instructue_spark.io import spark_errors, spark_schema
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session, settle
from instructue_spark.user_qa_check import check_sample
from instructue_spark.user_qa_events import DAY_US, Events, check_columns, read_events, read_snapshots
from instructue_spark.user_qa_extracts import find_extracts
from instructue_spark.user_qa_generated import FAMILY, Generated, generate
from instructue_spark.user_qa_labels import Family, Labeller, Spans
from instructue_spark.windows import to_micros

_KEY = ["user_id", "i"]


def run_user_qa(
    spark: SparkSession,
    config: InstructueConfig,
    as_ofs: Sequence[datetime],
    cut: datetime,
    *,
    qa_id: str | None = None,
    extracts: Sequence[str] = (),
    reporter: Reporter,
) -> UserQAManifest:
    """Builds a UserQA data set (`instructue_feast.user_qa.tables`).

    A user is asked at an `as_of` when the packed history has at least `min_events` events. A question is answered when
    its whole window lies inside the data of its source and, if it looks ahead, ends at or before `cut`. Past answers
    use events before `as_of` only, future answers events at or after it only.

    Args:
        spark: The session; gets the settings of `session.settle`.
        config: The project, with a `user_qa` section.
        as_ofs: Points in time to ask at, with time zones.
        cut: Exclusive upper bound of everything that is looked at.
        qa_id: Name of the data set; made from its content by default.
        extracts: Finished extracts to use. For the other `as_of`s the newest fitting one is used, or a new one made.
        reporter: Gets the stages `extracts`, `events`, `answers`, `pairs`, `history`.

    Returns:
        The manifest.

    Raises:
        ConfigError: No `user_qa` section, no `as_of`, a wrong condition or id.
        LeakageError: An `as_of` lies after the cut.
        DataError: A raw table cannot be read, as `SchemaError` lacks a column; no question survives.
        VersionMismatchError: An extract was made with other history settings.
        RunConflictError: The data set exists, or somebody else is writing it.
        StorageError: Too little disk, or a write failed.
    """
    if config.user_qa is None:
        raise ConfigError("the config has no `user_qa` section", "declare question families; see docs/user_qa.md")
    moments = sorted({one.astimezone(UTC) for one in as_ofs})
    if not moments:
        raise ConfigError("no as_of given", "pass --as-ofs, or --from, --to and --every")
    if cut <= moments[0]:
        raise ConfigError(
            f"the cut {cut.isoformat()} is not after the first as_of {moments[0].isoformat()}",
            "no question about the future could be answered; move the cut or the as_ofs",
        )
    late = [one.isoformat() for one in moments if one > cut]
    if late:
        raise LeakageError(f"as_ofs after the cut {cut.isoformat()}: {late}", "leave them out, or move the cut")
    started = time.monotonic()
    store = OutputStore(config.output.path)
    store.require_free(config.output.min_free_gib)
    settle(spark)
    if qa_id is not None:
        check_id("UserQA", qa_id)
    with reporter.stage("extracts") as stage, spark_errors():
        check_columns(spark, config, config.user_qa.questions)
        found = find_extracts(spark, config, moments, extracts, store, reporter)
        stage.rows_in, stage.rows_out = len(moments), sum(one.users for one in found)
    words = json.dumps([config.history_digest(), cut.isoformat(), dataclasses.asdict(config.user_qa)], default=str)
    qa_id = qa_id or new_id(cut, words, *[one.extract_id for one in found])
    folder = ("user_qa", qa_id)
    with claimed(spark, store, *folder), spark_errors(), _caches() as caches:
        job = _Job(spark, config, config.user_qa, moments, cut.astimezone(UTC), found, store, folder, caches, reporter)
        manifest = job.run(qa_id, started)
        store.write_json(to_json(manifest), *folder, "manifest.json")
    return manifest


@dataclass(slots=True)
class _Job:
    """One data set while it is made."""

    spark: SparkSession
    config: InstructueConfig
    settings: UserQAConfig
    as_ofs: list[datetime]
    cut: datetime
    extracts: list[ExtractManifest]
    store: OutputStore
    folder: tuple[str, ...]
    caches: list[DataFrame]
    reporter: Reporter

    def run(self, qa_id: str, started: float) -> UserQAManifest:
        with self.reporter.stage("events") as stage:
            histories = self._histories()
            asked = self._asked(histories)
            events = self._events()
            stage.rows_in, stage.rows_out = len(events), asked.count()
        with self.reporter.stage("answers") as stage:
            families = self._families(asked, events)
            drafts = [draft for family in families for draft in family.drafts]
            stage.rows_in, stage.rows_out = len(families), len(drafts)
            require_distinct_wordings(drafts)
            if not drafts:
                raise DataError("no question survives", "; ".join(_why(family) for family in families))
        with self.reporter.stage("pairs") as stage:
            labels = self._labels(families)
            checked = check_sample(asked, labels, families, events)
            counts = [numbers for family in families for numbers in family.counts]
            generated = None
            if self.settings.generator.kind != "templates":
                generator = make_generator(self.settings.generator)
                generated = generate(labels, drafts, self.settings.generator, generator)
                labels = self._with_generated(labels, generated, len(drafts), sum(map(len, counts)))
                drafts, counts = drafts + generated.drafts, counts + generated.counts
            digest = self._write_questions(drafts)
            self._write_pairs(labels, counts)
            pairs = {split: _count_pairs(drafts, counts, split == "held_out") for split in SPLITS}
            stage.rows_in, stage.rows_out = len(drafts), sum(pairs.values())
        with self.reporter.stage("history") as stage:
            users = self._write_history(histories, labels)
            self._write_phrasebook()
            stage.rows_in, stage.rows_out = sum(one.users for one in self.extracts), users
        summaries = {family.spec.id: _summary(family) for family in families}
        if generated is not None:
            summaries[FAMILY] = _generated_summary(generated)
        ends = [span[2] for family in families for span in family.spans if family.drafts]
        dropped = {f"{name}: {why}": number for name, one in events.items() for why, number in one.skipped.items()}
        return UserQAManifest(
            qa_id=qa_id,
            created=datetime.now(UTC).isoformat(),
            history_digest=self.config.history_digest(),
            questions_digest=digest,
            as_ofs=[one.isoformat() for one in self.as_ofs],
            extracts=[one.extract_id for one in self.extracts],
            cut=self.cut.isoformat(),
            trained_through=(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=max(ends))).isoformat(),
            generator="templates" if generated is None else generator.name,
            num_questions=len(drafts),
            num_held_out=sum(draft.held_out for draft in drafts),
            users=users,
            pairs=pairs,
            checked=checked,
            dropped=dropped,
            families=summaries,
            seconds=round(time.monotonic() - started, 3),
        )

    def _histories(self) -> DataFrame:
        """The packed histories of all `as_of`s, with `i`."""
        parts = []
        for number, extract in enumerate(self.extracts):
            url = self.store.url("extracts", extract.extract_id, "history")
            frame = self.spark.read.schema(spark_schema(schema.PACKED_HISTORY)).parquet(url)
            parts.append(frame.select(*schema.PACKED_HISTORY.names, F.lit(number).alias("i")))
        return reduce(DataFrame.unionByName, parts)

    def _asked(self, histories: DataFrame) -> DataFrame:
        """`user_id, i` of everybody who is asked."""
        names = self.config.source_names
        counts = [F.get("num_events", names.index(name)) for name in self.config.event_sources]
        chosen = histories.where(reduce(lambda a, b: a + b, counts, F.lit(0)) >= self.settings.min_events)
        if self.settings.sample < 1:
            share = F.pmod(F.xxhash64("user_id", F.lit("asked")), F.lit(1_000_000)) / 1_000_000
            chosen = chosen.where(share < self.settings.sample)
        return self._cache(chosen.select(*_KEY))

    def _events(self) -> dict[str, Events]:
        """The event sources that any family asks about."""
        result = {}
        for name in self.config.event_sources:
            specs = [spec for spec in self.settings.questions if spec.source == name]
            if specs:
                result[name] = read_events(self.spark, name, self.config, specs, self.cut)
                self.caches.append(result[name].frame)
        return result

    def _families(self, asked: DataFrame, events: dict[str, Events]) -> list[Family]:
        lasts = [one.last_us for one in events.values() if one.last_us is not None]
        data_end = -(-(max(lasts) + 1) // DAY_US) * DAY_US if lasts else 0
        labeller, families = Labeller(asked, self.caches), []
        for number, spec in enumerate(self.settings.questions):
            if isinstance(spec, AttributeSpec):
                snapshots = read_snapshots(self.spark, self.config, spec, self.cut)
                families.append(labeller.attribute(spec, snapshots, self._moments()))
            else:
                source = events[spec.source]
                first = None if source.first_us is None else source.first_us // DAY_US * DAY_US
                spans, before = self._spans(spec, first, data_end)
                families.append(labeller.measure(spec, source, spans, before))
            self.reporter.progress("answers", number + 1, len(self.settings.questions))
        return families

    def _spans(self, spec: QuestionSpec, first: int | None, data_end: int) -> tuple[Spans, Spans]:
        """The windows of a family that the data cover whole, and for `change` the windows before them."""
        if first is None:
            return [], []
        length, cut = spec.days * DAY_US, to_micros(self.cut)
        moments = [(number, to_micros(one)) for number, one in enumerate(self.as_ofs)]
        past = [(number, at - length, at) for number, at in moments if first <= at - length and at <= data_end]
        future = [
            (number, at, at + length) for number, at in moments if first <= at and at + length <= min(cut, data_end)
        ]
        if isinstance(spec, ChangeSpec):
            both = {span[0] for span in past} & {span[0] for span in future}
            past, future = [one for one in past if one[0] in both], [one for one in future if one[0] in both]
            return future, past
        return (past, []) if spec.window == "past" else (future, [])

    def _moments(self) -> Spans:
        return [(number, to_micros(sources.EARLIEST), to_micros(one)) for number, one in enumerate(self.as_ofs)]

    def _write_questions(self, drafts: list[Draft]) -> str:
        """Writes `questions/` and `answers/`; returns the hash of both."""
        questions = pa.Table.from_pylist(
            [
                {
                    "question_id": draft.id,
                    "family": draft.family,
                    "kind": draft.kind,
                    "source": draft.source,
                    "subject": draft.subject,
                    "days": draft.days,
                    "held_out": draft.held_out,
                    "wordings": list(draft.wordings),
                    "held_out_wordings": list(draft.held_out_wordings),
                }
                for draft in drafts
            ],
            schema=tables.QUESTIONS,
        )
        texts = [(index, text) for index, draft in enumerate(drafts) for text in draft.answers]
        answers = pa.Table.from_pylist(
            [
                {"answer_id": number, "question_index": index, "text": text}
                for number, (index, text) in enumerate(texts)
            ],
            schema=tables.ANSWERS,
        )
        for name, table in (("questions", questions), ("answers", answers)):
            target = self.store.path(*self.folder, name)
            self.store.fs.makedirs(target, exist_ok=True)
            pq.write_table(table, f"{target}/part-0.parquet", filesystem=self.store.fs)
        content = json.dumps([questions.to_pylist(), answers.to_pylist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def _labels(self, families: list[Family]) -> DataFrame:
        """`user_id, i, train, held_out` of everybody with an answer, persisted; families in the order of the config."""
        parts, question, answer = [], 0, 0
        for number, family in enumerate(families):
            if family.drafts:
                parts.append(family.pairs(question, answer).withColumn("family", F.lit(number)))
                question += len(family.drafts)
                answer += sum(len(draft.answers) for draft in family.drafts)
        columns = []
        for split in SPLITS:
            # Lists come in any order; the number of the family decides before its pairs are looked at.
            ordered = F.array_sort(F.collect_list(F.struct("family", split)))
            columns.append(F.flatten(ordered[split]).alias(split))
        return self._cache(reduce(DataFrame.unionByName, parts).groupBy(*_KEY).agg(*columns))

    def _with_generated(self, labels: DataFrame, generated: Generated, question: int, answer: int) -> DataFrame:
        """The labels with the pairs of generated questions, which are numbered behind the others."""
        first = list(accumulate([answer, *map(len, generated.counts)]))
        rows = [(user, i, question + place, first[place] + one) for user, i, place, one in generated.pairs]
        frame = self.spark.createDataFrame(rows, "user_id string, i int, question int, answer int")
        more = frame.groupBy(*_KEY).agg(F.sort_array(F.collect_list(F.struct("question", "answer"))).alias("more"))
        train = F.when(F.col("more").isNull(), F.col("train")).otherwise(F.concat("train", "more"))
        return self._cache(labels.join(F.broadcast(more), _KEY, "left").withColumn("train", train).drop("more"))

    def _write_pairs(self, labels: DataFrame, counts: list[list[int]]) -> None:
        weights = F.lit([weight for numbers in counts for weight in answer_weights(numbers)]).cast("array<float>")
        moments = F.lit([to_micros(one) for one in self.as_ofs])
        for split in SPLITS:
            out = labels.where(F.size(split) > 0).select(
                "user_id",
                F.timestamp_micros(F.get(moments, F.col("i"))).alias("as_of"),
                F.col(split)["question"].alias("question_index"),
                F.col(split)["answer"].alias("answer_id"),
                F.transform(split, lambda pair: F.get(weights, pair["answer"])).alias("weight"),
            )
            out.sortWithinPartitions("as_of", "user_id").write.parquet(
                self.store.url(*self.folder, "pairs", f"split={split}")
            )

    def _write_history(self, histories: DataFrame, labels: DataFrame) -> int:
        url = self.store.url(*self.folder, "history")
        rows = histories.join(labels.select(*_KEY), _KEY, "left_semi").select(*schema.PACKED_HISTORY.names)
        rows.sortWithinPartitions("as_of", "user_id").write.parquet(url)
        return self.spark.read.parquet(url).count()

    def _write_phrasebook(self) -> None:
        urls = [self.store.url("extracts", one.extract_id, "phrasebook") for one in self.extracts]
        book = self.spark.read.schema(spark_schema(schema.PHRASEBOOK)).parquet(*urls).distinct()
        kept = self.spark.read.parquet(self.store.url(*self.folder, "history"))
        texts = kept.select(F.explode("text_id").alias("text_id")).distinct()
        book.join(texts, "text_id", "left_semi").select(*schema.PHRASEBOOK.names).write.parquet(
            self.store.url(*self.folder, "phrasebook")
        )

    def _cache(self, frame: DataFrame) -> DataFrame:
        self.caches.append(frame.persist(StorageLevel.MEMORY_AND_DISK))
        return self.caches[-1]


def _count_pairs(drafts: list[Draft], counts: list[list[int]], held_out: bool) -> int:
    return sum(sum(mine) for draft, mine in zip(drafts, counts, strict=True) if draft.held_out == held_out)


def _why(family: Family) -> str:
    return f"{family.spec.id}: {', '.join(family.dropped) or 'no question'}"


def _summary(family: Family) -> FamilySummary:
    pairs = sum(map(sum, family.counts))
    return FamilySummary(
        kind=family.spec.kind,
        source=family.spec.source,
        days=family.spec.signed_days,
        questions=len(family.drafts),
        held_out=sum(draft.held_out for draft in family.drafts),
        pairs=pairs,
        first_rate=round(sum(numbers[0] for numbers in family.counts) / pairs, 6) if pairs else 0.0,
        edges=family.edges,
        dropped=family.dropped,
    )


def _generated_summary(generated: Generated) -> FamilySummary:
    pairs = len(generated.pairs)
    return FamilySummary(
        kind=FAMILY,
        source="",
        days=0,
        questions=len(generated.drafts),
        held_out=0,
        pairs=pairs,
        first_rate=round(sum(numbers[0] for numbers in generated.counts) / pairs, 6) if pairs else 0.0,
        dropped=generated.dropped,
    )


@contextmanager
def _caches() -> Iterator[list[DataFrame]]:
    """Unpersists the frames put into the list, unless the process is being stopped (see `extract`)."""
    frames: list[DataFrame] = []
    try:
        yield frames
    except Exception:
        for frame in frames:
            frame.unpersist()
        raise
    for frame in frames:
        frame.unpersist()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job from the command line; JSON lines on standard output.

    Returns:
        The exit code: 0, or the `exit_code` of the error that was reported.
    """
    parser = argparse.ArgumentParser(prog="python -m instructue_spark.user_qa", description=__doc__)
    parser.add_argument("--config", required=True, help="the project's instructue.yaml")
    parser.add_argument("--as-ofs", required=True, help="points in time to ask at, separated by commas")
    parser.add_argument("--cut", required=True, help="exclusive upper bound of everything that is looked at")
    parser.add_argument("--extracts", default="", help="finished extracts to use, separated by commas")
    parser.add_argument("--qa-id", help="name of the data set; made from its content by default")
    parser.add_argument("--cores", type=int, help="cores of a local session; all by default")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, Any]:
        config = load_config(arguments.config)
        as_ofs = [parse_as_of(one) for one in arguments.as_ofs.split(",") if one]
        extracts = [one for one in arguments.extracts.split(",") if one]
        spark = get_session(f"instructue qa {config.project}", cores=arguments.cores)
        cut = parse_as_of(arguments.cut)
        manifest = run_user_qa(spark, config, as_ofs, cut, qa_id=arguments.qa_id, extracts=extracts, reporter=reporter)
        return to_json(manifest)

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())

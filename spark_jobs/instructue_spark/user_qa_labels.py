"""What users did in a window, as the answers to one question family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from instructue_feast.history.render import normalise
from instructue_feast.question_specs import (
    AmountSpec,
    AttributeSpec,
    ChangeSpec,
    FavouriteSpec,
    InactiveSpec,
    MeasuredSpec,
    OccursSpec,
    QuestionSpec,
)
from instructue_feast.user_qa.questions import Draft, draft_question, is_held_out, subject_text
from instructue_feast.user_qa.tables import SPLITS
from instructue_feast.user_qa.values import round_edges
from instructue_spark.user_qa_events import Events, in_windows, latest

Spans = Sequence[tuple[int, int, int]]
"""`(i, start, end)` in microseconds; `i` numbers the `as_of`s."""

DECIMALS = 6
"""Measures are rounded to this before they are compared: sums of floats depend on their order in the last digits."""

_KEY = ["user_id", "i"]
_ACCURACY = 100_000
_PAIRS = "array<struct<question:int,answer:int>>"


@dataclass(slots=True)
class Family:
    """One measured question family.

    Attributes:
        spec: Its spec.
        frame: `user_id, i, answer` for one question; `user_id, i, yes` (positions of `drafts` answered yes) for
            `occurs` with a subject. One row per asked user and `as_of`.
        drafts: Its questions.
        counts: Per question, how often each answer occurs.
        spans: Windows that were asked about.
        before: For `change`, the window before each, by `i`.
        places: Subject or value to the place of its question or answer.
        snapshots: For `attribute`, `user_id, t, row_hash, value`.
        edges: Lowest value of each level but the first.
        dropped: Questions refused, by reason.
    """

    spec: QuestionSpec
    frame: DataFrame | None = None
    drafts: list[Draft] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    spans: Spans = ()
    before: dict[int, tuple[int, int]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    snapshots: DataFrame | None = None
    edges: list[float] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def moments(self) -> dict[int, tuple[int, int]]:
        """Start and end of each window by `i`."""
        return {i: (start, end) for i, start, end in self.spans}

    def drop(self, reason: str, number: int = 1) -> None:
        """Counts refused questions."""
        self.dropped[reason] = self.dropped.get(reason, 0) + number

    def pairs(self, question: int, answer: int) -> DataFrame:
        """The answers, numbered, in the order of the questions that were answered yes, then the others.

        Args:
            question: Index of the family's first question.
            answer: Id of its first answer.

        Returns:
            `user_id, i, train, held_out`, the pairs of the two splits.
        """
        assert self.frame is not None
        columns = []
        for split in SPLITS:
            mine = [place for place, draft in enumerate(self.drafts) if draft.held_out == (split == "held_out")]
            if not mine:
                pairs = F.array()
            elif "answer" in self.frame.columns:
                pairs = F.array(F.struct(F.lit(question), F.lit(answer) + F.col("answer")))
            else:
                # Set operations hash; looking every question up in `yes` would compare all with all.
                every = F.lit(mine)
                yes, no = F.sort_array(F.array_intersect("yes", every)), F.array_except(every, F.col("yes"))
                pairs = F.concat(
                    F.transform(yes, lambda one: F.struct(F.lit(question) + one, F.lit(answer) + 2 * one)),
                    F.transform(no, lambda one: F.struct(F.lit(question) + one, F.lit(answer + 1) + 2 * one)),
                )
            columns.append(pairs.cast(_PAIRS).alias(split))
        return self.frame.select(*_KEY, *columns)


class Labeller:
    """Measures families over one source; keeps what it caches.

    Args:
        asked: `user_id, i`: who is asked when.
        caches: Frames to unpersist in the end.
    """

    def __init__(self, asked: DataFrame, caches: list[DataFrame]) -> None:
        self._asked, self._caches = asked, caches

    def measure(self, spec: QuestionSpec, events: Events, spans: Spans, before: Spans = ()) -> Family:
        """Answers every question of a family over events.

        Args:
            spec: Any kind but `attribute`.
            events: Its source.
            spans: Windows to ask about.
            before: For `change`, the window before each of them.
        """
        family = Family(spec, spans=spans, before={i: (start, end) for i, start, end in before})
        if not spans:
            family.drop("no window lies inside the data and before the cut")
            return family
        asked = self._asked.where(F.col("i").isin([span[0] for span in spans]))
        if isinstance(spec, OccursSpec) and spec.subject is not None:
            self._subjects(family, spec, events, asked)
        elif isinstance(spec, OccursSpec | InactiveSpec):
            names = events.columns[spec.id]
            seen = in_windows(events, spans, names).select(*_KEY).distinct().withColumn("seen", F.lit(True))
            no = F.col("seen").isNull() if isinstance(spec, OccursSpec) else F.col("seen").isNotNull()
            rows = asked.join(seen, _KEY, "left").select(*_KEY, no.cast("int").alias("answer"))
            self._single(family, rows, draft_question(spec))
        elif isinstance(spec, AmountSpec):
            self._amount(family, spec, asked.join(self._measured(spec, events, spans), _KEY, "left"))
        elif isinstance(spec, ChangeSpec):
            self._change(family, spec, events, before, asked)
        else:
            assert isinstance(spec, FavouriteSpec)
            self._favourite(family, spec, events, asked)
        return family

    def attribute(self, spec: AttributeSpec, snapshots: DataFrame, spans: Spans) -> Family:
        """Answers an `attribute` family from `read_snapshots`."""
        family = Family(spec, spans=spans, snapshots=self._cache(snapshots))
        values = latest(snapshots, spans).where("value is not null")
        rows = self._cache(values.join(self._asked, _KEY))
        common = _most_common(rows, "value", spec.max_values)
        self._closed(family, rows, {value: normalise(value) for value in common})
        return family

    def _subjects(self, family: Family, spec: OccursSpec, events: Events, asked: DataFrame) -> None:
        windows = in_windows(events, family.spans, events.columns[spec.id]).where("subject is not null")
        yes = self._cache(windows.distinct().join(asked, _KEY))
        total = asked.count()
        low, high = spec.min_rate * total, spec.max_rate * total
        rates = yes.groupBy("subject").count()
        frequent = rates.where((F.col("count") >= low) & (F.col("count") <= high) & (F.col("count") < total))
        rows = frequent.orderBy(F.desc("count"), "subject").limit(spec.max_subjects).collect()
        if not rows:
            family.drop("no subject has a rate between min_rate and max_rate")
            return
        texts: dict[str, list[str]] = {}
        for row in rows:
            texts.setdefault(subject_text(row["subject"]), []).append(row["subject"])
        family.drafts = [draft_question(spec, subject=keys[0]) for keys in texts.values()]
        counts = {row["subject"]: int(row["count"]) for row in rows}
        places = [(key, place) for place, keys in enumerate(texts.values()) for key in keys]
        family.places = dict(places)
        mapping = F.broadcast(asked.sparkSession.createDataFrame(places, "subject string, place int"))
        placed = yes.join(mapping, "subject")
        if len(places) > len(texts):  # several spellings of one text: a user may have more than one of them
            again = placed.groupBy("place").agg(F.count_distinct(*_KEY).alias("n")).collect()
            number = {int(row["place"]): int(row["n"]) for row in again}
        else:
            number = {place: counts[key] for key, place in places}
        family.counts = [[number[place], total - number[place]] for place in range(len(texts))]
        sets = placed.groupBy(*_KEY).agg(F.collect_set("place").alias("yes"))
        empty = F.array().cast("array<int>")
        family.frame = asked.join(sets, _KEY, "left").select(*_KEY, F.coalesce("yes", empty).alias("yes"))

    def _measured(self, spec: MeasuredSpec, events: Events, spans: Spans, *more: str) -> DataFrame:
        """`user_id, i, x` and the columns of `more` that it is grouped by."""
        rows = in_windows(events, spans, events.columns[spec.id])
        for one in more:
            rows = rows.where(F.col(one).isNotNull())
        return rows.groupBy(*_KEY, *more).agg(F.round(_MEASURES[spec.measure](), DECIMALS).alias("x"))

    def _amount(self, family: Family, spec: AmountSpec, rows: DataFrame) -> None:
        rows = rows.withColumn("x", F.coalesce("x", F.lit(0.0))) if spec.measure in _ZERO_WHEN_NONE else rows
        rows = self._cache(rows.where("x is not null"))
        draft = draft_question(spec)
        family.edges = list(spec.edges)
        if not family.edges:
            shares = [place / len(draft.answers) for place in range(1, len(draft.answers))]
            measures = (F.percentile_approx("x", shares, _ACCURACY), F.min("x"), F.max("x"))
            found, low, high = rows.agg(*measures).collect()[0]
            if found is None:
                family.drop("nobody can be asked")
                return
            family.edges = round_edges(found)
            # An edge at the smallest value, or above the largest, leaves a level that is nobody's answer.
            if len(set(family.edges)) < len(draft.answers) - 1 or family.edges[0] <= low or family.edges[-1] > high:
                family.drop("quantiles coincide: give `edges`")
                return
        level = sum((F.when(F.col("x") >= F.lit(edge), 1).otherwise(0) for edge in family.edges), F.lit(0))
        self._single(family, rows.select(*_KEY, level.cast("int").alias("answer")), draft)

    def _change(self, family: Family, spec: ChangeSpec, events: Events, before: Spans, asked: DataFrame) -> None:
        old = self._measured(spec, events, before).where("x > 0").withColumnRenamed("x", "old")
        rows = asked.join(old, _KEY).join(self._measured(spec, events, family.spans), _KEY, "left")
        rows = rows.withColumn("x", F.coalesce("x", F.lit(0.0))) if spec.measure in _ZERO_WHEN_NONE else rows
        ratio = F.round(F.col("x") / F.col("old"), DECIMALS)
        draft = draft_question(spec)
        down, up = ratio <= F.lit(1 - spec.threshold), ratio >= F.lit(1 + spec.threshold)
        answer = F.when(down, 0).otherwise(1) if len(draft.answers) == 2 else F.when(down, 0).when(up, 2).otherwise(1)
        self._single(family, rows.where("x is not null").select(*_KEY, answer.alias("answer")), draft)

    def _favourite(self, family: Family, spec: FavouriteSpec, events: Events, asked: DataFrame) -> None:
        scores = self._measured(spec, events, family.spans, "subject").where("x is not null")
        if spec.exclude:
            scores = scores.where(~F.col("subject").isin([one.lower() for one in spec.exclude]))
        best = scores.groupBy(*_KEY).agg(F.min_by("subject", F.struct(-F.col("x"), "subject")).alias("value"))
        rows = self._cache(best.join(asked, _KEY))
        # An answer that names a held-out subject would teach about it; who has it as favourite is not asked.
        common = _most_common(rows, "value", 2 * spec.max_values + 50)
        texts = {value: value if spec.clock else subject_text(value) for value in common}
        kept = [(value, text) for value, text in texts.items() if spec.clock or not is_held_out(text)]
        self._closed(family, rows, dict(kept[: spec.max_values]))

    def _closed(self, family: Family, rows: DataFrame, texts: dict[str, str]) -> None:
        """A question answered from the given values; users with another one are not asked."""
        if len(set(texts.values())) < 2:
            family.drop("one answer only")
            return
        options = list(dict.fromkeys(texts.values()))
        places = [(value, options.index(text)) for value, text in texts.items()]
        family.places = dict(places)
        mapping = F.broadcast(rows.sparkSession.createDataFrame(places, "value string, answer int"))
        answers = rows.join(mapping, "value").select(*_KEY, "answer")
        self._single(family, answers, draft_question(family.spec, values=options))

    def _single(self, family: Family, rows: DataFrame, draft: Draft) -> None:
        rows = self._cache(rows)
        found = {int(row["answer"]): int(row["count"]) for row in rows.groupBy("answer").count().collect()}
        counts = [found.get(place, 0) for place in range(len(draft.answers))]
        if sum(count > 0 for count in counts) < 2:
            family.drop("one answer only" if sum(counts) else "nobody can be asked")
            return
        family.frame, family.drafts, family.counts = rows, [draft], [counts]

    def _cache(self, frame: DataFrame) -> DataFrame:
        self._caches.append(frame.persist(StorageLevel.MEMORY_AND_DISK))
        return self._caches[-1]


_ZERO_WHEN_NONE = ("count", "sum", "distinct")
_MEASURES = {
    "count": lambda: F.count("*").cast("double"),
    "sum": lambda: F.coalesce(F.sum("value"), F.lit(0.0)),
    "mean": lambda: F.avg("value"),
    "share": lambda: F.avg("value"),
    "distinct": lambda: F.count_distinct("key").cast("double"),
    "sum_per": lambda: F.sum("value") / F.nullif(F.count_distinct("key"), F.lit(0)),
}


def _most_common(rows: DataFrame, name: str, limit: int) -> list[str]:
    found = rows.groupBy(name).count().orderBy(F.desc("count"), name).limit(limit).collect()
    return [row[name] for row in found]

"""A synthetic data set: six sources of users whose interests, rhythm and activity are known.

Everything is an expression over `xxhash64(seed, purpose, user, number)`, so the same seed gives the same rows however
Spark cuts the work, and the first N users are the same in every larger set. Nothing runs in Python per row.

Two tables are for evaluation alone: `truth` (`user_id`, `strengths`, `top_interest`, `rhythm`, `cold`) says what is
latent in a user, `vocabulary` (`interest`, `word`) which texts are about an interest: those that contain a word of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from instructue_feast.errors import ConfigError
from instructue_feast.files import replacing
from instructue_spark.io import spark_errors
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session
from instructue_spark.synthetic_words import ACTIONS, APP_ACTIONS, BLOCKS, INTERESTS, MODIFIERS, NOISE, vocabulary

END = datetime(2025, 6, 1, tzinfo=UTC)
RHYTHMS = ("morning", "evening", "weekend")
SHARES = {"bill": 0.28, "mini_program": 0.2, "spm": 0.3, "app": 0.07, "search": 0.15}
"""How a user's events spread over the event sources."""

COLD = 0.03  # users without any event
WHALES = 0.001  # users with 2,000 to 5,000 events
NOISE_SHARE = 0.3  # events that belong to no interest
LATE = 0.05  # events that arrive up to five days after they happened
DUPLICATES = 0.02  # events delivered twice under the same id
FAULTS = 0.0005  # rows without user; as many with an impossible time; as many with a broken amount

_DAY = 86_400
_STRENGTHS = (1.0, 0.6, 0.4)


@dataclass(frozen=True, slots=True)
class _Hash:
    """Pseudo-random numbers as columns."""

    seed: int

    def unit(self, purpose: str, *keys: Column) -> Column:
        """Uniform in [0, 1), the same for the same seed, purpose and keys."""
        bits = F.shiftrightunsigned(F.xxhash64(F.lit(f"{self.seed}:{purpose}"), *keys), 11)
        return bits.cast("double") * F.lit(2.0**-53)

    def normal(self, purpose: str, *keys: Column) -> Column:
        """Standard normal, by Box and Muller."""
        radius = F.sqrt(-2.0 * F.log(1.0 - self.unit(f"{purpose}/radius", *keys)))
        return radius * F.cos(F.lit(6.283185307179586) * self.unit(f"{purpose}/angle", *keys))


def write_synthetic(
    spark: SparkSession,
    folder: Path,
    *,
    users: int,
    seed: int,
    days: int = 120,
    end: datetime = END,
    partitions: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Writes the raw tables of the synthetic data set to `folder/raw`.

    The tables are `bill`, `mini_program`, `spm`, `app`, `search` (events), `tabular` (a snapshot every 30 days),
    `users` (the roster), `truth` (what is latent: strength of each interest, rhythm; never an input) and `vocabulary`
    (the words of each interest, which say what a text is about; never an input). Tables that are there already stay
    until the new ones are complete.

    Args:
        spark: A session in UTC.
        folder: The project's folder, local.
        users: How many users; about 30 events each, 3% without any.
        seed: Another seed gives other rows.
        days: How far back events go.
        end: Exclusive upper bound on event time: midnight UTC.
        partitions: Files per table; never changes a row.
        reporter: Where progress goes.

    Returns:
        `dataset`, `folder`, `users`, `seed`, `days`, `as_of` and `rows` by table.

    Raises:
        ConfigError: A number out of range, or `end` is not midnight UTC.
        StorageError: The disk is full or the folder not writable.

    Example:
        `write_synthetic(spark, Path("build/synthetic"), users=10_000, seed=0)`
    """
    if users < 1 or days < 1:
        raise ConfigError(f"{users} users over {days} days asked for", "ask for at least one user and one day")
    if end.tzinfo is None or end.timestamp() % _DAY:
        raise ConfigError(f"end {end.isoformat()} is not midnight UTC", "write it as 2025-06-01T00:00:00Z")
    reporter = reporter or Reporter(None)
    maker = _Maker(_Hash(seed), int(end.timestamp()) - days * _DAY, days)
    partitions = partitions or max(spark.sparkContext.defaultParallelism, users // 50_000)
    people = maker.people(spark.range(0, users, 1, partitions))
    tables: dict[str, DataFrame] = {
        "users": people.select("user_id"),
        "truth": people.select("user_id", "strengths", "top_interest", "rhythm", "cold"),
        **{name: maker.events(people, name) for name in SHARES},
        "tabular": maker.tabular(people),
        "vocabulary": _vocabulary(spark),
    }
    rows: dict[str, int] = {}
    with replacing(folder / "raw") as scratch, spark_errors():
        for name, table in tables.items():
            with reporter.stage(name) as stage:
                table.write.parquet((scratch / name).resolve().as_uri())
                files = (scratch / name).glob("*.parquet")
                rows[name] = stage.rows_out = sum(pq.read_metadata(file).num_rows for file in files)
                stage.rows_in = rows[name] if name == "vocabulary" else users
    return {
        "dataset": "synthetic",
        "folder": str(folder),
        "users": users,
        "seed": seed,
        "days": days,
        "as_of": end.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "rows": rows,
    }


@dataclass(frozen=True, slots=True)
class _Maker:
    """Builds the tables.

    Attributes:
        random: The pseudo-random numbers.
        start: First moment of the data, in seconds since the epoch.
        days: Length of the data.
    """

    random: _Hash
    start: int
    days: int

    def people(self, ids: DataFrame) -> DataFrame:
        """One row per user with all that is latent."""
        user = F.col("id")
        draw = self.random.unit
        ranked = F.array_sort(
            F.transform(
                F.sequence(F.lit(0), F.lit(len(INTERESTS) - 1)),
                lambda i: F.struct(self.random.unit("interest", user, i).alias("at"), i.alias("interest")),
            )
        )
        activity = F.floor(F.exp(F.lit(2.8) + self.random.normal("activity", user)))
        whale = F.floor(F.lit(2000) + 3000 * draw("whale size", user))
        strengths = [
            F.when(F.col("first") == i, _STRENGTHS[0])
            .when((F.col("second") == i) & (F.col("strong") >= 2), _STRENGTHS[1])
            .when((F.col("third") == i) & (F.col("strong") >= 3), _STRENGTHS[2])
            .otherwise(0.0)
            for i in range(len(INTERESTS))
        ]
        return (
            ids.withColumn("ranked", ranked)
            .select(
                "id",
                F.format_string("u%08d", user).alias("user_id"),
                *(F.col("ranked")[i]["interest"].alias(name) for i, name in enumerate(("first", "second", "third"))),
                F.when(draw("strong", user) < 0.4, 1).when(draw("strong", user) < 0.8, 2).otherwise(3).alias("strong"),
                F.floor(draw("rhythm", user) * len(RHYTHMS)).cast("int").alias("beat"),
                (draw("cold", user) < COLD).alias("cold"),
                F.when(draw("cold", user) < COLD, 0)
                .when(draw("whale", user) < WHALES, whale)
                .otherwise(F.greatest(F.lit(1), F.least(activity, F.lit(2000))))
                .cast("int")
                .alias("activity"),
            )
            .withColumn("strengths", F.array(*strengths))
            .withColumn("top_interest", _pick(list(INTERESTS), F.col("first")))
            .withColumn("rhythm", _pick(list(RHYTHMS), F.col("beat")))
        )

    def events(self, people: DataFrame, source: str) -> DataFrame:
        """The raw table of an event source, with late, duplicate and broken rows."""
        expected = F.col("activity") * SHARES[source]
        count = F.floor(expected + self.random.unit(f"{source}/count", F.col("id"))).cast("int")
        # Nobody but the cold is without events: paths are what everybody leaves.
        count = F.when(F.col("activity") > 0, F.greatest(count, F.lit(int(source == "spm")))).otherwise(0)

        def draw(purpose: str) -> Column:
            return self.random.unit(f"{source}/{purpose}", F.col("id"), F.col("number"))

        fault = draw("fault")
        delay = F.when(draw("late") < LATE, draw("delay") * 5 * _DAY).otherwise(draw("delay") * 60)
        copies = F.when(draw("duplicate") < DUPLICATES, F.array(F.lit(0), F.lit(1))).otherwise(F.array(F.lit(0)))
        events = (
            people.withColumn("count", count)
            .filter(F.col("count") > 0)
            .withColumn("number", F.explode(F.sequence(F.lit(1), F.col("count"))))
            .withColumn("interest", self._interest(draw))
            .withColumn("day", self._day(draw))
            .withColumn("second", self._second(draw))
            .withColumn("happened", F.lit(self.start) + F.col("day") * _DAY + F.col("second"))
        )
        columns = _CONTENT[source](self, draw)
        if source == "bill":
            broken = (fault >= 2 * FAULTS) & (fault < 3 * FAULTS)
            worst = F.when(draw("worst") < 0.5, float("nan")).otherwise(float("inf"))
            columns["amount"] = F.when(broken, worst).otherwise(columns["amount"])
        impossible = F.when(draw("worst") < 0.5, F.lit("1900-01-01 00:00:00").cast("timestamp"))
        return events.select(
            F.when(fault < FAULTS, None).otherwise(F.col("user_id")).alias("user_id"),
            F.concat_ws("-", F.lit(source), F.col("user_id"), F.col("number")).alias("event_id"),
            F.when((fault >= FAULTS) & (fault < 2 * FAULTS), impossible)
            .otherwise(F.timestamp_seconds(F.col("happened")))
            .alias("event_time"),
            F.col("happened"),
            F.floor(delay).alias("delay"),
            F.explode(copies).alias("copy"),
            *(column.alias(name) for name, column in columns.items()),
        ).select(
            "user_id",
            "event_id",
            "event_time",
            F.timestamp_seconds(F.col("happened") + F.col("delay") + 5 * F.col("copy")).alias("arrived_at"),
            *columns,
        )

    def _interest(self, draw: Callable[[str], Column]) -> Column:
        """Number of the event's interest; -1 for an event that belongs to none."""
        one, two, three = _STRENGTHS
        strong = F.col("strong")
        total = one + F.when(strong >= 2, two).otherwise(0.0) + F.when(strong >= 3, three).otherwise(0.0)
        point = draw("weight") * total
        chosen = F.when(point < one, F.col("first")).when(point < one + two, F.col("second")).otherwise(F.col("third"))
        passing = F.floor(draw("passing") * len(INTERESTS)).cast("int")
        return (
            F.when(draw("kind") < NOISE_SHARE, -1)
            .when(draw("kind") < NOISE_SHARE + 0.08, passing)  # a whim: anybody looks at anything now and then
            .otherwise(chosen)
        )

    def _day(self, draw: Callable[[str], Column]) -> Column:
        """Day of the event; weekend people move four of five events to the weekend of that week."""
        day = F.floor(draw("day") * self.days).cast("int")
        moved = day + 5 + F.floor(draw("weekend day") * 2).cast("int") - self._weekday(day)
        moved = F.greatest(F.lit(0), F.when(moved >= self.days, moved - 7).otherwise(moved))
        return F.when((F.col("beat") == 2) & (draw("weekend") < 0.8), moved).otherwise(day)

    def _weekday(self, day: Column) -> Column:
        return (day + datetime.fromtimestamp(self.start, UTC).weekday()) % 7

    def _second(self, draw: Callable[[str], Column]) -> Column:
        """Second of the day, around the user's hour; one event in seven comes at any time."""
        peak = F.when(F.col("beat") == 0, 8.0).when(F.col("beat") == 1, 20.5).otherwise(14.0)
        width = F.when(F.col("beat") == 2, 5.0).otherwise(3.0)
        hour = peak + width * (draw("hour") + draw("other hour") - 1.0)
        return F.floor(F.when(draw("any hour") < 1 / 7, 24.0 * draw("hour")).otherwise(hour) * 3600).cast("int")

    def _word(self, field: str, draw: Callable[[str], Column]) -> Column:
        """A word of the event's interest; the first words of a list are the common ones."""
        groups = [*(getattr(words, field) for words in INTERESTS.values()), getattr(NOISE, field)]
        offsets = [sum(len(group) for group in groups[:i]) for i in range(len(groups))]
        row = F.when(F.col("interest") < 0, len(INTERESTS)).otherwise(F.col("interest"))
        size = _pick([len(group) for group in groups], row)
        within = F.floor(F.pow(draw(field), 1.5) * size).cast("int")
        return _pick([word for group in groups for word in group], _pick(offsets, row) + within)

    def _bill(self, draw: Callable[[str], Column]) -> dict[str, Column]:
        typical = [words.spend for words in (*INTERESTS.values(), NOISE)]
        row = F.when(F.col("interest") < 0, len(INTERESTS)).otherwise(F.col("interest"))
        # The sum of four uniforms is close enough to a normal.
        spread = reduce(lambda a, b: a + b, [draw(f"amount {i}") for i in range(4)]) - 2.0
        amount = F.greatest(F.lit(0.01), F.round(_pick(typical, row) * F.exp(1.6 * spread), 2))
        return {"merchant_category": self._word("merchants", draw), "amount": amount}

    def _mini_program(self, draw: Callable[[str], Column]) -> dict[str, Column]:
        hour = F.floor(F.col("second") / 3600)
        part = F.when((hour >= 5) & (hour < 11), "morning").when((hour >= 11) & (hour < 17), "afternoon")
        part = part.when((hour >= 17) & (hour < 22), "evening").otherwise("night")
        kind = F.when(self._weekday(F.col("day")) >= 5, "weekend").otherwise("weekday")
        return {
            "service": self._word("services", draw),
            "action": _pick(list(ACTIONS), F.floor(F.pow(draw("action"), 2.0) * len(ACTIONS)).cast("int")),
            "day_part": F.concat_ws(" ", kind, part),
        }

    def _spm(self, draw: Callable[[str], Column]) -> dict[str, Column]:
        site = _pick([*INTERESTS, "main"], F.when(F.col("interest") < 0, len(INTERESTS)).otherwise(F.col("interest")))
        block = _pick(list(BLOCKS), F.floor(draw("block") * len(BLOCKS)).cast("int"))
        position = (1 + F.floor(F.pow(draw("position"), 2.0) * 4)).cast("string")
        return {"page_path": F.concat_ws(".", site, self._word("pages", draw), block, position)}

    def _app(self, draw: Callable[[str], Column]) -> dict[str, Column]:
        action = F.floor(F.pow(draw("action"), 3.0) * len(APP_ACTIONS)).cast("int")
        return {"app_name": self._word("apps", draw), "action": _pick(list(APP_ACTIONS), action)}

    def _search(self, draw: Callable[[str], Column]) -> dict[str, Column]:
        modifier = _pick(list(MODIFIERS), F.floor(draw("modifier") * len(MODIFIERS)).cast("int"))
        return {"query": F.concat(self._word("topics", draw), modifier)}

    def tabular(self, people: DataFrame) -> DataFrame:
        """A snapshot every 30 days of nine users in ten; noisy readings, with some values missing."""
        end = self.start + self.days * _DAY
        stamps = [end - 1 - 30 * _DAY * i for i in range((self.days + 29) // 30)]
        user, at = F.col("id"), F.col("at")

        def draw(purpose: str, *keys: Column) -> Column:
            return self.random.unit(f"tabular/{purpose}", user, *keys)

        def one_of(purpose: str, values: Sequence[str]) -> Column:
            return _pick(list(values), F.floor(draw(purpose) * len(values)).cast("int"))

        per_month = F.col("activity") / F.lit(max(1.0, self.days / 30))
        active_days = F.least(F.lit(30), F.floor(per_month * (0.4 + 0.8 * draw("active days", at)))).cast("int")
        level = F.when(F.col("activity") > 60, "gold").when(F.col("activity") > 20, "silver").otherwise("basic")
        balance = F.round(F.exp(F.lit(5.0) + 3.0 * draw("wealth") + 0.5 * draw("balance", at)), 2)
        return (
            people.filter(draw("present") >= 0.1)
            .withColumn("at", F.explode(F.array(*(F.lit(stamp) for stamp in stamps))))
            .select(
                "user_id",
                F.timestamp_seconds(at).alias("snapshot_time"),
                one_of("age", ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")).alias("age_band"),
                F.when(draw("no city") >= 0.05, one_of("city", ("tier 1", "tier 2", "tier 3"))).alias("city_tier"),
                level.alias("membership_level"),
                F.when(draw("no balance", at) >= 0.03, balance).alias("balance"),
                F.floor(350 + 600 * draw("credit")).cast("int").alias("credit_score"),
                active_days.alias("active_days_30d"),
                F.floor((at - end) / _DAY + self.days + 10 + 3000 * draw("tenure")).cast("int").alias("tenure_days"),
                F.floor(F.exp(5 * draw("friends"))).cast("int").alias("friends"),
            )
        )


_CONTENT: dict[str, Callable[[_Maker, Callable[[str], Column]], dict[str, Column]]] = {
    "bill": _Maker._bill,
    "mini_program": _Maker._mini_program,
    "spm": _Maker._spm,
    "app": _Maker._app,
    "search": _Maker._search,
}


def _vocabulary(spark: SparkSession) -> DataFrame:
    """One row per interest and word, the words as they stand in event texts, in lower case."""
    rows = [(interest, word) for interest, words in INTERESTS.items() for word in vocabulary(interest, words)]
    return spark.createDataFrame(rows, "interest string, word string").coalesce(1)


def _pick(values: Sequence[str] | Sequence[int] | Sequence[float], position: Column) -> Column:
    """The value at a position that starts at 0."""
    return F.array(*(F.lit(value) for value in values))[position]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m instructue_spark.synthetic`."""
    parser = argparse.ArgumentParser(description="Write the raw tables of the synthetic data set.")
    parser.add_argument("--out", required=True, type=Path, help="project folder; tables go to its raw/")
    parser.add_argument("--users", type=int, default=10_000, help="how many users (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rows (default: 0)")
    parser.add_argument("--days", type=int, default=120, help="how far back events go (default: 120)")
    parser.add_argument("--cores", type=int, help="local cores; default: all")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, Any]:
        spark = get_session("instructue synthetic data", cores=arguments.cores)
        return write_synthetic(
            spark, arguments.out, users=arguments.users, seed=arguments.seed, days=arguments.days, reporter=reporter
        )

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())

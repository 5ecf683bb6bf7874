"""What must not change an answer: the future of a past question, the past of a future one, all from the cut on."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import DataError
from instructue_feast.user_qa.dataset import UserQA
from instructue_feast.user_qa.tables import SPLITS
from tests.oracles.lake import (
    AS_OF,
    Tables,
    event_source,
    random_events,
    random_snapshots,
    tabular_source,
    write_config,
    write_lake,
)
from tests.spark.test_user_qa_oracle import ABOUT, DAY, YES_NO, answers_of, build, family, load

pytestmark = pytest.mark.spark

MOMENT = AS_OF - 10 * DAY
CUT = AS_OF - 2 * DAY
TICK = dt.timedelta(microseconds=1)
SUBJECTS = {"subject": "word", **ABOUT, "yes": "Yes {subject}", "no": "No {subject}"}
FUTURE = [
    family("has", "occurs", **SUBJECTS),
    family("gone", "inactive", days=1, **YES_NO),
    family("much", "amount", measure="sum", column="amount", edges=[2.0], levels=["low", "high"]),
    family("next", "favourite", subject="word", answer="{value}"),
]
PAST = [
    family("had", "occurs", window="past", **SUBJECTS),
    family("often", "amount", window="past", levels=["low", "high"], edges=[3]),
    family("best", "favourite", window="past", subject="word", answer="{value}"),
    family("city", "attribute", "profile", column="city", answer="{value}"),
]


def make_tables() -> Tables:
    rng = random.Random(5)
    return {"bill": random_events(rng, 350, users=8), "profile": random_snapshots(rng, 60, users=8)}


def with_events(tables: Tables, moments: list[dt.datetime]) -> Tables:
    """Adds a new, loud event of every user at each of the moments."""
    users = [str(number) for number in range(8)]
    words = ["coffee", "tea", "brand new"]
    rows = [
        {"user": user, "at": at, "id": 10**6 + number * 100 + place, "word": words[(number + place) % 3],
         "amount": 1e6, "level": 5, "flag": True}
        for number, user in enumerate(users)
        for place, at in enumerate(moments)
    ]  # fmt: skip
    more = pa.Table.from_pylist(rows, schema=tables["bill"].schema)
    return {**tables, "bill": pa.concat_tables([more, tables["bill"]])}


def config_of(folder: Path, tables: Tables, families: list[dict[str, Any]]) -> InstructueConfig:
    write_lake(folder, tables)
    sources = {"bill": event_source("bill"), "profile": tabular_source("profile")}
    return write_config(folder, sources, user_qa={"questions": families})


def everything(spark: SparkSession, folder: Path, tables: Tables, families: list[dict[str, Any]]) -> tuple[Any, ...]:
    """All that a data set says: questions, answers, weights, histories."""
    config = config_of(folder, tables, families)
    build(spark, config, [MOMENT], CUT)
    loaded: list[UserQA] = []
    for split in SPLITS:
        try:
            loaded.append(load(config, split))
        except DataError:  # no subject of these few is held out
            continue
    histories = {
        user: (qa.history.take([row]).text_id.tolist(), qa.history.take([row]).age_bucket.tolist())
        for qa in loaded
        for row, user in enumerate(qa.history.user_ids)
    }
    return loaded[0].questions, loaded[0].answers, [answers_of(qa) for qa in loaded], histories


@pytest.fixture(scope="module")
def base(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return everything(spark, tmp_path_factory.mktemp("base"), make_tables(), FUTURE + PAST)


def test_nothing_at_or_after_the_cut_changes_anything(spark: SparkSession, base: tuple[Any, ...], tmp_path: Path):
    tables = with_events(make_tables(), [CUT, CUT + TICK, CUT + DAY])
    late = tables["profile"].slice(0, 12).to_pylist()
    for number, row in enumerate(late):
        row |= {"user": str(number % 8), "since": CUT + number * TICK, "city": "coffee"}
    more = pa.Table.from_pylist(late, schema=tables["profile"].schema)
    tables["profile"] = pa.concat_tables([more, tables["profile"]])
    assert everything(spark, tmp_path, tables, FUTURE + PAST) == base


def only(base: tuple[Any, ...], families: list[dict[str, Any]]) -> dict[Any, Any]:
    names = {one["id"] for one in families}
    found = {}
    for split in base[2]:
        for key, mine in split.items():
            found[key] = {**found.get(key, {}), **{n: a for n, a in mine.items() if n.split(":")[0] in names}}
    return {key: mine for key, mine in found.items() if mine}


def test_the_past_is_the_same_whatever_happens_next(spark: SparkSession, base: tuple[Any, ...], tmp_path: Path):
    moments = [MOMENT, MOMENT + TICK, MOMENT + 3 * DAY, CUT - TICK]
    other = everything(spark, tmp_path, with_events(make_tables(), moments), FUTURE + PAST)
    assert only(other, PAST) == only(base, PAST)
    assert other[3] == base[3], "a packed history holds nothing at or after its as_of"
    assert only(other, FUTURE) != only(base, FUTURE), "the events are loud enough to be noticed"


def test_answers_about_the_future_use_its_window_alone(spark: SparkSession, base: tuple[Any, ...], tmp_path: Path):
    moments = [MOMENT - TICK, MOMENT - 2 * DAY, MOMENT + 6 * DAY, MOMENT + 6 * DAY + TICK, CUT - TICK]
    other = everything(spark, tmp_path, with_events(make_tables(), moments), FUTURE + PAST)
    assert only(other, FUTURE) == only(base, FUTURE)
    assert only(other, PAST) != only(base, PAST)


def test_a_window_that_the_cut_or_the_data_do_not_cover_is_not_asked(spark: SparkSession, tmp_path: Path):
    rows = [
        {"user": "busy" if number % 9 else str(number % 4), "at": AS_OF - (1 + number / 3) * DAY, "id": number,
         "word": "tea", "amount": 1.0, "level": number % 2, "flag": True}
        for number in range(90)
    ]  # fmt: skip
    tables = make_tables()
    tables["bill"] = pa.Table.from_pylist(rows, schema=tables["bill"].schema)
    families = [
        family("soon", "amount", days=3, levels=["a", "b"], edges=[3]),
        family("later", "amount", days=8, levels=["a", "b"], edges=[3]),
        family("lately", "amount", days=4, window="past", levels=["a", "b"], edges=[3]),
        family("long_ago", "amount", days=12, window="past", levels=["a", "b"], edges=[3]),
        family("more", "change", days=6, levels=["a", "b"]),
    ]
    config = config_of(tmp_path, tables, families)
    first = rows[-1]["at"]
    as_ofs = [first + 5 * DAY, first + 14 * DAY, AS_OF - 5 * DAY, AS_OF - DAY]
    manifest = build(spark, config, as_ofs, AS_OF - DAY)
    asked: dict[str, set[int]] = {}
    for split in SPLITS:
        try:
            qa = load(config, split)
        except DataError:
            continue
        for (_, moment), mine in answers_of(qa).items():
            for name in mine:
                asked.setdefault(name, set()).add(as_ofs.index(moment))
    ends = {name: max(places) for name, places in asked.items()}
    assert ends["soon"] == 2, "the last as_of has no future before the cut"
    assert ends["later"] == 1
    assert min(asked["lately"]) == 0
    assert min(asked["long_ago"]) == 1, "the data begin too late for the first"
    assert asked["more"] == {1}, "a change needs both windows"
    assert manifest.trained_through == (AS_OF - DAY).isoformat()

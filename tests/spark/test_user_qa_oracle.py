"""The UserQA job equals its plain-Python restatement, on random tables with everything a lake can throw at it."""

from __future__ import annotations

import datetime as dt
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig
from instructue_feast.runs.store import OutputStore
from instructue_feast.user_qa.dataset import UserQA
from instructue_feast.user_qa.loading import load_phrasebook, load_user_qa
from instructue_feast.user_qa.tables import SPLITS, UserQAManifest
from instructue_spark.report import Reporter
from instructue_spark.user_qa import run_user_qa
from tests.oracles.lake import (
    AS_OF,
    event_source,
    random_events,
    random_snapshots,
    tabular_source,
    write_config,
    write_lake,
)
from tests.oracles.user_qa import expected_user_qa

pytestmark = pytest.mark.spark

DAY = dt.timedelta(days=1)
AS_OFS = [AS_OF - 20 * DAY, AS_OF - 12 * DAY, AS_OF - 5 * DAY]
CUT = AS_OF + dt.timedelta(hours=3)
ASK = {"wordings": ["Is it {days}?"], "held_out_wordings": ["Was it {days}?"]}
ABOUT = {"wordings": ["Is it {subject}?", "{subject} in {days}?"], "held_out_wordings": ["Was it {subject}?"]}
YES_NO = {"yes": "Yes.", "no": "No."}
LEVELS = {"levels": ["low", "middle", "high"]}


def family(name: str, kind: str, source: str = "bill", **values: Any) -> dict[str, Any]:
    spec = {"id": name, "kind": kind, "source": source, "days": 6, **ASK, **values}
    asked = {key: [f"{name}: {one}" for one in spec[key]] for key in ASK}  # no two families in the same words
    return spec | asked


FAMILIES = [
    family("has", "occurs", subject="word", **ABOUT, yes="Yes, {subject}.", no="No {subject}.", min_rate=0.05),
    family("had", "occurs", "search", subject="level", window="past", **ABOUT, yes="Has {subject}", no="{subject} not"),
    family("few", "occurs", subject="word", **ABOUT, yes="{subject}", no="no {subject}", max_subjects=3, max_rate=0.4),
    family("comes", "occurs", days=1, **YES_NO),
    family("gone", "inactive", "search", days=2, **YES_NO),
    family("was_gone", "inactive", "search", window="past", days=3, **YES_NO),
    family("much", "amount", measure="sum", column="amount", **LEVELS),
    family("often", "amount", "search", window="past", levels=["seldom", "often"]),
    family("kinds", "amount", measure="distinct", column="level", edges=[1, 3], **LEVELS),
    family("mean", "amount", measure="mean", column="amount", window="past", **LEVELS),
    family("part", "amount", measure="share", condition="amount >= 2.5", levels=["no", "yes"], edges=[0.3]),
    family("per", "amount", measure="sum_per", column="amount", per="level", window="past", levels=["a", "b"]),
    family("more", "change", days=5, **LEVELS),
    family("spend", "change", days=5, measure="sum", column="amount", threshold=0.5, levels=["less", "not less"]),
    family("price", "change", days=6, measure="mean", column="amount", **LEVELS),
    family("best", "favourite", subject="word", exclude=["TEA"], max_values=5, answer="{value}!", window="past"),
    family("next", "favourite", "search", subject="flag", measure="sum", column="amount", answer="Next: {value}"),
    family("hour", "favourite", clock="part_of_day", zone="Asia/Tokyo", answer="{value}"),
    family("weekday", "favourite", "search", clock="weekday", answer="On {value}", window="past"),
    family("weekend", "favourite", clock="weekend", measure="distinct", column="level", answer="On {value}"),
    family("city", "attribute", "profile", column="city", max_values=6, answer="{value}"),
    family("tier", "attribute", "score", column="tier", answer="Tier {value}"),
]


def make_lake(folder: Path, seed: int, families: list[dict[str, Any]], rows: int = 420, **settings) -> InstructueConfig:
    rng = random.Random(seed)
    tables = {
        "bill": random_events(rng, rows, users=9),
        "search": random_events(rng, rows // 2, users=9, time_type=pa.timestamp("us")),
        "profile": random_snapshots(rng, 60),
        "score": random_snapshots(rng, 40, timed=False),
        "users": pa.table({"id": [str(number) for number in range(12)]}),
    }
    write_lake(folder, tables)
    sources = {
        "bill": event_source("bill"),
        "profile": tabular_source("profile"),
        "search": event_source("search", "{word}", event_id=[], time_zone="America/New_York", days=9),
        "score": tabular_source("score", time=None, numeric=["years"], categorical=["city"]),
    }
    users = {"table": {"path": "raw/users"}, "user_id": "id"}
    return write_config(folder, sources, users=users, user_qa={"questions": families, **settings})


def build(spark: SparkSession, config: InstructueConfig, as_ofs=AS_OFS, cut=CUT, qa_id: str = "qa") -> UserQAManifest:
    return run_user_qa(spark, config, as_ofs, cut, qa_id=qa_id, reporter=Reporter(stream=None))


def load(config: InstructueConfig, split: str = "train", qa_id: str = "qa") -> UserQA:
    return load_user_qa(OutputStore(config.output.path), qa_id, config, split)


def answers_of(qa: UserQA) -> dict[tuple[str, dt.datetime], dict[str, tuple[str, float]]]:
    """Answer and weight by user and `as_of`, then question id."""
    found = {}
    for row, user in enumerate(qa.history.user_ids):
        moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=int(qa.history.as_of_us[row]))
        pairs = range(qa.offsets[row], qa.offsets[row + 1])
        names = [qa.questions[qa.question_P[one]].id for one in pairs]
        values = [(qa.answers[qa.answer_P[one]], float(qa.weight_P[one])) for one in pairs]
        mine = dict(zip(names, values, strict=True))
        assert len(mine) == len(pairs), "a question is answered twice"
        found[user, moment] = mine
    return found


@pytest.mark.parametrize(("seed", "min_events", "families"), [(1, 1, FAMILIES), (2, 4, FAMILIES[::4])])
def test_every_answer_weight_and_split_equals_the_oracle(
    spark, tmp_path: Path, seed: int, min_events: int, families: list[dict[str, Any]]
):
    config = make_lake(tmp_path, seed, families, min_events=min_events)
    manifest = build(spark, config)
    edges = {name: one.edges for name, one in manifest.families.items()}
    expected = expected_user_qa(config, AS_OFS, CUT, edges)
    splits = {split: load(config, split) for split in SPLITS}
    qa = splits["train"]
    assert {one.id: tuple(qa.answers[place] for place in one.answers) for one in qa.questions} == expected.closed
    assert {one.id for one in qa.questions if one.held_out} == expected.held_out
    if len(families) == len(FAMILIES):
        assert len(expected.closed) > 25
    assert expected.held_out
    for split, loaded in splits.items():
        wanted = {
            key: {name: text for name, text in mine.items() if (name in expected.held_out) == (split == "held_out")}
            for key, mine in expected.answers.items()
        }
        actual = answers_of(loaded)
        assert set(actual) == {key for key, mine in wanted.items() if mine}
        for key, mine in actual.items():
            assert {name: text for name, (text, _) in mine.items()} == wanted[key], key
            for name, (text, weight) in mine.items():
                assert weight == pytest.approx(expected.weights[name][text], rel=1e-6)
    assert manifest.pairs == {split: loaded.num_pairs for split, loaded in splits.items()}
    assert manifest.checked == sum(manifest.pairs.values()), "few users: the sample is everybody"
    assert manifest.trained_through == max(expected.last, AS_OFS[-1]).isoformat()
    book = load_phrasebook(OutputStore(config.output.path), "qa")
    kept = np.concatenate([loaded.history.text_id for loaded in splits.values()])
    assert set(book.column("text_id").to_pylist()) == set(np.unique(kept).tolist()), "texts of the histories, no others"

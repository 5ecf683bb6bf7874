"""Every mistake gets an error that says what, where and how to mend it; nothing half-written stays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from instructue_feast.errors import (
    ConfigError,
    DataError,
    InstructueError,
    LeakageError,
    RunConflictError,
    SchemaError,
    VersionMismatchError,
)
from instructue_spark import user_qa_check
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from instructue_spark.user_qa import run_user_qa
from tests.oracles.lake import AS_OF, write_lake
from tests.spark.test_user_qa_leakage import config_of, make_tables
from tests.spark.test_user_qa_oracle import ABOUT, DAY, YES_NO, build, family, load

pytestmark = pytest.mark.spark

MOMENT, CUT = AS_OF - 10 * DAY, AS_OF
GONE = family("gone", "inactive", days=1, **YES_NO)


@pytest.mark.parametrize(
    ("wrong", "kind", "message", "hint"),
    [
        (family("has", "occurs", subject="wrod", **ABOUT), SchemaError, "family has: .*'wrod'", "did you mean word?"),
        (family("much", "amount", measure="sum", column="word"), SchemaError, "column word .*not a number", "count"),
        (family("part", "amount", measure="share", condition="nope > 1"), ConfigError, "nope > 1", "columns"),
        (family("part", "amount", measure="share", condition="amount + 1"), ConfigError, "not boolean", "compare"),
        (family("city", "attribute", "profile", column="town"), SchemaError, "family city: .*'town'", "city"),
    ],
)
def test_a_wrong_column_or_condition_is_named_with_its_family(
    spark: SparkSession, tmp_path: Path, wrong: dict[str, Any], kind: type[InstructueError], message: str, hint: str
):
    config = config_of(tmp_path, make_tables(), [GONE, wrong])
    with pytest.raises(kind, match=message) as error:
        build(spark, config, [MOMENT], CUT)
    assert hint in error.value.hint
    assert not (Path(config.output.path) / "user_qa" / "qa").exists()


def test_when_no_question_survives_every_family_says_why(spark: SparkSession, tmp_path: Path):
    families = [
        family("has", "occurs", subject="word", **ABOUT, min_rate=0.97, max_rate=0.98),
        family("far", "inactive", days=300, **YES_NO),
        family("never", "amount", edges=[1e6], levels=["few", "many"]),
    ]
    with pytest.raises(DataError, match="no question survives") as error:
        build(spark, config_of(tmp_path, make_tables(), families), [MOMENT], CUT)
    assert "has: no subject has a rate" in error.value.hint
    assert "far: no window lies inside the data" in error.value.hint
    assert "never: one answer only" in error.value.hint


def test_questions_that_everybody_answers_alike_are_dropped_with_a_reason(spark: SparkSession, tmp_path: Path):
    never = family("never", "amount", edges=[1e6], levels=["few", "many"])
    manifest = build(spark, config_of(tmp_path, make_tables(), [GONE, never]), [MOMENT], CUT)
    assert manifest.families["never"].dropped == {"one answer only": 1}
    assert manifest.families["never"].questions == 0
    assert manifest.num_questions == 1


def test_quantiles_that_leave_a_level_to_nobody_drop_the_question(spark: SparkSession, tmp_path: Path):
    """No purchase is that large, so every share is the smallest value; an edge there would make everybody `some`."""
    never = {"measure": "share", "condition": "amount > 1e9"}
    families = [
        family("two", "amount", **never, levels=["none", "some"]),
        family("three", "amount", **never, levels=["none", "some", "many"]),
    ]
    manifest = build(spark, config_of(tmp_path, make_tables(), [GONE, *families]), [MOMENT], CUT)
    for one in families:
        assert manifest.families[one["id"]].dropped == {"quantiles coincide: give `edges`": 1}
    assert manifest.num_questions == 1


def test_two_families_that_ask_in_the_same_words_are_refused(spark: SparkSession, tmp_path: Path):
    again = {**GONE, "id": "away", "days": 2}
    config = config_of(tmp_path, make_tables(), [{**GONE, "wordings": ["Gone?"]}, {**again, "wordings": ["gone?"]}])
    with pytest.raises(ConfigError, match="families gone and away ask in the same words"):
        build(spark, config, [MOMENT], CUT)
    assert not (Path(config.output.path) / "user_qa" / "qa").exists()


def test_a_window_after_the_data_is_not_asked_about(spark: SparkSession, tmp_path: Path):
    """Silence after the last event says nothing about the user, so nobody has been away there."""
    past = family("was_gone", "inactive", window="past", days=1, **YES_NO)
    late = AS_OF + 40 * DAY
    config = config_of(tmp_path, make_tables(), [past])
    build(spark, config, [MOMENT, late], late + DAY)
    assert {int(one) for one in load(config).history.as_of_us} == {int(MOMENT.timestamp() * 1e6)}


def test_points_in_time_and_ids_are_checked_before_anything_is_read(spark: SparkSession, tmp_path: Path):
    config = config_of(tmp_path, make_tables(), [GONE])
    with pytest.raises(ConfigError, match="not after the first as_of"):
        build(spark, config, [MOMENT], MOMENT)
    with pytest.raises(LeakageError, match="after the cut"):
        build(spark, config, [MOMENT, CUT + DAY], CUT)
    with pytest.raises(ConfigError, match="no as_of"):
        build(spark, config, [], CUT)
    with pytest.raises(ConfigError, match="no `user_qa` section"):
        build(spark, dataclasses.replace(config, user_qa=None), [MOMENT], CUT)
    with pytest.raises(ConfigError, match="UserQA id"):
        build(spark, config, [MOMENT], CUT, qa_id="../up")
    assert not (Path(config.output.path) / "user_qa").exists()


def test_extracts_are_reused_and_foreign_ones_refused(spark: SparkSession, tmp_path: Path):
    config = config_of(tmp_path, make_tables(), [GONE])
    silent = Reporter(stream=None)
    made = run_extract(spark, config, MOMENT, extract_id="mine", reporter=silent)
    manifest = build(spark, config, [MOMENT], CUT)
    assert manifest.extracts == ["mine"]
    folder = Path(config.output.path) / "extracts"
    assert [one.name for one in folder.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="no finished extract 'yours'"):
        run_user_qa(spark, config, [MOMENT], CUT, qa_id="b", extracts=["yours"], reporter=silent)
    with pytest.raises(ConfigError, match="none of the as_ofs"):
        run_user_qa(spark, config, [MOMENT - DAY], CUT, qa_id="b", extracts=["mine"], reporter=silent)
    other = dataclasses.replace(made, history_digest="other")
    (folder / "mine" / "manifest.json").write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(VersionMismatchError, match="other history settings"):
        run_user_qa(spark, config, [MOMENT], CUT, qa_id="b", extracts=["mine"], reporter=silent)
    with pytest.raises(RunConflictError):
        build(spark, config, [MOMENT], CUT)
    assert load(config).num_pairs == manifest.pairs["train"], "the finished data set stays"


def test_an_answer_that_the_second_computation_does_not_find_stops_the_job(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(tmp_path, make_tables(), [GONE])
    right = user_qa_check.answers_again
    monkeypatch.setattr(user_qa_check, "answers_again", lambda *args: {0: {1 - min(right(*args)[0])}})
    with pytest.raises(DataError, match=r"family gone: .* users differ from a second computation"):
        build(spark, config, [MOMENT], CUT)
    assert not (Path(config.output.path) / "user_qa" / "qa").exists()


def test_an_empty_source_drops_its_families_and_no_others(spark: SparkSession, tmp_path: Path):
    tables = make_tables()
    config = config_of(tmp_path, tables, [GONE])
    write_lake(tmp_path, {"search": tables["bill"].slice(0, 0)})
    source = dataclasses.replace(config.event_sources["bill"], allow_empty=True)
    source = dataclasses.replace(source, table=dataclasses.replace(source.table, path=str(tmp_path / "raw" / "search")))
    assert config.user_qa is not None
    more = dataclasses.replace(config.user_qa.questions[0], id="silent", source="search")
    settings = dataclasses.replace(config.user_qa, questions=(*config.user_qa.questions, more))
    config = dataclasses.replace(config, sources={**config.sources, "search": source}, user_qa=settings)
    manifest = build(spark, config, [MOMENT], CUT)
    assert manifest.families["silent"].dropped == {"no window lies inside the data and before the cut": 1}
    assert manifest.families["gone"].questions == 1


def test_rows_that_the_extract_would_quarantine_are_skipped_and_counted(spark: SparkSession, tmp_path: Path):
    tables = make_tables()
    rows = tables["bill"].slice(0, 4).to_pylist()
    rows[0]["user"], rows[1]["at"], rows[2]["amount"] = None, None, float("nan")
    rows[3] |= {"user": "0", "at": MOMENT + DAY / 2, "amount": float("nan")}
    tables["bill"] = pa.concat_tables([tables["bill"], pa.Table.from_pylist(rows, schema=tables["bill"].schema)])
    manifest = build(spark, config_of(tmp_path, tables, [GONE]), [MOMENT], CUT)
    assert manifest.dropped["bill: null_user"] >= 1
    assert manifest.dropped["bill: null_time"] >= 1
    assert manifest.dropped["bill: broken_value"] >= 1

"""`instructue qa`: points in time, errors before Spark starts, and looking at a finished data set."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from instructue_feast.cli.jobs import JobResult
from instructue_feast.cli.main import main
from instructue_feast.cli.moments import moments
from instructue_feast.errors import ConfigError
from tests.user_qa.data_sets import write_data_set
from tests.user_qa.test_questions import GONE, config_with


def test_points_in_time_are_steps_and_single_ones_each_once():
    found = moments("2017-03-15", "2017-04-13", "2w", ["2017-03-29", "2017-03-20T12:00:00+02:00"])
    assert [one.isoformat() for one in found] == [
        "2017-03-15T00:00:00+00:00", "2017-03-20T10:00:00+00:00", "2017-03-29T00:00:00+00:00",
        "2017-04-12T00:00:00+00:00",
    ]  # fmt: skip
    assert moments("2017-03-15", "2017-03-15", "14d", None) == [datetime(2017, 3, 15, tzinfo=UTC)]
    assert moments(None, None, "14d", None) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2017-03-15", None, "14d", None), "--from and --to belong together"),
        (("2017-03-15", "2017-03-14", "14d", None), "--from lies after --to"),
        (("2017-03-15", "2017-04-14", "14h", None), "--every '14h'"),
        (("2017-03-15", "2017-04-14", "0d", None), "--every '0d'"),
        ((None, None, "14d", ["soon"]), "--as-of: .*'soon'"),
        ((None, None, "14d", ["2017-03-15T00:00:00"]), "--as-of: .* no time zone"),
    ],
)
def test_wrong_points_in_time_are_refused(arguments, message: str):
    with pytest.raises(ConfigError, match=message):
        moments(*arguments)


def test_what_is_missing_is_said_before_spark_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = str(config_with(tmp_path, GONE))
    assert main(["qa", "--config", config]) == 2
    assert "no as_of given" in capsys.readouterr().err
    assert main(["qa", "--config", config, "--as-of", "2017-03-15"]) == 2
    assert "--cut is missing" in capsys.readouterr().err
    _, plain = write_data_set(tmp_path)
    assert plain.user_qa is None
    arguments = ["--as-of", "2017-03-15", "--cut", "2017-04-15"]
    assert main(["qa", "--config", str(tmp_path / "instructue.yaml"), *arguments]) == 2
    assert "no `user_qa` section" in capsys.readouterr().err


def test_a_finished_data_set_can_be_looked_at_without_user_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_data_set(tmp_path)
    arguments = ["qa", "--config", str(tmp_path / "instructue.yaml"), "--qa-id", "qa", "--show", "3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "Does it buy tea?" in text
    assert "answers checked a second time" in text
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["pairs"] == {"train": 10, "held_out": 1}
    assert len(document["examples"]) == 3
    assert set(document["examples"][0]) == {"as_of", "events", "instruction", "answer"}


def test_the_job_gets_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = str(config_with(tmp_path, GONE))
    calls = []

    def run_job(module: str, arguments: list[str], **_: object) -> JobResult:
        calls.append((module, arguments))
        return JobResult(value={"qa_id": "mine", "families": {}})

    monkeypatch.setattr("instructue_feast.cli.qa.run_job", run_job)
    steps = ["--from", "2017-03-15", "--to", "2017-03-29", "--cut", "2017-05-01", "--extract", "x", "--extract", "y"]
    assert main(["qa", "--config", config, *steps, "--qa-id", "mine", "--cores", "2", "--json"]) == 0
    module, arguments = calls[0]
    assert module == "instructue_spark.user_qa"
    assert arguments[2:] == [
        "--as-ofs", "2017-03-15T00:00:00+00:00,2017-03-29T00:00:00+00:00", "--cut", "2017-05-01T00:00:00+00:00",
        "--extracts", "x,y", "--qa-id", "mine", "--cores", "2",
    ]  # fmt: skip
    assert json.loads(capsys.readouterr().out)["qa_id"] == "mine"

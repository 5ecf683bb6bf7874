from __future__ import annotations

import json

import pytest

from instructue_feast import __version__
from instructue_feast.cli.jobs import run_job
from instructue_feast.cli.main import main
from instructue_feast.errors import DataError, InstructueError

COMMANDS = [
    "doctor", "extract", "qa", "train", "tune-instruction", "eval", "ablate", "explain",
    "backfill", "publish", "materialize", "get", "demo", "plan",
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "instructue.yaml"
    file.write_text(
        "project: p\n"
        "sources:\n  bill: {table: {path: raw}, user_id: u, time: t, text: '{a}'}\n"
        "instructions:\n  - {id: churn, text: Will they leave}\n"
        "output: {path: out}\n"
    )
    return file


@pytest.mark.parametrize("command", [*([one] for one in COMMANDS), ["data", "synthetic"], ["data", "complete-journey"]])
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: instructue" in text
    assert "--json" in text


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_option_is_a_usage_error():
    assert main(["backfill", "--nope"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as-of", "2017-10-01T00:00:00"], "has no time zone"),
        (["--as-of", "2999-01-01T00:00:00Z"], "is in the future"),
        (["--as-of", "yesterday"], "is not an ISO 8601 timestamp"),
        (["--as-of", "2017-10-01T00:00:00Z", "--instruction", "chrun"], "unknown instruction 'chrun'"),
    ],
)
def test_a_backfill_that_cannot_work_is_refused_before_spark_starts(config, arguments, message, capsys):
    assert main(["backfill", "--config", str(config), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Hint:" in captured.err
    assert not (config.parent / "out").exists()


def test_errors_are_json_when_json_was_asked_for(config, capsys):
    assert main(["backfill", "--config", str(config), "--as-of", "2017-10-01T00:00:00", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "ConfigError"
    assert "time zone" in error["message"]
    assert error["hint"]


def test_a_missing_config_says_how_to_get_one(tmp_path, capsys):
    assert main(["extract", "--config", str(tmp_path / "x.yaml"), "--as-of", "2017-10-01T00:00:00Z"]) == 2
    assert "instructue data" in capsys.readouterr().err


def test_publishing_an_unknown_run_lists_the_runs_there_are(config, capsys):
    assert main(["publish", "nope", "--config", str(config)]) == 2
    assert "nope" in capsys.readouterr().err


def test_a_demo_touches_only_folders_a_demo_made(tmp_path, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("x")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "no demo made" in capsys.readouterr().err
    assert (tmp_path / "output" / "precious").exists()


def test_doctor_reports_as_json(capsys):
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ready"] else 10)
    names = {one["name"] for one in report["findings"]}
    assert {"python", "java", "torch", "feast", "pyspark"} <= names
    assert {"kernels: info_nce", "kernels: adapter", "kernels: next_token"} <= names


def test_doctor_says_what_to_install_when_java_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("JAVA_HOME", "/nonexistent")
    assert main(["doctor"]) == 10
    assert "install a Java 17" in capsys.readouterr().out


JOB = """
import sys
from instructue_feast.errors import DataError
from instructue_spark.report import run_main
def job(reporter):
    with reporter.stage("one") as stage:
        stage.rows_in, stage.rows_out = 3, 2
        reporter.progress("one", 1, 3)
    print("a library that prints to standard output")
    if sys.argv[1] == "fail": raise DataError("table x is gone", "bring it back")
    if sys.argv[1] == "crash": raise SystemExit(9)
    return {"answer": 42}
if __name__ == "__main__":
    raise SystemExit(run_main(job))
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "a_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "logs" / "job.log"


def test_a_jobs_stages_and_result_reach_the_command_line(job):
    result = run_job("a_job", ["fine"], log=job)
    assert result.value == {"answer": 42}
    assert [(stage.name, stage.rows_in, stage.rows_out) for stage in result.stages] == [("one", 3, 2)]
    assert "a library that prints" in job.read_text()


def test_a_jobs_error_keeps_its_class_and_hint(job):
    with pytest.raises(DataError, match="table x is gone") as caught:
        run_job("a_job", ["fail"], log=job, quiet=True)
    assert caught.value.hint == "bring it back"


def test_a_job_that_dies_without_a_word_points_to_its_log(job):
    with pytest.raises(InstructueError, match=r"ended with code 9(?s:.)*job.log"):
        run_job("a_job", ["crash"], log=job, quiet=True)

"""`instructue plan`: tables for people, one document for machines, and a calibration that is used again."""

from __future__ import annotations

import json
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

from instructue_feast.cli.main import main
from instructue_feast.cli.plan_data import history_file, look_at
from instructue_feast.config import load_config
from instructue_feast.runs.writer import parquet_bytes
from tests.runs.test_plan import CALIBRATION


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "calibration.json"
    CALIBRATION.save(file)
    return file


def test_a_billion_users_are_planned_from_a_saved_calibration(saved, capsys):
    arguments = ["--users", "1000000000", "--instructions", "8", "--days", "30", "--workers", "512"]
    assert main(["plan", *arguments, "--calibration", str(saved)]) == 0
    text = capsys.readouterr().out
    for wanted in ("1,000,000,000 users", "full backfill", "30 days, incremental", "redis", "Assumptions", "TiB"):
        assert wanted in text


def test_json_holds_plan_and_calibration(saved, capsys):
    assert main(["plan", "--users", "1000", "--instructions", "2", "--calibration", str(saved), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["full"]["tokens"] == 1000 * 94
    assert document["plan"]["workload"]["instructions"] == 2
    assert document["calibration"]["device"] == "a core"


def test_a_new_calibration_is_saved_and_the_config_says_how_many_instructions(tmp_path, capsys):
    config = tmp_path / "instructue.yaml"
    config.write_text(
        "project: p\n"
        "sources:\n  bill: {table: {path: raw}, user_id: u, time: t, text: '{a}', max_texts: 40}\n"
        "instructions:\n  - {id: churn, text: Will they leave}\n  - {id: taste, text: What do they like}\n"
        "output: {path: out}\n"
    )
    file = tmp_path / "new.json"
    with patch("instructue_feast.cli.plan.calibrate", return_value=CALIBRATION) as measured:
        for _ in range(2):
            arguments = ["--users", "10", "--config", str(config), "--calibration", str(file), "--json"]
            assert main(["plan", *arguments]) == 0
            assert json.loads(capsys.readouterr().out)["plan"]["workload"]["instructions"] == 2
    assert measured.call_count == 1
    history, _, data, _ = look_at(load_config(config))
    assert abs(history.num_tokens.mean() - 10) < 2  # a quarter of the room
    assert "default" in data.source


def test_few_users_foretell_the_files_of_many():
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 2**62, 300)
    users = [np.sort(rng.choice(texts, rng.integers(1, 30))) for _ in range(9_000)]
    table = pa.table({"user_id": [f"user-{row:06d}" for row in range(len(users))], "text_id": users})
    line = history_file(table.slice(0, 1_000))
    assert line.base + 8_000 * line.slope == pytest.approx(parquet_bytes(table.slice(1_000), repeats=True), rel=0.1)
    assert line.base > 300 * 8  # every file has the dictionary
    assert history_file(table.slice(0, 1)).slope == parquet_bytes(table.slice(0, 1), repeats=True)


def test_a_damaged_calibration_is_a_stated_error(saved, capsys):
    saved.write_text("{")
    assert main(["plan", "--users", "10", "--instructions", "1", "--calibration", str(saved)]) == 3
    assert "is not a calibration" in capsys.readouterr().err

"""Plans are arithmetic: what they promise can be added up by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.runs.plan import (
    BUCKET_BYTES,
    Calibration,
    DataStatistics,
    ExtractionRates,
    Line,
    Workload,
    plan,
)

CALIBRATION = Calibration(
    device="a core", accelerator=False, model="tiny", versions="torch 2", date="2026-01-01",
    data=DataStatistics(
        source="extract x", users=1_000, events_per_user=30, texts_per_user=20, distinct_texts=500, text_growth=0.5,
        history_bytes=400, phrase_bytes=40, file_bytes=2_000,
    ),
    extraction=ExtractionRates(source="x", fixed_core_seconds=40, fixed_seconds=20, core_seconds_per_event=1e-5),
    prefix_tokens=90, embed_seconds=Line(base=0.01, slope=0.001), write_seconds=Line(base=1e-5, slope=1e-6),
    encode_seconds=0.002, load_seconds=3, embedding_dim=128, encoder_dim=384, hidden_size=576, focus_dim=384,
    run_bytes=Line(base=20, slope=480), online_bytes={"redis": Line(base=200, slope=830)},
)  # fmt: skip


def test_a_full_backfill_adds_up():
    result = plan(CALIBRATION, Workload(users=1_000, instructions=2, workers=2, buckets=10))
    assert result.full.tokens == 1_000 * (90 + 2 * 2)
    work = 1_000 * 30 * 1e-5 + 500 * 0.002 + 1_000 * (0.012 + 1.2e-5)
    assert result.full.core_seconds == pytest.approx(40 + work + 2 * 3)
    assert result.full.seconds == pytest.approx(20 + 3 + work / 2)
    assert result.full.gpu_seconds == 0
    assert result.storage_bytes["run"] == 1_000 * 980
    assert result.storage_bytes["packed histories"] == 1_000 * 400 + 10 * 2_000  # a file for each bucket
    assert result.storage_bytes["event vectors"] == 500 * 384 * 4
    assert result.online_bytes == {"redis": 1_000 * 1_860}


def test_incremental_nights_embed_what_changed_and_extract_everything():
    work = Workload(users=100_000, instructions=8, days=30, workers=4, changed=0.01, new_texts=0)
    result = plan(CALIBRATION, work)
    assert result.incremental.tokens == pytest.approx(0.01 * result.full.tokens)
    assert result.incremental.seconds_by_stage["extract"] == result.full.seconds_by_stage["extract"]
    assert result.incremental.seconds_by_stage["encode"] == 0
    assert result.all_days.tokens == pytest.approx(result.full.tokens + 29 * result.incremental.tokens)
    assert result.all_days_full.seconds == pytest.approx(30 * result.full.seconds)


def test_a_gpu_takes_the_embedding_and_cores_the_rest():
    on_gpu = dataclasses.replace(CALIBRATION, accelerator=True)
    work = Workload(users=10_000, instructions=1)
    cpu, gpu = plan(CALIBRATION, work).full, plan(on_gpu, work).full
    assert gpu.gpu_seconds == pytest.approx(10_000 * 0.011)
    assert cpu.core_seconds - gpu.core_seconds == pytest.approx(gpu.gpu_seconds)


def test_the_last_round_of_buckets_costs_a_whole_round():
    seconds = [
        plan(CALIBRATION, Workload(users=9_000, instructions=1, workers=workers, buckets=9)).full.seconds_by_stage[
            "embed"
        ]
        for workers in (8, 9)
    ]
    assert seconds[0] - 3 == pytest.approx(2 * (seconds[1] - 3))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**9), st.integers(1, 64), st.integers(1, 1000))
def test_more_users_or_instructions_never_cost_less_and_workers_never_make_it_slower(users, instructions, workers):
    base = plan(CALIBRATION, Workload(users=users, instructions=instructions, workers=workers))
    more = plan(CALIBRATION, Workload(users=2 * users, instructions=instructions, workers=workers))
    wider = plan(CALIBRATION, Workload(users=users, instructions=instructions + 1, workers=workers))
    assert more.full.core_seconds > base.full.core_seconds
    assert wider.full.core_seconds > base.full.core_seconds
    assert base.worker_bytes <= BUCKET_BYTES
    twice = plan(CALIBRATION, Workload(users=users, instructions=instructions, workers=2 * workers))
    assert twice.full.seconds <= base.full.seconds + 1e-6
    assert len(base.assumptions) >= 6


@pytest.mark.parametrize(("name", "value"), [("users", 0), ("instructions", 0), ("days", 0), ("changed", 1.5)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Workload(**{"users": 10, "instructions": 1, name: value})


def test_a_calibration_is_read_back_as_it_was_written(tmp_path):
    file = tmp_path / "calibration.json"
    CALIBRATION.save(file)
    assert Calibration.load(file) == CALIBRATION


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "data": {}}'])
def test_another_file_is_no_calibration(tmp_path, text):
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"calibration\.json is not a calibration"):
        Calibration.load(file)


def test_a_calibration_of_another_release_is_refused(tmp_path):
    file = tmp_path / "calibration.json"
    dataclasses.replace(CALIBRATION, format=99).save(file)
    with pytest.raises(DataError, match="format 99"):
        Calibration.load(file)

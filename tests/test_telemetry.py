"""Metrics and spans of a job: there when asked for, silent otherwise, and never with a message or an id."""

from __future__ import annotations

import io
import json
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from instructue_feast.errors import DataError
from instructue_feast.telemetry import METRICS_FILE, OTLP_ENDPOINT, PUSHGATEWAY, Telemetry
from instructue_spark.report import Reporter, _run, _Stop

SECRET = "user-4711 bought zanzibar vacation"
COUNTS = {"bill": {"read": 9, "kept": 5, "quarantined": {"null_user": 3}}}
RESULT = {"run": {"users": 12, "tokens": 340, "texts_encoded": 7, "model_loads": 2}, "extract": {"counts": COUNTS}}


@pytest.fixture
def spans(monkeypatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


def samples(file) -> dict[tuple, float]:
    return {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(file.read_text())
        for one in family.samples
    }


def test_a_job_writes_its_stages_rows_and_end(tmp_path):
    telemetry = Telemetry("backfill", {METRICS_FILE: str(tmp_path / "job.prom")})
    with Reporter(None, telemetry).stage("sources") as stage:
        stage.rows_in, stage.rows_out = 9, 5
    telemetry.finish(0, RESULT)
    found, job = samples(tmp_path / "job.prom"), ("job", "backfill")
    assert found["instructue_stage_rows_in", job, ("stage", "sources")] == 9
    assert found["instructue_stage_rows_out", job, ("stage", "sources")] == 5
    assert found["instructue_run_users", job] == 12
    assert found["instructue_rows_quarantined", job, ("reason", "null_user"), ("source", "bill")] == 3
    assert found["instructue_job_exit_code", job] == 0
    assert (
        found["instructue_job_success_timestamp_seconds", job]
        == found["instructue_job_finished_timestamp_seconds", job]
    )


def test_a_failed_job_says_so_and_leaves_the_time_of_the_last_success_alone(tmp_path):
    telemetry = Telemetry("backfill", {METRICS_FILE: str(tmp_path / "job.prom")})
    telemetry.finish(3)
    found = samples(tmp_path / "job.prom")
    assert found["instructue_job_exit_code", ("job", "backfill")] == 3
    assert not any(name.startswith("instructue_job_success") for name, *_ in found)


def test_metrics_that_cannot_be_delivered_never_fail_a_job(tmp_path):
    telemetry = Telemetry("x", {METRICS_FILE: str(tmp_path / "no" / "such"), PUSHGATEWAY: "127.0.0.1:1"})
    telemetry.finish(0, RESULT)
    assert "could not be delivered" in telemetry.warnings[0]


def test_without_the_extras_a_job_runs_and_names_them(monkeypatch, tmp_path):
    for name in [one for one in sys.modules if one.split(".")[0] in ("prometheus_client", "opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    telemetry = Telemetry("x", {METRICS_FILE: str(tmp_path / "job.prom"), OTLP_ENDPOINT: "http://127.0.0.1:1"})
    with telemetry.span("x"), Reporter(None, telemetry).stage("sources"):
        pass
    telemetry.finish(0, RESULT)
    assert not (tmp_path / "job.prom").exists()
    assert ["`metrics`" in telemetry.warnings[0], "`tracing`" in telemetry.warnings[1]] == [True, True]


def test_nothing_happens_when_nobody_asks():
    telemetry = Telemetry("x", {})
    with telemetry.span("x") as span:
        assert span is None
    telemetry.finish(0, RESULT)
    assert telemetry.warnings == []


def test_a_job_is_a_span_with_its_stages_below_the_span_that_started_it(spans):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    telemetry = Telemetry("backfill", {"TRACEPARENT": parent})

    def job(reporter: Reporter) -> dict:
        with reporter.stage("embed") as stage:
            stage.rows_out = 12
        return RESULT

    assert _run(job, Reporter(None, telemetry), _Stop()) == (0, RESULT)
    embed, backfill = spans.get_finished_spans()
    assert (embed.name, backfill.name) == ("embed", "backfill")
    assert embed.parent.span_id == backfill.context.span_id
    assert f"{backfill.parent.span_id:016x}" == "b7ad6b7169203331"
    assert embed.attributes["rows_out"] == 12


@pytest.mark.parametrize("error", [DataError("a source is broken"), RuntimeError(SECRET)])
def test_logs_metrics_and_spans_never_quote_an_unexpected_message(spans, tmp_path, capsys, error):
    telemetry = Telemetry("backfill", {METRICS_FILE: str(tmp_path / "job.prom")})
    stream = io.StringIO()

    def job(reporter: Reporter) -> dict:
        with reporter.stage("sources"):
            raise error

    code, _ = _run(job, Reporter(stream, telemetry), _Stop())
    telemetry.finish(code)
    assert code == error.exit_code if isinstance(error, DataError) else code == 1
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["stage_started", "error"]
    assert all(line["job"] == "backfill" and line["time"].endswith("+00:00") for line in lines)
    exported = " ".join(one.to_json() for one in spans.get_finished_spans())
    assert f'"error.type": "{type(error).__name__}"' in exported
    written = (tmp_path / "job.prom").read_text()
    for text in (stream.getvalue(), capsys.readouterr().err, exported, written):
        assert SECRET not in text

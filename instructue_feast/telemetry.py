"""Metrics and traces of a job: Prometheus and OpenTelemetry, each only with its extra and only when asked for.

| variable | effect | extra |
| --- | --- | --- |
| `INSTRUCTUE_METRICS_FILE` | metrics are written there at the end (node_exporter's textfile collector) | `metrics` |
| `INSTRUCTUE_PUSHGATEWAY` | they are pushed to this Pushgateway, `host:port` | `metrics` |
| `OTEL_EXPORTER_OTLP_ENDPOINT` | a span per job and stage is exported; all `OTEL_*` variables count | `tracing` |
| `TRACEPARENT` | the span of whoever started the job (W3C Trace Context) | `tracing` |

Labels and attributes are names of jobs, stages, sources and errors, and numbers: never a user id, a text or a message.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

METRICS_FILE, PUSHGATEWAY = "INSTRUCTUE_METRICS_FILE", "INSTRUCTUE_PUSHGATEWAY"
OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"

_RUN_GAUGES = {
    "users": "Users of the run.",
    "tokens": "Prompt tokens computed.",
    "texts_encoded": "Texts that were new to the encoder.",
    "model_loads": "How often a Python worker loaded the model.",
}


class Telemetry:
    """Metrics and spans of one job.

    Args:
        job: Its name, for example `backfill`.
        environment: Where the variables above are looked up; this process's by default.
    """

    def __init__(self, job: str, environment: Mapping[str, str] | None = None) -> None:
        self.job = job
        self.warnings: list[str] = []
        env = os.environ if environment is None else environment
        self._file, self._gateway = env.get(METRICS_FILE, ""), env.get(PUSHGATEWAY, "")
        self._registry: Any = None
        self._gauges: dict[str, Any] = {}
        if self._file or self._gateway:
            try:
                from prometheus_client import CollectorRegistry
            except ImportError:
                self.warnings.append(
                    "metrics are asked for, but prometheus-client is missing: install the extra `metrics`"
                )
            else:
                self._registry = CollectorRegistry()
        self._provider: Any = None
        self._tracer = self._make_tracer(env)
        self._parent = env.get("TRACEPARENT", "")
        self._started = time.time()

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[Any]:
        """A span around the block, or nothing. An error is noted by its class; its message may quote a row."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry import trace
        from opentelemetry.propagate import extract

        inside = trace.get_current_span().get_span_context().is_valid
        context = None if inside or not self._parent else extract({"traceparent": self._parent})
        with self._tracer.start_as_current_span(
            name, context=context, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(trace.StatusCode.ERROR)
                raise

    def stage(self, name: str, seconds: float, rows_in: int, rows_out: int) -> None:
        """Notes a finished stage."""
        labels = {"job": self.job, "stage": name}
        self._set("instructue_stage_seconds", "Duration of a stage.", seconds, labels)
        self._set("instructue_stage_rows_in", "Rows a stage was given.", rows_in, labels)
        self._set("instructue_stage_rows_out", "Rows a stage made.", rows_out, labels)

    def finish(self, exit_code: int, result: Mapping[str, Any] | None = None) -> None:
        """Notes how the job ended, and writes, pushes and exports everything; no failure of that fails the job."""
        now, labels = time.time(), {"job": self.job}
        self._set("instructue_job_seconds", "Duration of the last job.", now - self._started, labels)
        self._set("instructue_job_exit_code", "Exit code of the last job.", exit_code, labels)
        self._set("instructue_job_finished_timestamp_seconds", "When the last job ended.", now, labels)
        if exit_code == 0:
            self._set("instructue_job_success_timestamp_seconds", "When a job last succeeded.", now, labels)
        self._result(result or {})
        if self._registry is not None:
            from prometheus_client import push_to_gateway, write_to_textfile

            try:
                if self._file:
                    write_to_textfile(self._file, self._registry)
                if self._gateway:
                    push_to_gateway(self._gateway, job=f"instructue_{self.job}", registry=self._registry, timeout=10)
            except Exception as error:  # whatever a network does, the embeddings are there
                self.warnings.append(f"metrics could not be delivered: {type(error).__name__}")
        if self._provider is not None:
            self._provider.shutdown()

    def _result(self, result: Mapping[str, Any]) -> None:
        run = result.get("run") or {}
        for name, text in _RUN_GAUGES.items():
            if name in run:
                self._set(f"instructue_run_{name}", text, run[name], {"job": self.job})
        extract = result.get("extract") or (result if "counts" in result else {})
        for source, counts in (extract.get("counts") or {}).items():
            labels = {"job": self.job, "source": source}
            self._set("instructue_rows_read", "Raw rows read.", counts["read"], labels)
            self._set("instructue_rows_kept", "Raw rows that count.", counts["kept"], labels)
            for reason, number in counts["quarantined"].items():
                self._set("instructue_rows_quarantined", "Refused rows.", number, {**labels, "reason": reason})

    def _set(self, name: str, text: str, value: float, labels: Mapping[str, str]) -> None:
        if self._registry is None:
            return
        from prometheus_client import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, list(labels), registry=self._registry)
        self._gauges[name].labels(**labels).set(value)

    def _make_tracer(self, env: Mapping[str, str]) -> Any:
        """A tracer of the application's own provider, or of one that exports over OTLP; `None` when nobody asked."""
        try:
            from opentelemetry import trace
        except ImportError:
            if env.get(OTLP_ENDPOINT):
                self.warnings.append("traces are asked for, but OpenTelemetry is missing: install the extra `tracing`")
            return None
        try:
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError:
            return None
        provider = trace.get_tracer_provider()
        if isinstance(provider, TracerProvider):
            return provider.get_tracer("instructue")
        if not env.get(OTLP_ENDPOINT):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            self.warnings.append("traces are asked for, but the OTLP exporter is missing: install the extra `tracing`")
            return None
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = env.get("OTEL_SERVICE_NAME", "instructue")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return self._provider.get_tracer("instructue")

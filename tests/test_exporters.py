"""Traces and metrics arrive where the settings say; and nothing that is wrong there delays the end."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import exporters
from app.errors import SettingsError
from app.exporters import open_telemetry
from app.metrics import NO_METER
from app.settings import Settings, load
from app.tracing import NO_TRACER, begin

QUEUE = "projects/the-project/locations/somewhere/queues/q"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP. `silent`: it takes connections, and never answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: dict[str, bytes] = {}
        self.silent = False
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.silent:
            self.server.over.wait()
            return
        self.server.received[self.path] = body
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """The test looks at what arrived."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setattr(exporters, "FLUSH", 60)  # long enough for what does arrive
        yield collector
        collector.over.set()
        collector.shutdown()
        thread.join()


def settings(telemetry: str) -> Settings:
    return load(database_url="postgresql://u:p@h/d", telemetry=telemetry, queue=QUEUE, worker="w-1", revision="r-1")


async def use(telemetry: str) -> None:
    async with open_telemetry(settings(telemetry)) as opened:
        opened.meter.create_counter("proctor.test").add(3)
        with begin(opened.tracer, "push", execution="e.1"):
            pass


def arrived(collector: Collector) -> tuple[ExportTraceServiceRequest, ExportMetricsServiceRequest]:
    traces, metrics = ExportTraceServiceRequest(), ExportMetricsServiceRequest()
    traces.ParseFromString(collector.received["/v1/traces"])
    metrics.ParseFromString(collector.received["/v1/metrics"])
    return traces, metrics


async def test_off_is_the_default_and_records_nothing() -> None:
    async with open_telemetry(load(database_url="postgresql://u:p@h/d")) as telemetry:
        assert (telemetry.tracer, telemetry.meter) == (NO_TRACER, NO_METER)


async def test_otlp_sends_what_is_left_at_the_end_to_where_opentelemetry_s_variables_say(collector: Collector) -> None:
    await use("otlp")
    traces, metrics = arrived(collector)
    (spans,) = traces.resource_spans
    assert [span.name for span in spans.scope_spans[0].spans] == ["push"]
    about = {a.key: a.value.string_value for a in spans.resource.attributes}
    assert (about["service.name"], about["service.version"], about["service.instance.id"]) == ("proctor", "r-1", "w-1")
    (told,) = metrics.resource_metrics
    assert [metric.name for metric in told.scope_metrics[0].metrics] == ["proctor.test"]


async def test_a_collector_that_does_not_answer_keeps_nobody(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be waited for by its exporter, for ten seconds a try."""
    monkeypatch.setattr(exporters, "FLUSH", 0.05)
    collector.silent = True
    await use("otlp")
    assert not collector.over.is_set()
    assert collector.received == {}


async def test_google_is_sent_to_with_the_worker_s_credentials_and_told_the_project(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "GOOGLE", collector.url)
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), None))  # type: ignore[no-untyped-call]
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    await use("google")
    traces, _ = arrived(collector)
    about = {a.key: a.value.string_value for a in traces.resource_spans[0].resource.attributes}
    assert (about["gcp.project_id"], about["cloud.region"]) == ("the-project", "somewhere")


async def test_without_its_extra_google_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.resourcedetector", None)
    with pytest.raises(SettingsError, match=r"^PROCTOR_TELEMETRY: google needs the extra `google`: pip install .*\.$"):
        await use("google")


async def test_without_credentials_google_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: Any) -> Any:
        raise DefaultCredentialsError("nobody")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(google.auth, "default", nobody)
    with pytest.raises(SettingsError, match="needs Google credentials"):
        await use("google")

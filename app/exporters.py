"""Where traces and metrics go: OpenTelemetry's SDK, made once for the application and handed down.

Nothing is set globally, so applications in one process do not meet, and libraries that look for a global provider find
none. The standard `OTEL_…` variables say the rest: endpoint, headers, sampler, interval. The SDK is imported only when it
is wanted.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry.metrics import Meter
from opentelemetry.trace import Tracer

from app.errors import SettingsError
from app.metrics import NO_METER
from app.settings import Settings
from app.tracing import NO_TRACER

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

FLUSH = 1.0
"""Seconds in which what has not been sent yet is sent at the end; then it is dropped. Ours: of the 10 s that Cloud Run
gives, draining takes up to 8."""

GOOGLE = "https://telemetry.googleapis.com"
"""Google's OTLP endpoint. Its exporters of its own for Trace and Monitoring are deprecated in its favour (2026)."""

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
NAME = "proctor"
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Telemetry:
    """By default nothing is recorded, and that costs nothing."""

    tracer: Tracer = NO_TRACER
    meter: Meter = NO_METER


@asynccontextmanager
async def open_telemetry(settings: Settings) -> AsyncIterator[Telemetry]:
    """As `PROCTOR_TELEMETRY` says. Raises `SettingsError` if the extra it takes is not installed, or Google knows nobody."""
    if settings.telemetry == "off":
        yield Telemetry()
        return
    session = await asyncio.to_thread(_google_session) if settings.telemetry == "google" else None
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # an argument that is None is looked up in the environment
    traces = OTLPSpanExporter(endpoint=f"{GOOGLE}/v1/traces" if session else None, session=session)
    metrics = OTLPMetricExporter(endpoint=f"{GOOGLE}/v1/metrics" if session else None, session=session)
    resource = await asyncio.to_thread(_resource, settings)
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(traces))
    meters = MeterProvider([PeriodicExportingMetricReader(metrics)], resource=resource, shutdown_on_exit=False)
    try:
        yield Telemetry(tracers.get_tracer(NAME), meters.get_meter(NAME))
    finally:
        if not await asyncio.shield(_within(FLUSH, tracers.shutdown, meters.shutdown)):
            log.warning("the last traces and metrics could not be sent in time", seconds=FLUSH)
            traces.shutdown()  # type: ignore[no-untyped-call]  # no more tries
            metrics.shutdown()


async def _within(seconds: float, *ends: Callable[[], None]) -> bool:
    """Calls them all at once, in threads that nobody waits for any longer than that: a collector that is gone must not
    keep the process. Whether all have returned."""
    loop = asyncio.get_running_loop()
    done = [asyncio.Event() for _ in ends]

    def call(end: Callable[[], None], event: asyncio.Event) -> None:
        with suppress(Exception):
            end()
        with suppress(RuntimeError):  # the loop may be gone by now
            loop.call_soon_threadsafe(event.set)

    for end, event in zip(ends, done, strict=True):
        threading.Thread(target=call, args=(end, event), daemon=True, name="flush telemetry").start()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for event in done:
                await event.wait()
    return all(event.is_set() for event in done)


def _resource(settings: Settings) -> "Resource":
    """Who tells. On Google Cloud also where: it wants the project and, for metrics, the location (Telemetry API, v1.metrics).
    Where the platform does not say, the queue's name does."""
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create(
        {"service.name": NAME, "service.version": settings.revision, "service.instance.id": settings.worker}
    )
    if settings.telemetry != "google":
        return resource
    from opentelemetry.resourcedetector.gcp_resource_detector import GoogleCloudResourceDetector
    from opentelemetry.sdk.resources import get_aggregated_resources

    of_the_queue = Resource({"gcp.project_id": settings.project, "cloud.region": settings.location})
    found = get_aggregated_resources([GoogleCloudResourceDetector()], timeout=3)
    return of_the_queue.merge(found).merge(resource)


def _google_session() -> Any:
    """Sends with the worker's own Google credentials."""
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError
        from google.auth.transport.requests import AuthorizedSession
        from opentelemetry.resourcedetector import gcp_resource_detector  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "PROCTOR_TELEMETRY: google needs the extra `google`: pip install 'proctor[google]'."
        ) from error
    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
    except DefaultCredentialsError as error:
        raise SettingsError(
            "PROCTOR_TELEMETRY: google needs Google credentials: give the service a service account, or run"
            " `gcloud auth application-default login`."
        ) from error
    return AuthorizedSession(credentials)  # type: ignore[no-untyped-call]  # the library's

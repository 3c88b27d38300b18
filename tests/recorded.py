"""Traces and metrics kept in memory, to be read back: the SDK's own, and of nobody else in this process."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.exporters import Telemetry

PATIENCE = 60
"""Seconds: what takes longer is stuck."""


class Recorded:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.telemetry = Telemetry(tracers.get_tracer("test"), self._meters.get_meter("test"))

    def spans(self, name: str | None = None, **attributes: Any) -> list[ReadableSpan]:
        """That have ended, in that order."""
        wanted = {f"proctor.{key}": value for key, value in attributes.items()}
        ended = self._exporter.get_finished_spans()
        return [s for s in ended if name in (None, s.name) and wanted.items() <= (s.attributes or {}).items()]

    def below(self, span: ReadableSpan) -> list[ReadableSpan]:
        """Its children."""
        return [s for s in self.spans() if s.parent and s.parent.span_id == id_of(span)]

    async def until(self, number: int, name: str, **attributes: Any) -> list[ReadableSpan]:
        """At least so many of them have ended."""
        async with asyncio.timeout(PATIENCE):
            while len(found := self.spans(name, **attributes)) < number:
                await asyncio.sleep(0.02)
        return found

    def metrics(self) -> Mapping[str, Metric]:
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in (data.resource_metrics if data else ()) for scope in resource.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str, **attributes: str) -> Sequence[Any]:
        metric = self.metrics().get(name)
        points = metric.data.data_points if metric else ()
        return [p for p in points if attributes.items() <= (p.attributes or {}).items()]

    def value(self, name: str, **attributes: str) -> float:
        """The sum over all that have these attributes; of a histogram, how often it was recorded."""
        points = self.points(name, **attributes)
        return sum(p.count if isinstance(p, HistogramDataPoint) else p.value for p in points)


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context
    return context.span_id


def trace_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context
    return context.trace_id

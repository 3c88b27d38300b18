"""One trace for each evaluation: from its submission through every push, claim, run and settle.

The context of the span `submit` is kept with the evaluation and goes into the headers of each Cloud Task made for it, by
whomever: the push that fans out, a retry, the sweeper. So all pushes of an evaluation are children of its `submit`.

It goes there twice. `traceparent` lets the platform's own spans and request log join the trace; but on its way through
Cloud Run's front end it gets another parent and another sampling decision (Cloud Run's documentation: at most one request
in ten seconds of an instance is sampled), so what a push goes by is `HEADER`, which nobody else writes. What came in as
`traceparent` becomes a link. For the same reason `submit` begins a trace of its own.

The tracer travels with the context: who is below a span that records makes children of it, anybody else makes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NoOpTracer, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

HEADER = "X-Proctor-Traceparent"
"""W3C's `traceparent`, under a name that no proxy rewrites."""

NO_TRACER: Tracer = NoOpTracer()

_TRACER = contexts.create_key("proctor.tracer")
_W3C = TraceContextTextMapPropagator()


@contextmanager
def begin(
    tracer: Tracer, name: str, parent: str | None = None, *, kind: SpanKind = SpanKind.SERVER, **attributes: Any
) -> Iterator[Span]:
    """A span of this worker's own making, child of `parent` (a `traceparent`) or else the root of a new trace. Where the
    caller is in a trace already, there is a link to it."""
    came_from = trace.get_current_span().get_span_context()
    span = tracer.start_span(
        name,
        context=from_text(parent),
        kind=kind,
        attributes=_named(attributes),
        links=[Link(came_from)] if came_from.is_valid else None,
    )
    if not span.get_span_context().is_valid:  # nobody records: what came in stays what logs refer to
        yield span
        return
    token = contexts.attach(contexts.set_value(_TRACER, tracer, trace.set_span_in_context(span)))
    try:
        with _told_of_errors(span):
            yield span
    finally:
        contexts.detach(token)
        span.end()


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span]:
    """A child of the current span, if that one records; else nothing at all."""
    tracer = contexts.get_value(_TRACER)
    current = trace.get_current_span()
    if not isinstance(tracer, Tracer) or not current.is_recording():
        yield trace.INVALID_SPAN
        return
    with (
        tracer.start_as_current_span(
            name, attributes=_named(attributes), record_exception=False, set_status_on_exception=False
        ) as child,
        _told_of_errors(child),
    ):
        yield child


def event(name: str, **attributes: Any) -> None:
    """On the current span."""
    trace.get_current_span().add_event(name, _named(attributes))


def tell(span: Span, **attributes: Any) -> None:
    """What is known only later."""
    span.set_attributes(_named(attributes))


def failed(span: Span, error_class: str) -> None:
    """Whose fault, and no more: an error's message may hold what a model or an agent said."""
    span.set_attribute("error.type", error_class)
    span.set_status(StatusCode.ERROR)


def about(execution_id: str, attempt: int | None = None) -> dict[str, Any]:
    """The fields of a log line that concerns another execution than the one whose push is being served, or none is."""
    return {"evaluation": execution_id.partition(".")[0], "execution": execution_id, "attempt": attempt}


def to_text() -> str | None:
    """The current span as a `traceparent`; None: there is none."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return carrier.get("traceparent")


def from_text(traceparent: str | None) -> Context:
    """A context with that remote span alone; empty if it is none, or not well-formed."""
    return _W3C.extract({"traceparent": traceparent} if traceparent else {}, Context())


def headers(traceparent: str | None) -> dict[str, str]:
    """For a Cloud Task of this trace."""
    return {"traceparent": traceparent, HEADER: traceparent} if traceparent else {}


@contextmanager
def coming_from(traceparent: str | None) -> Iterator[None]:
    """Inside, the caller's span is the current one: what is logged can be found by it, and `begin` links to it."""
    token = contexts.attach(_W3C.extract({"traceparent": traceparent} if traceparent else {}))
    try:
        yield
    finally:
        contexts.detach(token)


@contextmanager
def _told_of_errors(span: Span) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failed(span, type(error).__qualname__)
        raise


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """In a namespace of their own; what is None is left out."""
    return {
        f"proctor.{name}": value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in attributes.items()
        if value is not None
    }

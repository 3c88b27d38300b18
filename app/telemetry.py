"""Structured logs: JSON in Cloud Logging's fields, or readable lines on a terminal.

The fields are those that Cloud Logging's agent lifts out of a line of JSON: ``severity``, ``message``, and under
``logging.googleapis.com/`` the trace and the labels. A line with a stack is one that Error Reporting takes up.
"""

import logging
import sys
from typing import Any, TextIO

import structlog
from opentelemetry import trace

from app.redaction import Redaction
from app.settings import Settings, secrets

LABELS = ("evaluation", "execution", "attempt")
_GOOGLE = "logging.googleapis.com"
_REPORTED = "type.googleapis.com/google.devtools.clouderrorreporting.v1beta1.ReportedErrorEvent"
_NOISY = ("httpx", "httpcore", "alembic", "google", "fsspec", "urllib3", "opentelemetry", "uvicorn.access")


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """For the whole process, uvicorn's and the libraries' own loggers included. To be called once, at start-up. `stream`:
    where lines go; by default stderr."""
    stream = stream or sys.stderr
    as_json = settings.log_format == "json" or (settings.log_format is None and not stream.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    last: list[Any] = [_CloudLogging(settings)] if as_json else []
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,  # before the redaction; and never with the values of variables
            *last,
            Redaction(secrets(settings)),
            _json() if as_json else _console(),
        ],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _CloudLogging:
    """A processor. The labels are also plain fields, which are what a person filters a terminal's JSON by."""

    def __init__(self, settings: Settings) -> None:
        self._project = settings.project
        self._worker = {"worker": settings.worker, "revision": settings.revision}
        self._service = {"service": "proctor", "version": settings.revision}

    def __call__(self, _: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        event["severity"] = str(event.pop("level", "info")).upper()
        event["message"] = event.pop("event", "")
        labels = {**self._worker, **{name: event.get(name) for name in LABELS}}
        event[f"{_GOOGLE}/labels"] = {name: str(value) for name, value in labels.items() if value not in (None, "")}
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            event[f"{_GOOGLE}/trace"] = f"projects/{self._project}/traces/{span.trace_id:032x}"
            event[f"{_GOOGLE}/spanId"] = f"{span.span_id:016x}"
            event[f"{_GOOGLE}/trace_sampled"] = span.trace_flags.sampled
        if stack := event.pop("exception", None):
            event["stack_trace"] = f"{event['message']}\n{stack}"
            if event["severity"] in ("ERROR", "CRITICAL"):
                event |= {"@type": _REPORTED, "serviceContext": self._service}
        return event


def _json() -> Any:
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _console() -> Any:
    """Its usual way to show an exception includes every variable, prompts and keys among them."""
    return structlog.dev.ConsoleRenderer(timestamp_key="time", exception_formatter=structlog.dev.plain_traceback)

"""Structured logs: JSON in Cloud Logging's fields, or readable lines on a terminal. Metrics: OpenTelemetry's."""

import logging
import sys
from typing import Any

import structlog
from opentelemetry import metrics

from app.settings import Settings


def configure_logging(settings: Settings) -> None:
    """For the whole process, uvicorn's and the libraries' own loggers included. To be called once, at start-up."""
    as_json = settings.log_format == "json" or (settings.log_format is None and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    renderer = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(timestamp_key="time")
    last: list[Any] = [_cloud_logging, structlog.processors.format_exc_info] if as_json else []
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    for noisy in ("httpx", "httpcore", "alembic", "google", "fsspec", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _cloud_logging(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """`severity` and `message` are the names that Cloud Logging reads."""
    event["severity"] = str(event.pop("level", "info")).upper()
    event["message"] = event.pop("event", "")
    return event


def meter() -> metrics.Meter:
    """Of the process's meter provider; without one its instruments cost nothing and keep nothing."""
    return metrics.get_meter("proctor")

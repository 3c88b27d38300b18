"""All that the process logs, as the service would write it."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from app.settings import Settings
from app.telemetry import configure_logging


class Logged:
    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def saying(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["message"] == message]


@contextmanager
def logged(settings: Settings, **given: Any) -> Iterator[Logged]:
    """Instead of where the process logs otherwise. `given`: settings, over those that log everything as JSON."""
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers, root.level
    stream = io.StringIO()
    everything: dict[str, Any] = {"log_level": "debug", "log_format": "json", **given}
    configure_logging(settings.model_copy(update=everything), stream)
    try:
        yield Logged(stream)
    finally:
        root.handlers = handlers
        root.setLevel(level)
        structlog.configure(**configured)

"""The service as a process: uvicorn around the application."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

import uvicorn
from fastapi import FastAPI

from app.main import create_app
from app.settings import Settings, load
from app.telemetry import configure_logging

GRACE = 8
"""Seconds for requests under way after SIGTERM; Cloud Run kills after 10."""


def config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )


def serve() -> None:
    """Runs until SIGTERM or SIGINT. Raises `SettingsError` before anything is started, and `DatabaseRefused` when the
    database is one that the service cannot work with."""
    settings = load()
    configure_logging(settings)
    app = create_app(settings)
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(lambda _: app.state.refused is None)  # it would tell in a traceback what one line says
    try:
        uvicorn.Server(config(app, settings)).run()
    except SystemExit:
        if app.state.refused is None:
            raise
        raise app.state.refused from None


class InnerServer(uvicorn.Server):
    """The service inside a process that does other things too: signals are the process's own business."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

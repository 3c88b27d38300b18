"""The service as a process: uvicorn around the application."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socket import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from app.leases import Leases
from app.main import create_app
from app.settings import Settings, load
from app.telemetry import configure_logging

log = structlog.get_logger(__name__)

DRAIN = 7
"""Seconds for executions to stop and to be settled after SIGTERM. Cloud Run kills after 10."""

GRACE = 1
"""Seconds for requests still under way after that."""


def config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",  # by name: without it the service does not start, rather than being slower
        http="httptools",
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
        Server(config(app, settings), app).run()
    except SystemExit:
        if app.state.refused is None:
            raise
        raise app.state.refused from None


class Server(uvicorn.Server):
    """Drains before it stops: a push that is answered has been settled, and only then are its connections closed."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; a second ends it at once, and so does the first before it serves."""
        if not self.started or self._draining is not None:
            super().handle_exit(sig, frame)
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain_and_stop(sig, frame), name="drain")

    async def drain(self) -> None:
        """Not ready at once, nothing claimed any more; returns when everything held has been given back, or after
        `DRAIN` seconds."""
        leases: Leases | None = self._app.state.leases
        if leases is None:
            return
        held, began = len(leases), time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN):
                await leases.drain()
        seconds = round(time.monotonic() - began, 3)
        log.info("drained", executions=held, unsettled=len(leases), seconds=seconds)

    async def _drain_and_stop(self, sig: int, frame: FrameType | None) -> None:
        try:
            await self.drain()
        finally:
            super().handle_exit(sig, frame)


class InnerServer(Server):
    """The service inside a process that does other things too: signals are the process's own business."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config, app)
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

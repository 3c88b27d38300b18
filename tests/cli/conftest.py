"""The service for this folder: the real application on a database of its own, with nobody at its queue, so that
evaluations stay in the state that a test puts them into."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import IPPROTO_TCP, socket
from uuid import uuid4

import asyncpg
import pytest

from app.database.engine import open_engine
from app.database.session import Database
from app.ledger import Ledger
from app.main import create_app
from app.serve import InnerServer, config
from app.settings import Settings, load
from tests.conftest import TEMPLATE, of_database

DEADLINE = 120
"""Seconds for one command, on a machine with much else to do."""


@dataclass(frozen=True)
class Service:
    url: str
    ledger: Ledger


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
async def service(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """Once for all tests of a module; they tell their evaluations apart."""
    database_url = await _clone(postgres)
    folder = tmp_path_factory.mktemp("cli")
    with socket(proto=IPPROTO_TCP) as listener, socket() as nobody:
        listener.bind(("127.0.0.1", 0))
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        settings = load(
            database_url=database_url,
            queue_endpoint=_address(nobody),
            queue_patience=0.05,
            artifacts=f"file://{folder}/artifacts",
            scratch=folder / "scratch",
            log_level="error",
        )
        async with _serving(settings, listener), open_engine(settings) as engine:
            ledger = Ledger(Database(engine, settings), lease=60, worker="worker-1")
            yield Service(f"http://{_address(listener)}", ledger)


async def _clone(postgres: str) -> str:
    name = f"cli_{uuid4().hex}"
    connection = await asyncpg.connect(postgres)
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    finally:
        await connection.close()
    return of_database(postgres, name)


def _address(bound: socket) -> str:
    host, port = bound.getsockname()
    return f"{host}:{port}"


@asynccontextmanager
async def _serving(settings: Settings, listener: socket) -> AsyncIterator[None]:
    """In this event loop, its signals left alone."""
    app = create_app(settings)
    server = InnerServer(config(app, settings), app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    assert ready.done(), "the service ended while it was starting"
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def refused() -> Iterator[str]:
    """The address of nobody."""
    with socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        yield f"http://{_address(nobody)}"


class Proctor:
    """The command in a process of its own, as users run it: no terminal, and nothing set that they have not."""

    def __init__(self, url: str, folder: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PROCTOR_") and k not in TERMINAL}
        self.environment = {**kept, "PROCTOR_URL": url, "PYTHONWARNINGS": "error"}
        self._folder = folder

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "app.cli", *arguments]

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.command(*arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, **environment},
            cwd=self._folder,
        )

    async def __call__(self, *arguments: str, **environment: str) -> Ran:
        return await self.end(await self.start(*arguments, **environment))

    async def end(self, process: asyncio.subprocess.Process) -> Ran:
        try:
            async with asyncio.timeout(DEADLINE):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            raise
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())


TERMINAL = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "COLUMNS", "LINES"}
"""Variables that make rich believe something about the terminal."""


@pytest.fixture
def proctor(service: Service, tmp_path: Path) -> Proctor:
    return Proctor(service.url, tmp_path)


@pytest.fixture
def at(tmp_path: Path) -> Callable[[str], Proctor]:
    """The command for a service somewhere else."""
    return lambda url: Proctor(url, tmp_path)

"""A database behind a proxy, short deadlines, and work whose every execution leaves a trace."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from structlog import DropEvent
from structlog.testing import capture_logs

from app.database.engine import open_engine
from app.database.session import Database
from app.settings import Settings, load
from tests.faults.alloydb import AlloyDB, open_alloydb
from tests.faults.connection import Cut
from tests.faults.proxy import Proxy

CUTS: list[Cut] = ["fin", "rst", "silence", "drop"]
STUCK = 20
"""Seconds: what takes longer is stuck."""

BRISK: dict[str, Any] = {
    "ping_timeout": 0.25,
    "socket_timeout": 0.5,
    "statement_timeout": 0.9,
    "connect_timeout": 2,
    "pool_timeout": 5,
    "database_patience": STUCK,
    "worker": "worker-1",
}
"""Scaled down. Each deadline is several times shorter than the next, so that what took long enough for one of them is
told apart from what waited for another, on a busy machine too; none reaches the second after which a held session is
logged."""

PID = text("/* test.pid */ SELECT pg_backend_pid() AS pid")
WORK = text("""/* test.work */
WITH done AS (INSERT INTO executions (work) VALUES (:work))
INSERT INTO effects (work) VALUES (:work) ON CONFLICT (work) DO UPDATE SET work = excluded.work RETURNING work
""")


class Traces:
    """What `WORK` left behind, looked up past the proxy."""

    def __init__(self, direct: Any) -> None:
        self._direct = direct

    async def executions(self, work: int = 1) -> int:
        """How often it was carried out and committed."""
        return int(await self._direct.fetchval("SELECT count(*) FROM executions WHERE work = $1", work))

    async def effects(self) -> list[int]:
        return [row["work"] for row in await self._direct.fetch("SELECT work FROM effects ORDER BY work")]


@pytest.fixture(autouse=True)
def _heard(every_log: None) -> None:
    """What these tests do not find in the logs must not be missing for another reason."""


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    async with Proxy(server_of(database_url)) as proxy:
        yield proxy


@pytest.fixture
async def direct(database_url: str) -> AsyncIterator[Any]:
    """A connection past the proxy."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def traces(direct: Any) -> Traces:
    await direct.execute("CREATE TABLE executions (work int); CREATE TABLE effects (work int PRIMARY KEY)")
    return Traces(direct)


@pytest.fixture
def brisk(proxy: Proxy, database_url: str) -> Settings:
    return load(**BRISK, database_url=proxy.through(database_url))


@pytest.fixture
async def pool(brisk: Settings) -> AsyncIterator[AsyncEngine]:
    async with open_engine(brisk) as engine:
        yield engine


@pytest.fixture
def proxied(pool: AsyncEngine, brisk: Settings) -> Database:
    return Database(pool, brisk)


@pytest.fixture
async def alloydb(database_url: str, tmp_path: Path) -> AsyncIterator[AlloyDB]:
    async with open_alloydb(database_url, tmp_path) as alloydb:
        yield alloydb


def server_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


async def pid_of(database: Database) -> int:
    """Of the backend that serves the next session."""
    (row,) = await database.run(PID)
    return int(row.pid)


async def transact(database: Database, work: int = 1, *, patience: float | None = None) -> Any:
    """`WORK` in a transaction."""

    async def once(connection: AsyncConnection) -> Any:
        return (await connection.execute(WORK, {"work": work})).scalar_one()

    return await database.transaction(once, patience=patience)


async def fill(engine: AsyncEngine, connections: int) -> list[int]:
    """So many idle connections in the pool; returns the pids of their backends."""
    held = await asyncio.gather(*(engine.connect() for _ in range(connections)))
    pids = [int((await one.execute(PID)).scalar_one()) for one in held]
    for one in held:
        await one.close()
    return pids


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(STUCK):
        while not condition():
            await asyncio.sleep(0.005)


async def until_true(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(STUCK):
        while not await condition():
            await asyncio.sleep(0.01)


async def until_gone(direct: Any, pids: list[int]) -> None:
    """The server has ended these backends."""
    living = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)"

    async def gone() -> bool:
        return bool(await direct.fetchval(living, pids) == 0)

    await until_true(gone)


class Stopwatch:
    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ended: float | None = None

    def stop(self) -> None:
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self._began


@contextmanager
def measured(what: str) -> Iterator[Stopwatch]:
    """How long the block takes; told with `pytest -rP`."""
    watch = Stopwatch()
    yield watch
    watch.stop()
    print(f"{what}: {watch.seconds:.3f} s")


@contextmanager
def unnoticed() -> Iterator[None]:
    """In the block no call is tried again, nor anything else logged: whatever was wrong, the pool has seen to it."""
    with capture_logs() as logs:
        yield
    assert logs == []


@contextmanager
def ridden_out() -> Iterator[list[MutableMapping[str, Any]]]:
    """In the block at least one call is tried again; yields what is logged each time."""
    with capture_logs(processors=[_but_of_long_sessions]) as logs:
        yield logs
    assert {entry["event"] for entry in logs} == {"database call is tried again"}


def _but_of_long_sessions(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if event["event"] == "a database session is held for long":
        raise DropEvent
    return event

"""A database behind a proxy, short deadlines, and work whose every execution leaves a trace."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
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
from tests.faults.connection import Cut, CutPoint, Moment
from tests.faults.proxy import Proxy

CUTS: list[Cut] = ["fin", "rst", "silence", "drop"]
SILENT: list[Cut] = ["silence", "drop"]
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
"""Scaled down, each several times shorter than the next. For what shows that a deadline holds: a healthy connection may
meet them too, on a machine that stands still for as long."""

DEADLINES = ("ping_timeout", "socket_timeout", "statement_timeout", "connect_timeout", "pool_timeout")
CALM = BRISK | dict.fromkeys(DEADLINES, STUCK)
"""None that is met unless something is stuck. One that a test is about is taken from `BRISK`: whatever then ends in less
was ended by that."""

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

    async def fit(self, executions: int, retries: list[Any], how: Cut) -> bool:
        """Whether it was carried out so often, if it was tried again once; each further try, where the machine stood still
        for as long as silence may last, can have carried it out once more."""
        assert len(retries) == 1 or how in SILENT
        return executions <= await self.executions() < executions + len(retries)

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
async def hasty(brisk: Settings) -> AsyncIterator[Database]:
    async with open_engine(brisk) as engine:
        yield Database(engine, brisk)


@pytest.fixture
def calm(proxy: Proxy, database_url: str) -> Settings:
    return load(**CALM, database_url=proxy.through(database_url))


@pytest.fixture
async def pool(calm: Settings) -> AsyncIterator[AsyncEngine]:
    async with open_engine(calm) as engine:
        yield engine


@pytest.fixture
def proxied(pool: AsyncEngine, calm: Settings) -> Database:
    return Database(pool, calm)


class Clock:
    """What pools tell ages by; `ahead`: by so many seconds."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sqlalchemy.pool.base.time", SimpleNamespace(time=clock.time))
    return clock


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
    """So many idle connections in the pool; returns the pids of their backends. They are asked nothing: those opened
    first may be idle for too long while the others log in."""
    held = await asyncio.gather(*(engine.connect() for _ in range(connections)))
    pids = [pid_behind((await one.get_raw_connection()).driver_connection) for one in held]
    for one in held:
        await one.close()
    return pids


def pid_behind(raw: Any) -> int:
    """As the server told it at the login."""
    return int(raw.get_server_pid())


def cut_once(database: Database, proxy: Proxy, pattern: str, moment: Moment, how: Cut) -> CutPoint:
    """Cuts the next connection at that place. Until then a session has little time where the cut is silent, for only that
    ends the wait for a reply; from then on enough. Where the machine stands still for as long as the little time, the
    next try is cut instead."""

    def then() -> None:
        point.remove()
        database._deadline = STUCK

    if how in SILENT:
        database._deadline = BRISK["statement_timeout"]
    point = proxy.cut_at(pattern, moment, how, times=100, then=then)
    return point


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
def no_farewell() -> Iterator[None]:
    """In the block no connection is closed as the driver does it, which waits for the other side to close too."""
    with patch.object(asyncpg.Connection, "close", autospec=True) as close:
        yield
    close.assert_not_called()


@contextmanager
def unnoticed() -> Iterator[None]:
    """In the block no call is tried again: whatever was wrong, the pool has seen to it."""
    with capture_logs(processors=[_only_retries]) as logs:
        yield
    assert logs == []


@contextmanager
def ridden_out() -> Iterator[list[MutableMapping[str, Any]]]:
    """In the block at least one call is tried again; yields what is logged each time."""
    with capture_logs(processors=[_only_retries]) as logs:
        yield logs
    assert logs


def _only_retries(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Sessions are long where the machine stands still, and others in this process have more to tell."""
    if event["event"] != "database call is tried again":
        raise DropEvent
    return event

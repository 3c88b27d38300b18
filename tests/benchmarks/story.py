"""The worker of the story, before and after its fix: SQLAlchemy's pool, set in different ways, under the same queue.

An evaluation is an agent's run and a judge's; each writes one row when it ends. The session is either held throughout, as
it was, or opened around each write. Without idempotence a delivery that is repeated writes its rows again.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.database.connect import Connect
from tests.benchmarks.arrivals import Arrival
from tests.benchmarks.gauges import Gauge

AGENT_SHARE = 0.4
"""Of an evaluation's time; its tests and the judge have the rest."""
DELIVERIES = 2
"""At most; then the evaluation is lost. The queue's default is 100, which would only take longer."""
BACKOFF = 0.05
"""Seconds before a delivery is repeated: 5 s, scaled."""

TABLES = """
CREATE TABLE story_results (evaluation int NOT NULL, stage text NOT NULL);
CREATE TABLE story_results_once (evaluation int NOT NULL, stage text NOT NULL, PRIMARY KEY (evaluation, stage));
"""
_START = text("SELECT count(*) FROM story_results WHERE evaluation = :evaluation")
_WRITE = text("INSERT INTO story_results VALUES (:evaluation, :stage)")
_WRITE_ONCE = text("INSERT INTO story_results_once VALUES (:evaluation, :stage) ON CONFLICT DO NOTHING")


@dataclass(frozen=True, slots=True)
class Ways:
    """`recycle`: seconds. `held`: the session lasts as long as the evaluation. `once`: writes are idempotent."""

    recycle: float
    pre_ping: bool
    held: bool
    once: bool


@asynccontextmanager
async def open_pool(connect: Connect, ways: Ways, pool_timeout: float) -> AsyncIterator[AsyncEngine]:
    """SQLAlchemy as it comes. `pool_timeout`: seconds."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_recycle=ways.recycle,
        pool_pre_ping=ways.pre_ping,
        pool_size=5,
        max_overflow=10,
        pool_timeout=pool_timeout,
    )
    try:
        yield engine
    finally:
        await asyncio.shield(engine.dispose())


def kernel_gives_up(connection: Any, seconds: float) -> None:
    """Data that nobody acknowledges breaks the connection after `seconds`: the kernel's own 924 s (tcp_retries2 = 15,
    `Documentation/networking/ip-sysctl`), scaled."""
    sock = connection._transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


class Worker:
    """One instance of the service as it was, with its pool."""

    def __init__(self, engine: AsyncEngine, ways: Ways, gauge: Gauge) -> None:
        self._engine = engine
        self._ways = ways
        self._gauge = gauge
        gauge.watch(engine)

    async def deliver(self, arrival: Arrival) -> None:
        """As the queue does: again, until it is answered with success, or given up."""
        for _ in range(DELIVERIES):
            try:
                await self._evaluate(arrival)
            except Exception as error:  # what the service answers with 500
                self._gauge.fail(arrival.number, _kind(error))
                await asyncio.sleep(BACKOFF)
            else:
                return
        self._gauge.lost += 1

    async def _evaluate(self, arrival: Arrival) -> None:
        if not self._ways.held:
            await self._call(_START, arrival)
            await asyncio.sleep(arrival.lasts * AGENT_SHARE)
            await self._call(self._write, arrival, "agent")
            await asyncio.sleep(arrival.lasts * (1 - AGENT_SHARE))
            await self._call(self._write, arrival, "judge")
            return
        with self._gauge.call():
            connection = await self._engine.connect()
        try:
            await self._commit(connection, _START, arrival)
            await asyncio.sleep(arrival.lasts * AGENT_SHARE)
            await self._commit(connection, self._write, arrival, "agent")
            await asyncio.sleep(arrival.lasts * (1 - AGENT_SHARE))
            await self._commit(connection, self._write, arrival, "judge")
        finally:
            await connection.close()

    @property
    def _write(self) -> Any:
        return _WRITE_ONCE if self._ways.once else _WRITE

    async def _call(self, statement: Any, arrival: Arrival, stage: str | None = None) -> None:
        with self._gauge.call():
            async with self._engine.begin() as connection:
                await connection.execute(statement, _parameters(arrival, stage))

    async def _commit(
        self, connection: AsyncConnection, statement: Any, arrival: Arrival, stage: str | None = None
    ) -> None:
        with self._gauge.call():
            await connection.execute(statement, _parameters(arrival, stage))
            await connection.commit()


def _parameters(arrival: Arrival, stage: str | None) -> dict[str, Any]:
    return {"evaluation": arrival.number} | ({"stage": stage} if stage else {})


def _kind(error: BaseException) -> str:
    """The driver's own word, below SQLAlchemy's."""
    cause = getattr(error, "orig", None) or error
    return f"{type(cause.__cause__ or cause).__name__}: {cause}".splitlines()[0][:120]


async def count(connection: Any, gauge: Gauge, ways: Ways) -> None:
    """What is in the database in the end, against what must be."""
    table = "story_results_once" if ways.once else "story_results"
    gauge.twice = await connection.fetchval(
        f"SELECT count(DISTINCT evaluation) FROM (SELECT evaluation FROM {table} GROUP BY evaluation, stage"
        " HAVING count(*) > 1) AS doubled"
    )
    whole = await connection.fetchval(
        f"SELECT count(*) FROM (SELECT evaluation FROM {table} GROUP BY evaluation HAVING count(DISTINCT stage) = 2) AS w"
    )
    gauge.lost = gauge.evaluations - whole

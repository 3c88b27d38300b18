"""Races with a known winner: transitions that are made but not committed yet, so that others must wait for them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import Executable, Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.database.session import Database
from app.ledger import Ledger

T = TypeVar("T")


class _OneTransaction(Database):
    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def run(
        self, statement: Executable, parameters: dict[str, Any] | None = None, *, patience: float | None = None
    ) -> Sequence[Row[Any]]:
        result = await self._connection.execute(statement, parameters)
        return result.all() if result.returns_rows else ()

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]], *, patience: float | None = None) -> T:
        return await work(self._connection)


@asynccontextmanager
async def uncommitted(engine: AsyncEngine, worker: str = "worker-2") -> AsyncIterator[Ledger]:
    """A ledger whose transitions hold their locks, unseen by others, until the block ends and commits them."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            yield Ledger(_OneTransaction(connection), lease=120, worker=worker)


async def until_blocked(database: Database, statements: int = 1) -> None:
    """So many statements wait for a lock that somebody holds."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(10):
        while True:
            ((blocked,),) = await database.run(waiting)
            if blocked >= statements:
                return
            await asyncio.sleep(0.005)

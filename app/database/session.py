"""The only way to the database: brief sessions, one statement or one short transaction each.

No session is held while anything slow happens. All work that comes here is idempotent or fenced, so whatever fails for
the connection's sake (dropped, timed out, its COMMIT's reply lost) is simply done again, until the caller's patience ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import asyncpg
import structlog
from sqlalchemy import Executable, Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay, wait_random_exponential

from app.errors import DatabaseUnavailable

T = TypeVar("T")
log = structlog.get_logger(__name__)

# Connection gone (08, 57P), server shutting down or starting, read-only after a failover (25006), out of connections or
# memory for now (53), serialization and deadlock (40001, 40P01), lock or statement out of time (55P03, 57014).
TRANSIENT_CLASSES = ("08", "53")
TRANSIENT_STATES = frozenset({"25006", "40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "57P05"})


class Database:
    """Runs statements on `engine`; `patience` is how long (seconds) transient failures are ridden out by default."""

    def __init__(self, engine: AsyncEngine, patience: float) -> None:
        self.engine = engine
        self._patience = patience

    async def run(
        self, statement: Executable, parameters: dict[str, Any] | None = None, *, patience: float | None = None
    ) -> Sequence[Row[Any]]:
        """All rows of one autocommitted statement."""

        async def work(connection: AsyncConnection) -> Sequence[Row[Any]]:
            result = await connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()

        return await self._patiently(lambda: self._once(work), patience)

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]], *, patience: float | None = None) -> T:
        """`work` in one READ COMMITTED transaction. It may run more than once, so it must do nothing but statements."""

        async def committed(connection: AsyncConnection) -> T:
            await connection.execution_options(isolation_level="READ COMMITTED")
            async with connection.begin():
                return await work(connection)

        return await self._patiently(lambda: self._once(committed), patience)

    async def _once(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        connection = await self.engine.connect()
        try:
            return await work(connection)
        except (TimeoutError, asyncio.CancelledError, OSError):
            await _terminate(connection)  # the server may still be at it: nobody else may get this connection
            raise
        finally:
            await asyncio.shield(connection.close())

    async def _patiently(self, once: Callable[[], Awaitable[T]], patience: float | None) -> T:
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_delay(self._patience if patience is None else patience),
            wait=wait_random_exponential(multiplier=0.05, max=3),
            before_sleep=_tell,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await once()
            raise AssertionError("tenacity re-raises the last error")
        except Exception as error:
            if is_transient(error):
                raise DatabaseUnavailable(f"The database did not answer: {_reason(error)}") from error
            raise


def is_transient(error: BaseException) -> bool:
    """Whether the connection or the moment is to blame, so that the same statement may well succeed on another."""
    if isinstance(error, PoolTimeout | OSError):  # OSError includes TimeoutError, which the driver does not translate
        return True
    if isinstance(error, asyncpg.PostgresError):  # while connecting
        return _state_is_transient(error.sqlstate)
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or _state_is_transient(getattr(error.orig, "sqlstate", None))
    return isinstance(error, asyncpg.InterfaceError)


def _state_is_transient(state: str | None) -> bool:
    return state is not None and (state in TRANSIENT_STATES or state[:2] in TRANSIENT_CLASSES)


def _reason(error: BaseException) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0].removesuffix(": ")


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        log.warning("database call is tried again", attempt=state.attempt_number, reason=_reason(error))


async def _terminate(connection: AsyncConnection) -> None:
    """Cuts the connection without a word to the server, and takes it out of the pool."""
    raw = (await connection.get_raw_connection()).driver_connection
    if raw is not None:
        raw.terminate()
    await connection.invalidate()

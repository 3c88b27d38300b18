"""The only way to the database: brief sessions, one statement or one short transaction each.

No session is held while anything slow happens: whoever tries is told so. All work that comes here is idempotent or fenced,
so whatever fails for the connection's sake (dropped, timed out, its COMMIT's reply lost) is simply done again, until the
caller's patience ends.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
import structlog
from opentelemetry.metrics import Meter
from sqlalchemy import Executable, Row, TextClause
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay, wait_random_exponential

from app.database.connect import statement_limit
from app.database.failures import data_refusal, describe, is_transient, refusal
from app.database.stacks import stack_of
from app.errors import DatabaseRefused, DatabaseUnavailable, DataRefused, SessionHeld
from app.metrics import NO_METER, SessionFigures
from app.settings import Settings
from app.tracing import span

LONG = 1.0
"""Seconds after which a session that is still held is logged, with what it waits for. The issue's number; a usual one
lasts some milliseconds."""

OVERFLOW_AFTER = 0.1
"""Seconds that a session waits for one of the pool's own connections before it has another opened. Ours: a session lasts
some milliseconds and a TLS login takes tens, so a batch that begins is served sooner by five connections than by fifteen,
and slow logins do not beget more logins."""

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]
log = structlog.get_logger(__name__)


class Database:
    """Runs statements on `engine`. A session has `statement_timeout` seconds, and transient failures are ridden out for
    `database_patience` seconds unless the caller says otherwise. `meters`: where the figures go; by default nowhere."""

    def __init__(self, engine: AsyncEngine, settings: Settings, meters: Meter = NO_METER) -> None:
        self.engine = engine
        self._deadline = settings.statement_timeout
        self._patience = settings.database_patience
        self._pooled = asyncio.Semaphore(settings.pool_size)
        self._autocommit = not settings.pooled
        self.statement_limit = statement_limit(settings)
        self._figures = SessionFigures(meters)

    async def run(
        self, statement: Executable, parameters: dict[str, Any] | None = None, *, patience: float | None = None
    ) -> Sequence[Row[Any]]:
        """All rows of one autocommitted statement; in a transaction of its own where a session lasts no longer."""

        async def work(connection: AsyncConnection) -> Sequence[Row[Any]]:
            result = await connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()

        once = work if self._autocommit else _committed(work)
        return await self._patiently(lambda: self._session(once, _name(statement)), patience)

    async def transaction(self, work: Work[T], *, patience: float | None = None) -> T:
        """`work` in one READ COMMITTED transaction. It may run more than once, so it must do nothing but statements."""
        return await self._patiently(lambda: self._session(_committed(work), _place(work)), patience)

    async def _session(self, work: Work[T], by: str) -> T:
        """One try: a connection, the work on it, and back with it, or out with it if it may still be at work."""
        refuse_held_session("open another")
        began = time.monotonic()
        with span(by):
            async with self._turn():
                connection = await self.engine.connect()
                self._figures.waited(time.monotonic() - began)
                try:
                    with self._held(by):
                        async with asyncio.timeout(self._deadline):
                            return await _work_or_terminate(work, connection)
                finally:
                    await asyncio.shield(connection.close())

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """As many at once as the pool keeps connections for; whoever has waited long enough comes on top of that."""
        with anyio.move_on_after(OVERFLOW_AFTER) as waiting:
            await self._pooled.acquire()
        try:
            yield
        finally:
            if not waiting.cancelled_caught:
                self._pooled.release()

    @contextmanager
    def _held(self, by: str) -> Iterator[None]:
        hold = _Hold(by)
        token = _holding.set(hold)
        watch = asyncio.get_running_loop().call_later(LONG, hold.tell)
        try:
            yield
        finally:
            watch.cancel()
            hold.over = True
            _holding.reset(token)
            self._figures.held(time.monotonic() - hold.began)

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
                raise DatabaseUnavailable(f"The database did not answer: {describe(error)}") from error
            if reason := refusal(error):
                raise DatabaseRefused(f"The database refused: {reason}") from error
            if never := data_refusal(error):
                raise DataRefused(f"The database refuses it: {never[0]}", by_content=never[1]) from error
            raise


class _Hold:
    """One session while it is held."""

    def __init__(self, by: str) -> None:
        self.by = by
        self.began = time.monotonic()
        self.over = False
        self._task = asyncio.current_task()

    def tell(self) -> None:
        log.warning(
            "a database session is held for long",
            by=self.by,
            seconds=round(time.monotonic() - self.began, 3),
            stack=stack_of(self._task) if self._task else "",
        )


_holding: ContextVar[_Hold | None] = ContextVar("_holding", default=None)


def refuse_held_session(what: str) -> None:
    """To be called before anything slow begins: `what`, in words. Raises `SessionHeld` if the caller, or whoever started
    its task, is inside a database session."""
    hold = _holding.get()
    if hold is not None and not hold.over:
        raise SessionHeld(f"{hold.by} holds a database session and must not {what} before it has returned.")


def _committed(work: Work[T]) -> Work[T]:
    async def committed(connection: AsyncConnection) -> T:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            return await work(connection)

    return committed


async def _work_or_terminate(work: Work[T], connection: AsyncConnection) -> T:
    try:
        return await work(connection)
    except (OSError, asyncio.CancelledError):  # OSError includes TimeoutError
        await _terminate(connection)  # the server may still be at it: nobody else may get this connection
        raise


async def _terminate(connection: AsyncConnection) -> None:
    """Cuts the connection without a word to the server, and takes it out of the pool."""
    if connection.invalidated:
        return
    raw = (await connection.get_raw_connection()).driver_connection
    if raw is not None:
        raw.terminate()
    await connection.invalidate()


def _name(statement: Executable) -> str:
    """The statement's own name, if it brings one in front (`/* ledger.claim */`), else its beginning. To compile anything
    but text for it would cost more than the statement."""
    beginning = statement.text[:80].split() if isinstance(statement, TextClause) else [type(statement).__name__]
    return beginning[1] if beginning[0] == "/*" else " ".join(beginning)


def _place(work: Work[Any]) -> str:
    code = getattr(work, "__code__", None)
    where = f" ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno})" if code else ""
    return f"{getattr(work, '__module__', '')}.{getattr(work, '__qualname__', type(work).__qualname__)}{where}"


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        log.warning("database call is tried again", attempt=state.attempt_number, reason=describe(error))

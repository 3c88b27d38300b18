"""The engine: a pool whose strategy fits the infrastructure, not the application's hopes.

Connections that sit idle are dropped silently after about ten minutes on the way to AlloyDB; so none lives past
``pool_recycle`` (180 s), each is pinged before use, and no ping, statement, connect or close may wait for ever.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from opentelemetry.metrics import Meter
from sqlalchemy import Connection, ExceptionContext, event
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from app.database.connect import open_connector, transaction_settings
from app.database.failures import state_of, this_server_is_gone
from app.database.watch import watch
from app.metrics import NO_METER
from app.settings import Settings

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# OSError: time-outs and TLS among it; the last: the server has said FATAL, and the end of the stream is still to come
_NO_ANSWER = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


@asynccontextmanager
async def open_engine(settings: Settings, *, lifo: bool = True, meters: Meter = NO_METER) -> AsyncIterator[AsyncEngine]:
    """The engine for these settings, disposed of at the end. Opening it connects to nothing yet.

    `lifo`: the connection used last is used next, so that under little work the others fall idle and the server ends
    them; a queue would keep all of them just young enough. Measured by ``python -m tests.benchmarks pool``.
    """
    async with open_connector(settings) as connect:
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connect,
            isolation_level=usual_isolation(settings),
            connect_args=UNNAMED if settings.pooled else {},
            hide_parameters=True,  # in errors, which are logged: they are specs and results
            json_serializer=to_json,
            pool_recycle=settings.pool_recycle,
            pool_pre_ping=settings.pool_pre_ping,
            pool_size=settings.pool_size,
            max_overflow=settings.max_overflow,
            pool_timeout=settings.pool_timeout,
            pool_use_lifo=lifo,
        )
        bound_ping(engine, settings.ping_timeout, simple=settings.pooled)
        close_at_once(engine)
        notice_dead_servers(engine)
        watch(engine, meters, settings.pool_recycle)
        if settings.pooled:
            limit_each_transaction(engine, settings)
            execute_at_once(engine)
        try:
            yield engine
        finally:
            await asyncio.shield(engine.dispose())


def usual_isolation(settings: Settings) -> IsolationLevel:
    """Autocommit: a ping and a statement are one round trip each; transactions ask for READ COMMITTED. But the driver
    prepares a statement and executes it in two steps, between which a pooler may take the session away from whoever is in
    no transaction."""
    return "READ COMMITTED" if settings.pooled else "AUTOCOMMIT"


UNNAMED: dict[str, Any] = {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str}
"""For the driver: a statement without a name is the session's until the next, and leaves nothing behind."""


def limit_each_transaction(engine: AsyncEngine, settings: Settings) -> None:
    """Sets `transaction_settings` as a transaction begins: one statement, and nothing of it is left after it. Postgres
    has had `transaction_timeout` since 17."""
    given = transaction_settings(settings)
    newest = f"set_config('transaction_timeout', '{given.pop('transaction_timeout')}', true)"
    usual = ", ".join(f"set_config('{name}', {_quoted(value)}, true)" for name, value in given.items())
    since = "current_setting('server_version_num')::int >= 170000"
    statement = f"SELECT {usual}, CASE WHEN {since} THEN {newest} END"

    def set_limits(connection: Connection) -> None:
        if not _in_no_transaction(connection):
            connection.exec_driver_sql(statement)

    event.listen(engine.sync_engine, "begin", set_limits)


def execute_at_once(engine: AsyncEngine) -> None:
    """In one step what a migration does outside a transaction, as an index that is made concurrently. It returns no rows."""

    def do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        if parameters or not _in_no_transaction(context.root_connection):
            return False
        await_only(context.root_connection.connection.driver_connection.execute(statement))
        return True

    event.listen(engine.sync_engine, "do_execute", do_execute)


def _in_no_transaction(connection: Connection) -> bool:
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def bound_ping(engine: AsyncEngine, timeout: float, *, simple: bool = False) -> None:
    """Replaces the driver's unbounded ping: a connection that stays silent for `timeout` seconds is terminated, and the
    pool opens another. It then trusts none that is older, so that one silence is waited out, not five in a row. `simple`:
    in one step, not two that a pooler may part."""

    def do_ping(connection: Any) -> bool:
        raw = connection.driver_connection
        try:
            await_only(answer(raw))
        except _NO_ANSWER:
            raw.terminate()
            return False
        return True

    async def answer(raw: Any) -> None:
        async with asyncio.timeout(timeout):  # not wait_for, which can lose a cancellation on Python 3.11
            await (raw.execute("SELECT 1") if simple else raw.fetchrow(";"))

    engine.dialect.do_ping = do_ping  # type: ignore[method-assign,assignment]  # the dialect is this engine's own


def close_at_once(engine: AsyncEngine) -> None:
    """Closes connections without a farewell: the driver waits for the other side to close too, 2 s when it recycles a
    connection and for ever when it returns one too many, which is what a black hole takes. The server sees the
    end of the stream all the same, and ends the session."""

    def do_close(connection: Any) -> None:
        connection.driver_connection.terminate()

    engine.dialect.do_close = do_close  # type: ignore[method-assign,assignment]  # this engine's own, too
    engine.dialect.do_terminate = do_close  # type: ignore[method-assign,assignment]


def notice_dead_servers(engine: AsyncEngine) -> None:
    """A server that shuts down, or is read-only after a failover, still answers pings: what it says counts as a
    disconnect, for all connections of the pool."""

    def look(context: ExceptionContext) -> None:
        if this_server_is_gone(state_of(context.original_exception)):
            context.is_disconnect = True

    event.listen(engine.sync_engine, "handle_error", look)


def to_json(value: Any) -> str:
    """JSON that `jsonb` takes: what agents print may hold NUL or half a surrogate pair, and Postgres refuses both. Each
    becomes U+FFFD, so that no result is lost over a character."""
    return json.dumps(_storable(value), ensure_ascii=False, allow_nan=False)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_storable(k): _storable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(v) for v in value]
    return value

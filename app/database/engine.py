"""The engine: a pool whose strategy fits the infrastructure, not the application's hopes.

Connections that sit idle are dropped silently after about ten minutes on the way to AlloyDB; so none lives past
``pool_recycle`` (180 s), each is pinged before use, and no ping, statement or connect may wait for ever.
"""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from app.settings import Settings

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_NO_ANSWER = (OSError, ssl.SSLError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """The engine for these settings, disposed of at the end. Opening it connects to nothing yet."""
    engine = create_async_engine(
        database_url(settings),
        # autocommit: a ping and a statement are one round trip each; transactions ask for READ COMMITTED
        isolation_level="AUTOCOMMIT",
        json_serializer=to_json,
        pool_recycle=settings.pool_recycle,
        pool_pre_ping=settings.pool_pre_ping,
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout,
        connect_args={
            "timeout": settings.connect_timeout,
            "command_timeout": settings.statement_timeout,
            "server_settings": server_settings(settings),
        },
    )
    bound_ping(engine, settings.ping_timeout)
    try:
        yield engine
    finally:
        await asyncio.shield(engine.dispose())


def database_url(settings: Settings) -> URL:
    return make_url(settings.database_url.get_secret_value()).set(drivername="postgresql+asyncpg")


def server_settings(settings: Settings) -> dict[str, str]:
    """What the server itself shall enforce: it stops a statement before the client gives up on it (9/10), because a
    client's cancellation does not reach it through direct TLS; and READ COMMITTED, whatever the server's default is."""
    limit = str(int(settings.statement_timeout * 900))
    return {
        "application_name": f"proctor {settings.worker}"[:63],
        "statement_timeout": limit,
        "idle_in_transaction_session_timeout": limit,
        "default_transaction_isolation": "read committed",
    }


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


def bound_ping(engine: AsyncEngine, timeout: float) -> None:
    """Replaces the driver's unbounded ping: a connection that stays silent for `timeout` seconds is terminated (a
    graceful close would wait two more), and the pool opens another."""

    def do_ping(connection: Any) -> bool:
        raw = connection.driver_connection
        try:
            await_only(asyncio.wait_for(raw.fetchrow(";"), timeout))
        except _NO_ANSWER:
            raw.terminate()
            return False
        return True

    engine.dialect.do_ping = do_ping  # type: ignore[method-assign,assignment]  # the dialect is this engine's own

"""One connection to the database: AlloyDB through Google's connector, or any Postgres by its URL.

Opening it has one deadline for all of it: the Admin API (whose own client tries for longer than anyone waits), TLS, login.
What it is told on the way bounds the rest of its life, at both ends.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import make_url

from app.database.alloydb import open_instance
from app.settings import Settings

Connect = Callable[[], Awaitable[Any]]
"""Opens one asyncpg connection."""

KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds, seconds, number: an idle connection is asked for a sign of life after 30 s and given up within 60 s. Ours: far
below the ten minutes after which the network forgets an idle connection, so that it hardly ever gets there."""

TRIM_AT = 4 / 3
"""Part of `pool_recycle` after which the server itself ends an idle session (240 s): past its use, and while the way to it
still exists. A pool closes nothing by itself, and once the network has dropped a connection its server side stays for
hours. Ours."""


@asynccontextmanager
async def open_connector(settings: Settings) -> AsyncIterator[Connect]:
    """How to connect, by these settings. Connects to nothing yet. Raises `DatabaseRefused` without Google credentials."""
    options: dict[str, Any] = {"command_timeout": settings.statement_timeout}
    # a pooler refuses start-up settings that it does not know, and keeps no statement from one transaction to the next
    options |= {"statement_cache_size": 0} if settings.pooled else {"server_settings": server_settings(settings)}
    if settings.database_url is not None:
        dsn = make_url(settings.database_url.get_secret_value()).set(drivername="postgresql")
        address = dsn.render_as_string(hide_password=False)
        yield _tuned(lambda: asyncpg.connect(address, **options), settings)
        return
    # the driver gives up before the deadline for all of it: only then does the connector doubt the address it knows
    options["timeout"] = settings.connect_timeout * 0.9
    password = settings.alloydb_password.get_secret_value() if settings.alloydb_password else None
    options |= {"user": settings.alloydb_user, "password": password, "db": settings.alloydb_database}
    async with open_instance(settings) as instance:
        yield _tuned(lambda: instance.connect(**options), settings)


def server_settings(settings: Settings) -> dict[str, str]:
    """What the server itself shall enforce: it stops a statement before the client gives up on it (9/10), because a
    client's cancellation does not reach it through direct TLS; and READ COMMITTED, whatever the server's default is.

    None of these limits ends a transaction whose client falls silent between preparing a statement and executing it, which
    the driver does in two steps: the server is neither idle nor at work then. `transaction_timeout` does; it came with
    Postgres 17, so it is set once connected. Before 17 only TCP's keepalive does, and where AlloyDB's proxy is in between
    it asks the wrong peer: such a transaction can keep its locks for as long as the proxy lets it."""
    limit = statement_limit(settings)
    return {
        "application_name": f"proctor {settings.worker}"[:63],
        "statement_timeout": limit,
        "idle_in_transaction_session_timeout": limit,
        "idle_session_timeout": _milliseconds(settings.pool_recycle * TRIM_AT),
        "default_transaction_isolation": "read committed",
        "tcp_keepalives_idle": str(KEEPALIVE["TCP_KEEPIDLE"]),
        "tcp_keepalives_interval": str(KEEPALIVE["TCP_KEEPINTVL"]),
        "tcp_keepalives_count": str(KEEPALIVE["TCP_KEEPCNT"]),
    }


def transaction_settings(settings: Settings) -> dict[str, str]:
    """What each transaction sets for itself where a session does not last: the same limits."""
    limit = statement_limit(settings)
    return {
        "application_name": f"proctor {settings.worker}"[:63],
        "statement_timeout": limit,
        "idle_in_transaction_session_timeout": limit,
        "transaction_timeout": limit,
    }


def statement_limit(settings: Settings) -> str:
    """Milliseconds after which the server itself ends a statement, or a transaction that is idle."""
    return _milliseconds(settings.statement_timeout * 0.9)


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _tuned(connect: Connect, settings: Settings) -> Connect:
    async def tuned() -> Any:
        async with asyncio.timeout(settings.connect_timeout):
            connection = await connect()
            try:
                await tune(connection, settings)
            except BaseException:
                connection.terminate()
                raise
        return connection

    return tuned


async def tune(connection: Any, settings: Settings) -> None:
    """Keepalive for an idle connection, and TCP_USER_TIMEOUT for one with data under way, which keepalive does not watch.
    asyncpg offers neither; its transport is the only way to its socket."""
    sock = connection._transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.socket_timeout * 1000))
    if connection.get_server_version() >= (17,) and not settings.pooled:
        await connection.execute(f"SET transaction_timeout = {statement_limit(settings)}")

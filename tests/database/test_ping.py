"""A ping at the worst moment: the server has said FATAL to an idle connection, and the end of the stream is still to come.

The moment lasts a few milliseconds at each failover, longer for a process that stood still. No real server holds it, so
here is one that says just enough of the protocol (Postgres manual, chapter "Frontend/Backend Protocol").
"""

import asyncio
from collections.abc import AsyncIterator
from struct import pack, unpack
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import greenlet_spawn

from app.database.engine import bound_ping
from app.database.failures import is_transient


def message(kind: bytes, body: bytes) -> bytes:
    return kind + pack("!I", 4 + len(body)) + body


HELLO = b"".join(
    message(kind, body)
    for kind, body in [
        (b"R", pack("!I", 0)),
        (b"S", b"server_version\x0017.0\x00"),
        (b"S", b"client_encoding\x00UTF8\x00"),
        (b"K", pack("!II", 1, 2)),
        (b"Z", b"I"),
    ]
)
FATAL = message(b"E", b"SFATAL\x00VFATAL\x00C57P01\x00Mterminating connection due to administrator command\x00\x00")


@pytest.fixture
async def condemned() -> AsyncIterator[Any]:
    """A connection that has been told FATAL, and has not ended."""
    sentence, told = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = unpack("!I", await reader.readexactly(4))
        await reader.readexactly(length - 4)
        writer.write(HELLO)
        await sentence.wait()
        writer.write(FATAL)
        told.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        raw = await asyncpg.connect(host="127.0.0.1", port=port, user="u", password="p", database="d", ssl=False)
        sentence.set()
        await told.wait()
        for _ in range(10):  # it lies in the socket, and this loop reads it in its next round
            await asyncio.sleep(0)
        assert not raw.is_closed()
        yield raw
        raw.terminate()


async def test_a_condemned_connection_fails_its_ping_and_is_ended(condemned: Any) -> None:
    engine = create_async_engine("postgresql+asyncpg://")
    bound_ping(engine, timeout=30)
    assert await greenlet_spawn(engine.dialect.do_ping, SimpleNamespace(driver_connection=condemned)) is False
    assert condemned.is_closed()


async def test_what_the_driver_says_of_a_condemned_connection_is_tried_again_on_another(condemned: Any) -> None:
    with pytest.raises(asyncpg.InternalClientError) as met:
        await condemned.fetchrow(";")
    assert is_transient(met.value)

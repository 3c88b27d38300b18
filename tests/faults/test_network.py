"""The kernel-level drop is silent, and leaves nothing behind. The kernel's own counters (TCP_INFO) say what happened."""

import asyncio
import errno
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import psutil
import pytest
from sqlalchemy import make_url

from tests.faults.network import Network, open_network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

PATIENCE = 20
"""Seconds: what takes longer is stuck."""

ESTABLISHED, SYN_SENT = 1, 2
LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


@pytest.fixture
async def network(postgres: str) -> AsyncIterator[Network]:
    async with open_network(upstream(postgres)) as network:
        yield network


def upstream(postgres: str) -> tuple[str, int]:
    url = make_url(postgres)
    assert url.host
    assert url.port
    return url.host, url.port


async def connected(network: Network, postgres: str) -> tuple[Any, Any]:
    """A connection and its socket."""
    raw = await asyncpg.connect(network.through(postgres), timeout=PATIENCE)
    return raw, raw._transport.get_extra_info("socket")


def tcp(sock: Any) -> tuple[int, int, int]:
    """Of struct tcp_info: the state, retransmissions in a row without an answer, keepalive probes without an answer."""
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    return information[0], information[2], information[3]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_query_crosses_the_network(network: Network, postgres: str) -> None:
    raw, sock = await connected(network, postgres)
    assert await raw.fetchval("SELECT repeat('x', 1000000)") == "x" * 1_000_000
    assert sock.getpeername() == network.address != upstream(postgres)
    await raw.close()


async def test_a_dropped_query_hangs_in_silence_and_comes_back_with_the_packets(
    network: Network, postgres: str
) -> None:
    raw, sock = await connected(network, postgres)
    await network.drop()
    query = asyncio.create_task(raw.fetchval("SELECT 1"))
    await until(lambda: tcp(sock)[1] >= 2)
    assert tcp(sock)[0] == ESTABLISHED
    assert not query.done()
    assert await seen_by_server(postgres, raw) == ""
    await network.restore()
    assert await asyncio.wait_for(query, PATIENCE) == 1
    await raw.close()


async def seen_by_server(postgres: str, raw: Any) -> str:
    """The last query of a connection that reached the server."""
    direct = await asyncpg.connect(postgres)
    query = await direct.fetchval("SELECT query FROM pg_stat_activity WHERE pid = $1", raw.get_server_pid())
    await direct.close()
    return str(query)


async def test_replies_are_dropped_too(network: Network, postgres: str) -> None:
    raw, sock = await connected(network, postgres)
    other = await asyncpg.connect(postgres)
    await other.execute("SELECT pg_advisory_lock(1)")
    query = asyncio.create_task(raw.fetchval("SELECT pg_advisory_lock(1)::text"))
    async with asyncio.timeout(PATIENCE):
        while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            await asyncio.sleep(0.02)
    await network.drop()
    await other.close()  # lets the query end
    with far_end(sock) as far:
        await until(lambda: tcp(far)[1] >= 2)
        assert (tcp(far)[0], tcp(sock)[0]) == (ESTABLISHED, ESTABLISHED)
        assert not query.done()
    await network.restore()
    assert await asyncio.wait_for(query, PATIENCE) == ""
    await raw.close()


def far_end(sock: Any) -> socket.socket:
    """The other end of a client's connection: this process holds it too."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            found = socket.socket(fileno=os.dup(fd))
            with suppress(OSError):
                if found.getpeername() == sock.getsockname():
                    return found
            found.close()
    raise AssertionError("no such connection")


async def test_user_timeout_ends_a_dropped_query(network: Network, postgres: str) -> None:
    raw, sock = await connected(network, postgres)
    milliseconds = 1500
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    await network.drop()
    began = time.monotonic()
    with pytest.raises(LOST) as failure:
        await asyncio.wait_for(raw.fetchval("SELECT 1"), PATIENCE)
    assert not isinstance(failure.value, TimeoutError) or failure.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - began >= milliseconds / 1000
    assert raw.is_closed()


async def test_no_connection_is_made_while_packets_are_dropped(network: Network, postgres: str) -> None:
    await network.drop()
    with socket.socket() as sock:
        sock.setblocking(False)
        attempt = asyncio.create_task(asyncio.get_running_loop().sock_connect(sock, network.address))
        await until(lambda: tcp(sock)[1] >= 1)
        assert tcp(sock)[0] == SYN_SENT
        assert not attempt.done()
        attempt.cancel()
        await asyncio.wait([attempt])
    await network.restore()
    raw, _ = await connected(network, postgres)
    assert await raw.fetchval("SELECT 1") == 1
    await raw.close()


async def test_keepalive_notices_on_an_idle_connection(network: Network, postgres: str) -> None:
    raw, sock = await connected(network, postgres)
    noticed = asyncio.Event()
    raw.add_termination_listener(lambda _: noticed.set())
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 2)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    await network.drop()
    await until(lambda: tcp(sock)[2] >= 1)
    assert not noticed.is_set()
    await asyncio.wait_for(noticed.wait(), PATIENCE)
    assert raw.is_closed()


async def test_nothing_stays_behind_even_if_the_block_raises(postgres: str) -> None:
    before = belongings()
    with pytest.raises(ZeroDivisionError):
        await fail_amid_a_drop(postgres)
    assert belongings() == before


async def fail_amid_a_drop(postgres: str) -> None:
    async with open_network(upstream(postgres)) as network:
        raw, _ = await connected(network, postgres)
        assert belongings()[:2] != ([], [])
        await network.drop()
        raw.terminate()
        raise ZeroDivisionError


KILLED = """
import asyncio, os, signal, socket
from tests.faults.network import open_network

async def main():
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with open_network(server.getsockname()) as network:
            with socket.socket() as client:
                client.setblocking(False)
                await asyncio.get_running_loop().sock_connect(client, network.address)
                accepted = await asyncio.to_thread(server.accept)  # kept: its end would be told to the client
                await network.drop()
                assert any(name.startswith(f"px{os.getpid()}-") for _, name in socket.if_nameindex())
                os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_nothing_stays_behind_of_a_process_that_was_killed() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED)
    assert await process.wait() == -signal.SIGKILL
    await until(lambda: not [name for _, name in socket.if_nameindex() if name.startswith(f"px{process.pid}-")])


def belongings() -> tuple[list[str], list[str], list[int]]:
    """Interfaces of this process's making, namespaces that it holds open, its children."""
    interfaces = [name for _, name in socket.if_nameindex() if name.startswith(f"px{os.getpid()}-")]
    with os.scandir("/proc/self/fd") as files:
        targets = [os.readlink(file) for file in files if os.path.lexists(file)]
    namespaces = [target for target in targets if target.startswith("net:")]
    return interfaces, namespaces, [process.pid for process in psutil.Process().children()]

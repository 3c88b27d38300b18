"""The proxy's faults, as a plain asyncpg connection (or a bare socket) sees them."""

import asyncio
import socket
import struct
import termios
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from fcntl import ioctl
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from anyio import pytest_plugin

from tests.faults.connection import Cut, Moment
from tests.faults.protocol import Client, query
from tests.faults.proxy import Proxy
from tests.timers import EARLY

CUTS: list[Cut] = ["fin", "rst", "silence", "drop"]
LOST = (asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError, ConnectionError)
STUCK = 20
"""Seconds: what takes longer is stuck."""


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """anyio keeps to the loop that it has, whatever it is asked for, as long as a fixture of the whole session needs it:
    here it shall know of none."""
    with pytest.MonkeyPatch.context() as patched:
        for name, none in {"_current_runner": None, "_runner_stack": None, "_runner_leases": 0}.items():
            patched.setattr(pytest_plugin, name, none)
        yield "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
async def _loop(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    uses_uvloop = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
    assert uses_uvloop == anyio_backend[1]["use_uvloop"]


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    async with Proxy(upstream(database_url)) as proxy:
        yield proxy


@pytest.fixture
async def direct(database_url: str) -> AsyncIterator[Any]:
    """A connection past the proxy, and a table to write to."""
    connection = await asyncpg.connect(database_url)
    await connection.execute("CREATE TABLE rows (i int)")
    yield connection
    await connection.close()


@pytest.fixture
async def connection(proxy: Proxy, direct: Any, database_url: str) -> AsyncIterator[Any]:
    async with connected(proxy, database_url) as connection:
        yield connection


@asynccontextmanager
async def connected(proxy: Proxy, database_url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(proxy.through(database_url), timeout=10)
    try:
        yield connection
    finally:
        connection.terminate()


def upstream(database_url: str) -> tuple[str, int]:
    parts = urlsplit(database_url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(STUCK):
        while not condition():
            await asyncio.sleep(0.002)


async def until_rows(direct: Any, number: int) -> None:
    async with asyncio.timeout(STUCK):
        while await direct.fetchval("SELECT count(*) FROM rows") != number:
            await asyncio.sleep(0.005)


async def until_active(direct: Any, backend: int) -> None:
    activity = "SELECT wait_event FROM pg_stat_activity WHERE pid = $1 AND state = 'active'"
    async with asyncio.timeout(STUCK):
        while await direct.fetchval(activity, backend) != "PgSleep":
            await asyncio.sleep(0.005)


@asynccontextmanager
async def bare(proxy: Proxy) -> AsyncIterator[socket.socket]:
    """A client that has said nothing yet."""
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, proxy.address)
        await until(lambda: bool(proxy.connections))
        yield sock


def unacknowledged(sock: socket.socket) -> int:
    """Bytes sent that TCP has no acknowledgement for."""
    (number,) = struct.unpack("i", ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))
    return int(number)


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_closed_connection_is_told_in_the_way_that_was_asked_for(proxy: Proxy, how: Cut) -> None:
    async with bare(proxy) as client:
        assert proxy.cut(how) == 1
        receive = asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 5)
        if how == "fin":
            assert await receive == b""
        else:
            with pytest.raises(ConnectionResetError):
                await receive
    assert proxy.connections == []


@pytest.mark.parametrize("how", ["silence", "drop"])
async def test_silence_is_acknowledged_by_tcp_and_what_is_dropped_is_not(proxy: Proxy, how: Cut) -> None:
    async with bare(proxy) as client:
        assert proxy.cut(how) == 1
        client.send(b"hello")
        if how == "silence":
            await until(lambda: unacknowledged(client) == 0)
        else:
            await asyncio.sleep(0.25)  # a delayed acknowledgement would have come after 0.04 s, a second one after 0.2
            assert unacknowledged(client) == 5
        with pytest.raises(BlockingIOError):
            client.recv(1)


@pytest.mark.parametrize("how", CUTS)
async def test_a_driver_sees_the_end_of_a_closed_connection_and_waits_on_a_silent_one(
    proxy: Proxy, connection: Any, how: Cut
) -> None:
    assert await connection.fetchval("SELECT 1") == 1
    proxy.cut(how)
    closed = how in ("fin", "rst")
    with pytest.raises(LOST if closed else TimeoutError):
        await connection.fetchval("SELECT 1", timeout=5 if closed else 0.2)


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("moment", ["before", "within", "after"])
async def test_the_moment_of_the_cut_decides_what_is_committed(
    proxy: Proxy, connection: Any, direct: Any, moment: Moment, how: Cut
) -> None:
    point = proxy.cut_at("INTO rows", moment, how)
    inserting = asyncio.create_task(connection.execute("INSERT INTO rows VALUES ($1)", 1))
    await asyncio.wait_for(point.wait(), STUCK)
    if how in ("silence", "drop"):
        await asyncio.sleep(0.1)
        assert not inserting.done()
        connection.terminate()
    with pytest.raises(LOST):
        await asyncio.wait_for(inserting, STUCK)
    if moment == "within":
        await until_rows(direct, 1)
    else:
        assert await direct.fetchval("SELECT count(*) FROM rows") == (moment == "after")
    assert point.happened == 1


async def test_within_the_client_is_cut_while_the_server_is_at_it(proxy: Proxy, connection: Any, direct: Any) -> None:
    proxy.cut_at("INTO rows", "within", "rst")
    await connection.execute("SET client_connection_check_interval = 10")  # it would stop if it were told
    async with direct.transaction():
        await direct.execute("LOCK TABLE rows IN EXCLUSIVE MODE")
        with pytest.raises(LOST):
            await connection.execute("INSERT INTO rows VALUES (1)", timeout=5)
        await asyncio.sleep(0.1)
        assert await direct.fetchval("SELECT count(*) FROM rows") == 0
    await until_rows(direct, 1)


async def test_after_nothing_of_the_reply_is_delivered(proxy: Proxy, connection: Any) -> None:
    heard: list[object] = []
    connection.add_log_listener(lambda _, notice: heard.append(notice))
    statement = "DO $$ BEGIN RAISE NOTICE 'early'; PERFORM pg_sleep(0.1); END $$"
    await connection.execute(statement)
    assert len(heard) == 1
    proxy.cut_at("NOTICE", "after", "fin")
    with pytest.raises(LOST):
        await connection.execute(statement)
    assert len(heard) == 1


@pytest.mark.parametrize(("moment", "rows"), [("before", 0), ("after", 1)])
async def test_a_commit_can_be_lost_on_its_way_there_or_back(
    proxy: Proxy, connection: Any, direct: Any, moment: Moment, rows: int
) -> None:
    proxy.cut_at("COMMIT", moment, "fin")
    with pytest.raises(LOST):
        async with connection.transaction():
            await connection.execute("INSERT INTO rows VALUES ($1)", 1)
    assert await direct.fetchval("SELECT count(*) FROM rows") == rows


async def test_a_cut_point_happens_so_many_times_and_can_be_removed(
    proxy: Proxy, direct: Any, database_url: str
) -> None:
    twice = proxy.cut_at("INTO rows", "before", "fin", times=2)
    removed = proxy.cut_at("SELECT 7", "before", "fin")
    removed.remove()
    for _ in range(2):
        async with connected(proxy, database_url) as connection:
            with pytest.raises(LOST):
                await connection.execute("INSERT INTO rows VALUES (1)")
    async with connected(proxy, database_url) as connection:
        await connection.execute("INSERT INTO rows VALUES (1)")
        assert await connection.fetchval("SELECT 7") == 7
    assert (twice.happened, removed.happened) == (2, 0)


async def test_a_cut_point_may_choose_the_statement_itself(proxy: Proxy, connection: Any, direct: Any) -> None:
    asked: list[str] = []

    def the_second(sql: str) -> bool:
        asked.append(sql)
        return len(asked) == 2

    point = proxy.cut_at(the_second, "before", "fin")
    await connection.execute("INSERT INTO rows VALUES (1)")
    with pytest.raises(LOST):
        await connection.execute("INSERT INTO rows VALUES (2)")
    assert asked == ["INSERT INTO rows VALUES (1)", "INSERT INTO rows VALUES (2)"]
    assert (point.happened, await direct.fetchval("SELECT max(i) FROM rows")) == (1, 1)


@pytest.mark.parametrize("moment", ["before", "within", "after"])
async def test_somebody_may_be_told_of_a_cut_before_the_client_is(
    proxy: Proxy, connection: Any, moment: Moment
) -> None:
    """So that the client can be killed at that very place."""
    told: list[tuple[int, int, bool]] = []

    def then() -> None:
        told.append((point.happened, len(proxy.connections), connection.is_closed()))

    point = proxy.cut_at("INTO rows", moment, "fin", then=then)
    with pytest.raises(LOST):
        await connection.execute("INSERT INTO rows VALUES ($1)", 1)
    assert told == [(0, 1, False)]
    assert (point.happened, proxy.connections) == (1, [])


async def test_a_client_that_asks_for_tls_is_told_that_there_is_none(proxy: Proxy, database_url: str) -> None:
    connection = await asyncpg.connect(proxy.through(database_url), ssl="prefer")
    assert await connection.fetchval("SELECT 1") == 1
    assert proxy.accepted == 1
    connection.terminate()


async def test_new_connections_can_be_refused_while_old_ones_work(
    proxy: Proxy, connection: Any, database_url: str
) -> None:
    proxy.refuse = True
    with pytest.raises(LOST):
        await asyncpg.connect(proxy.through(database_url), timeout=5)
    assert await connection.fetchval("SELECT 1") == 1


async def test_new_connections_can_go_unanswered(proxy: Proxy, connection: Any, database_url: str) -> None:
    proxy.unanswered = True
    with pytest.raises(TimeoutError):
        await asyncpg.connect(proxy.through(database_url), timeout=0.2)
    assert await connection.fetchval("SELECT 1") == 1
    proxy.unanswered = False
    async with connected(proxy, database_url) as another:
        assert await another.fetchval("SELECT 1") == 1


async def test_a_client_of_a_server_that_is_gone_is_reset_until_the_proxy_knows_the_new_one(
    proxy: Proxy, database_url: str
) -> None:
    server = proxy.upstream
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy.upstream = closed.getsockname()
        with pytest.raises(LOST):
            await asyncpg.connect(proxy.through(database_url), timeout=5)
    proxy.upstream = server
    async with connected(proxy, database_url) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_latency_is_added_each_way_and_not_to_every_part_of_a_transfer(proxy: Proxy, connection: Any) -> None:
    await connection.execute("SELECT 1")
    expected = "".join(str(i) for i in range(1, 500_001))  # some fifteen parts, or more
    transfer = await connection.prepare("SELECT string_agg(i::text, '' ORDER BY i) FROM generate_series(1, 500000) i")
    proxy.latency = 0.2
    times = []
    for _ in range(3):
        start = time.monotonic()
        await connection.execute("SELECT 1")
        times.append(time.monotonic() - start)
    assert 0.4 - 2 * EARLY <= min(times) < 0.8
    proxy.latency = 0.5
    start = time.monotonic()
    assert await transfer.fetchval() == expected
    assert 1 - 2 * EARLY <= time.monotonic() - start < 5


async def test_only_an_idle_connection_is_cut_and_not_before_its_time(proxy: Proxy, database_url: str) -> None:
    """One that a machine makes idle which stands still for so long proves nothing: then with another."""
    loop = asyncio.get_running_loop()
    while True:
        start = loop.time()
        proxy.idle_after = None
        async with connected(proxy, database_url) as connection:
            proxy.idle_after = 1
            if not await outlives_traffic(connection, start):
                continue
            (watched,) = proxy.connections
            await until(lambda: not proxy.connections)
            assert loop.time() - watched._last >= 1
            with pytest.raises(LOST):
                await connection.fetchval("SELECT 1")
            return


async def outlives_traffic(connection: Any, start: float) -> bool:
    """Whether it lived through more than a second in which it was never idle for one."""
    loop = asyncio.get_running_loop()
    said, before = start, start
    while loop.time() < start + 1.4:
        said, before = loop.time(), said
        try:
            assert await connection.fetchval("SELECT 1") == 1
        except LOST:
            assert loop.time() - before >= 1
            return False
        await asyncio.sleep(0.1)
    return True


async def test_after_a_failover_old_connections_answer_pings_and_refuse_writes(
    proxy: Proxy, connection: Any, direct: Any, database_url: str
) -> None:
    assert await proxy.demote() == 1
    assert await connection.fetchrow(";") is None
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await connection.execute("INSERT INTO rows VALUES ($1)", 1)
    async with connected(proxy, database_url) as another:
        await another.execute("INSERT INTO rows VALUES ($1)", 1)
    assert await direct.fetchval("SELECT count(*) FROM rows") == 1
    assert not any("read_only" in sql for sql in proxy.executed)


async def test_a_transaction_that_is_open_at_the_failover_ends_before_writes_are_refused(
    proxy: Proxy, connection: Any, direct: Any
) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await proxy.demote()
    await connection.execute("INSERT INTO rows VALUES ($1)", 1)
    await transaction.rollback()
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await connection.execute("INSERT INTO rows VALUES ($1)", 1)


async def test_round_trips_and_statements_are_counted(proxy: Proxy, connection: Any) -> None:
    async def cost(*statements: Any) -> int:
        before = proxy.round_trips
        for statement in statements:
            await statement
        return proxy.round_trips - before

    assert proxy.round_trips == 0
    assert await cost(connection.execute("SELECT 1")) == 1
    assert await cost(connection.fetchval("SELECT $1::int", 2)) == 2
    assert await cost(connection.fetchval("SELECT $1::int", 2)) == 1
    transaction = connection.transaction()
    assert await cost(transaction.start(), connection.execute("SELECT 3"), transaction.commit()) == 3
    assert list(proxy.executed) == ["SELECT 1", "SELECT $1::int", "SELECT $1::int", "BEGIN;", "SELECT 3", "COMMIT;"]
    proxy.recording = False
    await connection.execute("SELECT 4")
    assert len(proxy.executed) == 6
    assert await cost(connection.close()) == 0
    assert proxy.accepted == 1


def test_statements_are_recognised_in_whatever_pieces_they_arrive() -> None:
    def message(kind: bytes, body: bytes = b"") -> bytes:
        return kind + struct.pack("!I", 4 + len(body)) + body

    parse, bind, sync = message(b"P", b"s\0SELECT 1\0\0\0"), message(b"B", b"\0s\0" + bytes(6)), message(b"S")
    stream = parse + bind + sync + query("SELECT 2") + bind + sync
    for size in range(1, len(stream) + 1):
        client = Client()
        pieces = (stream[at : at + size] for at in range(0, len(stream), size))
        heard = [said for piece in pieces for said in client.feed(piece)]
        assert [said.sql for said in heard if said.sql] == ["SELECT 1", "SELECT 2", "SELECT 1"]
        assert client.requests == 3
        assert not client.mid_request


async def test_a_statement_is_recognised_however_large_its_arguments_are(proxy: Proxy, connection: Any) -> None:
    text = "x" * 3_000_000
    assert await connection.fetchval("SELECT $1::text", text) == text
    proxy.cut_at("length($1", "after", "fin")
    with pytest.raises(LOST):
        await connection.fetchval("SELECT length($1::text)", text)


async def test_a_cancellation_reaches_the_server(proxy: Proxy, connection: Any, direct: Any) -> None:
    sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
    await until_active(direct, connection.get_server_pid())  # the server forgets a cancellation that comes before
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    assert await asyncio.wait_for(connection.fetchval("SELECT 1"), 5) == 1
    assert proxy.accepted == 2


async def test_the_end_of_the_proxy_leaves_nothing_behind(database_url: str, direct: Any) -> None:
    """Of a statement that takes too long the driver asks the server to stop it, over a connection of its own."""
    tasks = asyncio.all_tasks()
    async with Proxy(upstream(database_url)) as proxy:
        url = proxy.through(database_url)
        names = {how: {"application_name": f"cut by {how}"} for how in [*CUTS, "nobody"]}
        connections = {how: await asyncpg.connect(url, server_settings=name) for how, name in names.items()}
        for how in CUTS:
            point = proxy.cut_at(f"SELECT '{how}'", "before", how)
            with pytest.raises((*LOST, TimeoutError)):
                await connections[how].execute(f"SELECT '{how}'", timeout=0.05)
            await asyncio.wait_for(point.wait(), STUCK)
        await until(lambda: len(proxy.connections) == 1)
    for connection in connections.values():
        connection.terminate()
    await until(lambda: not asyncio.all_tasks() - tasks)
    async with asyncio.timeout(STUCK):
        while await direct.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cut by %'"):
            await asyncio.sleep(0.01)

"""The pool: what a healthy connection costs, that it is kept, what it is told, and how it ends."""

import asyncio
import socket
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.database.connect import KEEPALIVE, TRIM_AT
from app.database.engine import open_engine
from app.database.session import Database
from app.errors import DatabaseUnavailable
from app.settings import Settings, load
from tests.database.conftest import (
    PID,
    STUCK,
    Clock,
    fill,
    measured,
    no_farewell,
    pid_of,
    ridden_out,
    unnoticed,
    until,
    until_gone,
)
from tests.faults.alloydb import AlloyDB
from tests.faults.proxy import Proxy
from tests.timers import EARLY

Loop = Callable[[], AbstractEventLoop]
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


# What it costs --------------------------------------------------------------------------------------------------------


FIRST = [11, 3, 2, 2]
"""Round trips of an engine's first statement, four times."""


async def test_a_statement_costs_its_ping_and_itself(proxied: Database, pool: AsyncEngine, proxy: Proxy) -> None:
    """Two round trips, once its connection has prepared both; each is prepared by its first use, for one more. A new
    connection needs no ping: its first statement costs two (prepare, execute). Once for each engine SQLAlchemy asks the
    server four questions, for eight more; each connection sets its `transaction_timeout`, for one. Logins are not counted."""
    assert await costs(proxied, proxy) == FIRST
    assert await costs(proxied, proxy, "SELECT 2") == [3, 2, 2, 2]
    async with pool.connect():
        assert await costs(proxied, proxy) == [3, 3, 2, 2]


async def test_a_statement_costs_the_same_over_the_connector(alloydb: AlloyDB) -> None:
    settings = load(**alloydb.settings)
    async with open_engine(settings) as engine:
        assert await costs(Database(engine, settings), alloydb.proxy) == FIRST


async def costs(database: Database, proxy: Proxy, sql: str = "SELECT 1") -> list[int]:
    """Round trips of one statement, time after time."""
    found = []
    for _ in range(4):
        before = proxy.round_trips
        await database.run(text(sql))
        found.append(proxy.round_trips - before)
    return found


async def test_a_transaction_costs_begin_and_commit_on_top(proxied: Database, proxy: Proxy) -> None:
    async def work(connection: AsyncConnection) -> None:
        await connection.execute(PID)

    await proxied.transaction(work)
    await proxied.transaction(work)
    before = proxy.round_trips
    await proxied.transaction(work)
    assert proxy.round_trips - before == 4


# That it is kept ------------------------------------------------------------------------------------------------------


async def test_a_healthy_connection_is_kept(proxied: Database, proxy: Proxy) -> None:
    with unnoticed():
        pids = {await pid_of(proxied) for _ in range(100)}
    assert len(pids) == 1
    assert proxy.accepted == 1


async def test_healthy_connections_are_kept_among_many_callers(
    proxied: Database, pool: AsyncEngine, proxy: Proxy
) -> None:
    pids = set(await fill(pool, 5))
    with unnoticed():
        for _ in range(20):
            assert set(await asyncio.gather(*(pid_of(proxied) for _ in range(5)))) <= pids
    assert proxy.accepted == 5


async def test_a_failed_statement_costs_no_connection(proxied: Database, proxy: Proxy) -> None:
    pid = await pid_of(proxied)
    for wrong in ("SELECT 1 / 0", "SELECT nothing", "SELEC", "SELECT pg_advisory_unlock(CAST('x' AS int))"):
        with pytest.raises(Exception, match=r"division|column|syntax|invalid"):
            await proxied.run(text(wrong))
    assert await pid_of(proxied) == pid
    assert proxy.accepted == 1


async def test_the_connection_used_last_is_used_next(proxied: Database, pool: AsyncEngine) -> None:
    pids = await fill(pool, 5)
    assert {await pid_of(proxied) for _ in range(10)} == {pids[-1]}


async def test_a_queue_would_use_each_in_turn(calm: Settings) -> None:
    async with open_engine(calm, lifo=False) as engine:
        pids = await fill(engine, 5)
        assert {await pid_of(Database(engine, calm)) for _ in range(10)} == set(pids)


# What it is told ------------------------------------------------------------------------------------------------------


async def test_the_settings_reach_the_pool(database_url: str) -> None:
    given = {"pool_recycle": 77, "pool_size": 3, "max_overflow": 4, "pool_timeout": 5.5}
    async with open_engine(load(database_url=database_url, **given)) as engine:
        pool: Any = engine.pool
        assert (pool._recycle, pool.size(), pool._max_overflow, pool.timeout()) == tuple(given.values())
        assert pool._pool.use_lifo
        assert pool._pre_ping
    async with open_engine(load(database_url=database_url, pool_pre_ping=False)) as engine:
        pool = engine.pool
        assert not pool._pre_ping
        assert (pool._recycle, pool.size(), pool._max_overflow, pool.timeout()) == (180, 5, 10, 30)


TOLD = {
    "statement_timeout": "27s",
    "idle_in_transaction_session_timeout": "27s",
    "idle_session_timeout": "4min",
    "application_name": "proctor worker-1",
    "transaction_isolation": "read committed",
}


async def test_the_settings_reach_the_server(settings: Settings, database: Database, direct: Any) -> None:
    """Whatever the database's own defaults are. The server stops a statement before the client gives up on it, and long
    before anybody may take its execution over."""
    (name,) = await direct.fetchrow("SELECT current_database()")
    await direct.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    assert await told(database) == TOLD
    assert 27 < settings.statement_timeout < settings.lease

    async def isolation(connection: AsyncConnection) -> Any:
        return (await connection.execute(text("SHOW transaction_isolation"))).scalar_one()

    assert await database.transaction(isolation) == "read committed"


async def test_the_settings_reach_the_server_over_the_connector(alloydb: AlloyDB) -> None:
    settings = load(**alloydb.settings, worker="worker-1")
    async with open_engine(settings) as engine:
        assert await told(Database(engine, settings)) == TOLD


async def told(database: Database) -> dict[str, str]:
    return {name: (await database.run(text(f"SHOW {name}")))[0][0] for name in TOLD}


@LOOPS
async def test_sockets_are_watched(settings: Settings, loop: Loop) -> None:
    assert await asyncio.to_thread(sockets_are_watched, settings, loop)


@LOOPS
async def test_sockets_are_watched_over_the_connector(alloydb: AlloyDB, loop: Loop) -> None:
    assert await asyncio.to_thread(sockets_are_watched, load(**alloydb.settings), loop)


def sockets_are_watched(settings: Settings, loop: Loop) -> bool:
    """On a loop of their own: anyio keeps to the one it has, where it still has one."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(_sockets_are_watched(settings))


async def _sockets_are_watched(settings: Settings) -> bool:
    """By the kernel: keepalive while they are idle, TCP_USER_TIMEOUT (milliseconds) while data is under way."""
    brief = settings.model_copy(update={"socket_timeout": 7.5})
    async with open_engine(brief) as engine, engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        sock = raw._transport.get_extra_info("socket")
        options = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE}
        user_timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        keepalive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return (keepalive, options, user_timeout) == (1, KEEPALIVE, 7500)


# How it ends ----------------------------------------------------------------------------------------------------------


async def test_past_its_age_a_connection_is_replaced_and_its_backend_ends(
    proxied: Database, calm: Settings, clock: Clock, direct: Any
) -> None:
    pid = await pid_of(proxied)
    clock.ahead += calm.pool_recycle / 2
    assert await pid_of(proxied) == pid
    clock.ahead += calm.pool_recycle / 2
    with unnoticed():
        assert await pid_of(proxied) != pid
    await until_gone(direct, [pid])


async def test_a_dead_connection_past_its_age_is_not_waited_for(
    proxied: Database, proxy: Proxy, calm: Settings, clock: Clock
) -> None:
    """No ping, no farewell: SQLAlchemy's own close gives up on a farewell after 2 s."""
    pid = await pid_of(proxied)
    proxy.cut("silence")
    clock.ahead += calm.pool_recycle + 1
    with measured("past its age, dead") as watch, unnoticed(), no_farewell():
        assert await pid_of(proxied) != pid
    assert watch.seconds < STUCK


async def test_the_server_ends_an_idle_session_and_the_next_caller_does_not_notice(calm: Settings, direct: Any) -> None:
    brief = calm.model_copy(update={"pool_recycle": 1 / TRIM_AT})  # 1 s: the caller's own login is idle at times, too
    async with open_engine(brief) as engine:
        pids = await fill(engine, 3)
        await until_gone(direct, pids)
        with unnoticed():
            assert await pid_of(Database(engine, brief)) not in pids


async def test_closing_frees_the_server_s_backends(proxy: Proxy, calm: Settings, direct: Any) -> None:
    few = calm.model_copy(update={"pool_size": 1})
    async with open_engine(few) as engine:
        kept, *returned = await fill(engine, 3)
        await until_gone(direct, returned)
        assert await pid_of(Database(engine, few)) == kept
    await until_gone(direct, [kept])
    await until(lambda: not proxy.connections)


@pytest.mark.parametrize("how", ["silence", "drop"])
async def test_closing_into_a_black_hole_waits_for_nothing(proxy: Proxy, calm: Settings, how: Any) -> None:
    """Neither a connection too many, nor the pool's end: the driver's own close would wait for ever, and for 2 s each."""
    few = calm.model_copy(update={"pool_size": 2})
    with measured(f"closing three connections amid {how}") as watch, no_farewell():
        async with open_engine(few) as engine:
            held = [await engine.connect() for _ in range(3)]
            assert proxy.cut(how) == 3
            for connection in held:
                await connection.close()
    assert watch.seconds < STUCK


# When there is none ---------------------------------------------------------------------------------------------------


async def test_an_exhausted_pool_gives_up_in_time_and_recovers(calm: Settings) -> None:
    one = calm.model_copy(update={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.2})
    async with open_engine(one) as engine:
        database = Database(engine, one)
        async with engine.connect() as connection:
            pid = (await connection.execute(PID)).scalar_one()
            with measured("an exhausted pool") as watch, pytest.raises(DatabaseUnavailable, match="QueuePool limit"):
                await database.run(PID, patience=0)
            assert 0.2 - EARLY <= watch.seconds < STUCK
        assert await pid_of(database) == pid


async def test_a_patient_caller_outlasts_an_exhausted_pool(calm: Settings) -> None:
    one = calm.model_copy(update={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05})
    async with open_engine(one) as engine:
        database = Database(engine, one)
        with ridden_out() as retries:
            async with engine.connect() as connection:
                pid = (await connection.execute(PID)).scalar_one()
                patient = asyncio.create_task(pid_of(database))
                await until(lambda: len(retries) > 0)
            assert await patient == pid

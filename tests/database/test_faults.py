"""Each fault as a caller of `app.database.session` meets it: what it sees, how long it takes, and what was done.

Nothing here waits a fault out: a cut connection stays cut (silent ones stay open) until the test ends.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.database.engine import bound_ping, open_engine
from app.database.session import Database
from app.errors import DatabaseRefused, DatabaseUnavailable
from app.local.postgres import open_postgres
from app.settings import Settings, load
from tests.database.conftest import (
    BRISK,
    CALM,
    CUTS,
    PID,
    SILENT,
    STUCK,
    WORK,
    Traces,
    cut_once,
    fill,
    measured,
    pid_behind,
    pid_of,
    ridden_out,
    server_of,
    transact,
    unnoticed,
    until,
    until_true,
)
from tests.faults.connection import Cut, Moment
from tests.faults.network import Network, open_network, why_not
from tests.faults.proxy import Proxy
from tests.recorded import Recorded

MOMENTS: list[Moment] = ["before", "within", "after"]
PING, STATEMENT = BRISK["ping_timeout"], BRISK["statement_timeout"]
COMMIT = "COMMIT;"
"""As the driver says it, unlike its `BEGIN ISOLATION LEVEL READ COMMITTED;`."""

# Idle connections -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def pinging(calm: Settings, recorded: Recorded) -> AsyncIterator[Database]:
    """Of all deadlines only its ping's is short: what ends in less than `STUCK` was ended by that."""
    given = calm.model_copy(update={"ping_timeout": PING})
    async with open_engine(given, meters=recorded.telemetry.meter) as engine:
        yield Database(engine, given)


@pytest.fixture
def recorded() -> Recorded:
    """Its own."""
    return Recorded()


@pytest.mark.parametrize("how", CUTS)
async def test_a_dead_idle_connection_is_replaced_unnoticed(pinging: Database, proxy: Proxy, how: Cut) -> None:
    pid = await pid_of(pinging)
    assert proxy.cut(how) == 1
    with measured(f"a dead idle connection, {how}") as watch, unnoticed():
        assert await pid_of(pinging) != pid
    assert watch.seconds < STUCK
    if how in SILENT:
        assert watch.seconds >= PING


@pytest.mark.parametrize("how", ["rst", "silence"])
async def test_five_dead_idle_connections_cost_one_ping(
    pinging: Database, proxy: Proxy, recorded: Recorded, how: Cut
) -> None:
    pids = await fill(pinging.engine, 5)
    assert proxy.cut(how) == 5
    with unnoticed():
        with measured(f"the first caller after five connections died, {how}"):
            found = {await pid_of(pinging)}
        bound_ping(pinging.engine, STUCK)
        with measured("the next four at once") as rest:
            found |= set(await asyncio.gather(*(pid_of(pinging) for _ in range(4))))
    assert not found & set(pids)
    assert rest.seconds < STUCK
    assert recorded.value("proctor.pool.pings_failed") == 1


@pytest.mark.parametrize("how", ["rst", "silence"])
async def test_five_callers_of_dead_connections_wait_side_by_side(
    pinging: Database, proxy: Proxy, how: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    pings = []
    do_ping: Any = pinging.engine.dialect.do_ping

    def noted(connection: Any) -> Any:
        pings.append("begins")
        try:
            return do_ping(connection)
        finally:
            pings.append("ends")

    monkeypatch.setattr(pinging.engine.dialect, "do_ping", noted)
    pids = await fill(pinging.engine, 5)
    proxy.cut(how)
    with measured(f"five callers of five dead connections, {how}"), unnoticed():
        found = set(await asyncio.gather(*(pid_of(pinging) for _ in range(5))))
    assert not found & set(pids)
    if how == "silence":
        assert pings == ["begins"] * 5 + ["ends"] * 5


async def test_a_connection_that_the_network_forgot_is_replaced_unnoticed(pinging: Database, proxy: Proxy) -> None:
    """The original bug: it happens to idle connections only, and says nothing."""
    proxy.idle_cut = "drop"
    pid = await pid_of(pinging)
    proxy.idle_after = 0.1
    await until(lambda: not proxy.connections)
    proxy.idle_after = None
    with unnoticed():
        assert await pid_of(pinging) != pid


# Statements -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_statement_that_is_cut_is_done_again_and_its_effect_is_there_once(
    proxied: Database, proxy: Proxy, traces: Traces, moment: Moment, how: Cut
) -> None:
    point = cut_once(proxied, proxy, "test.work", moment, how)
    with measured(f"a statement cut {moment} by {how}") as watch, ridden_out() as retries:
        ((work,),) = await proxied.run(WORK, {"work": 1})
    assert (work, point.happened) == (1, 1)
    assert await traces.effects() == [1]
    await until_true(lambda: traces.fit(1 if moment == "before" else 2, retries, how))
    assert watch.seconds < STUCK


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize(("moment", "executions"), [("before", 1), ("after", 2)])
async def test_a_transaction_whose_commit_is_cut_is_done_again_and_its_effect_is_there_once(
    proxied: Database, hasty: Database, proxy: Proxy, traces: Traces, moment: Moment, executions: int, how: Cut
) -> None:
    """Silence leaves an open transaction, and its locks, until the server's own deadlines end it."""
    database = hasty if how in SILENT else proxied
    point = cut_once(database, proxy, COMMIT, moment, how)
    with measured(f"a COMMIT cut {moment} by {how}") as watch, ridden_out() as retries:
        assert await transact(database) == 1
    assert point.happened == 1
    assert await traces.effects() == [1]
    assert await traces.fit(executions, retries, how)
    assert watch.seconds < STUCK


async def test_what_silence_leaves_at_work_is_stopped_by_the_server(hasty: Database, proxy: Proxy, direct: Any) -> None:
    """It does not learn that nobody waits any more: its own limits end the statement, and the idle transaction."""
    proxy.cut_at("pg_sleep", "within", "silence")
    with pytest.raises(DatabaseUnavailable):
        await hasty.run(text("SELECT pg_sleep(60)"), patience=0)
    proxy.cut_at(COMMIT, "before", "silence")
    with pytest.raises(DatabaseUnavailable):
        await hasty.transaction(lambda connection: connection.execute(PID), patience=0)

    async def idle() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'proctor%' AND state <> 'idle'"
        return bool(await direct.fetchval(query) == 0)

    await until_true(idle)


async def test_what_silence_leaves_between_preparing_and_executing_is_ended_by_the_server(
    hasty: Database, proxy: Proxy, direct: Any
) -> None:
    """asyncpg prepares with Flush, not Sync. In between Postgres takes itself for active and waits for the client: it
    ignores `statement_timeout` while it reads, and starts none of its idle limits. Only `transaction_timeout` (since
    Postgres 17) or TCP's keepalive of the server ends it; until then it keeps the transaction's locks."""
    proxy.cut_at("test.second", "before", "silence")

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(text("/* test.first */ SELECT pg_advisory_xact_lock(7)"))
        await connection.execute(text("/* test.second */ SELECT 2"))

    with pytest.raises(DatabaseUnavailable):
        await hasty.transaction(work, patience=0)
    await until_true(lambda: _is_free(direct))


async def _is_free(direct: Any) -> bool:
    return not await direct.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")


async def test_many_callers_lose_their_connections_at_once_and_none_notices(
    proxied: Database, proxy: Proxy, traces: Traces
) -> None:
    point = proxy.cut_at("test.work", "after", "rst", times=15)
    assert await asyncio.gather(*(transact(proxied, work) for work in range(30))) == list(range(30))
    assert point.happened == 15
    assert await traces.effects() == list(range(30))


# New connections ------------------------------------------------------------------------------------------------------


async def test_a_server_that_refuses_connections_is_waited_for(proxied: Database, proxy: Proxy) -> None:
    proxy.refuse = True
    with ridden_out():
        call = asyncio.create_task(pid_of(proxied))
        await until(lambda: proxy.accepted >= 4)
        assert not call.done()
        proxy.refuse = False
        assert await call


async def test_patience_ends_with_the_reason(proxied: Database, proxy: Proxy) -> None:
    proxy.refuse = True
    reason = r"did not answer: \w*Error: .*[Cc]onnection"
    with measured("refused, without patience") as watch, pytest.raises(DatabaseUnavailable, match=reason):
        await proxied.run(PID, patience=0)
    assert proxy.accepted == 1
    assert watch.seconds < STUCK
    with measured("refused, patience 1 s") as watch, pytest.raises(DatabaseUnavailable, match=reason):
        await proxied.run(PID, patience=1)
    assert 1 <= watch.seconds < STUCK
    assert proxy.accepted > 2


async def test_a_connection_that_nobody_answers_is_given_up_in_time(calm: Settings, proxy: Proxy) -> None:
    brief = calm.model_copy(update={"connect_timeout": 0.3})
    async with open_engine(brief) as engine:
        database = Database(engine, brief)
        proxy.unanswered = True
        with measured("unanswered") as watch, pytest.raises(DatabaseUnavailable, match="TimeoutError"):
            await database.run(PID, patience=0)
        assert 0.3 <= watch.seconds < STUCK
        with ridden_out() as retries:
            call = asyncio.create_task(pid_of(database))
            await until(lambda: len(retries) > 0)
            proxy.unanswered = False
            assert await call


async def test_latency_is_no_fault(proxied: Database, proxy: Proxy, traces: Traces) -> None:
    pid = await pid_of(proxied)
    bound_ping(proxied.engine, 2)
    proxy.latency = 0.03
    with measured("a prepared statement, 0.06 s a round trip") as watch, unnoticed():
        assert await pid_of(proxied) == pid
    assert watch.seconds >= 2 * 0.06
    with unnoticed():
        assert await transact(proxied) == 1
    assert (await traces.effects(), await traces.executions()) == ([1], 1)


# Failover -------------------------------------------------------------------------------------------------------------


async def test_a_server_that_became_read_only_is_left_for_good(
    proxied: Database, pool: AsyncEngine, proxy: Proxy, traces: Traces
) -> None:
    """It answers pings; the first write says what it is, and none of its connections is used again."""
    old = await fill(pool, 5)
    assert await proxy.demote() == 5
    with measured("the first write after a failover") as watch, ridden_out() as retries:
        await transact(proxied)
    assert len(retries) == 1
    assert "read-only" in retries[0]["reason"]
    assert watch.seconds < STUCK
    with unnoticed():
        ((work,),) = await proxied.run(WORK, {"work": 2})
        assert work == 2
        assert not set(await fill(pool, 5)) & set(old)
    assert await traces.effects() == [1, 2]
    assert (await traces.executions(1), await traces.executions(2)) == (1, 1)


@pytest.mark.parametrize("how", ["rst", "silence"])
async def test_a_failover_is_ridden_out_by_everybody_and_each_effect_is_there_once(
    proxied: Database, hasty: Database, proxy: Proxy, traces: Traces, how: Cut
) -> None:
    """Thirty callers, each with one thing to do after another, amid a failover that refuses everybody for long enough."""
    database = hasty if how in SILENT else proxied
    callers, turns = 30, 3

    async def caller(number: int) -> None:
        for turn in range(turns):
            work = number * turns + turn
            if turn % 2:
                await database.run(WORK, {"work": work})
            else:
                await transact(database, work)

    with measured(f"thirty callers and a failover, {how}"), ridden_out():
        calls = [asyncio.create_task(caller(number)) for number in range(callers)]
        await until(lambda: sum(sql == COMMIT for sql in proxy.executed) >= callers // 2)
        proxy.refuse = True
        proxy.cut(how)
        refused = proxy.accepted
        await until(lambda: proxy.accepted >= refused + 4 * callers)
        proxy.refuse = False
        await asyncio.gather(*calls)
    assert await traces.effects() == list(range(callers * turns))


@pytest.fixture
async def own_server(tmp_path: Path, proxy: Proxy) -> AsyncIterator["Server"]:
    server = Server(tmp_path / "own", proxy)
    server.start()
    yield server
    server.stop()


class Server:
    """A Postgres of the test's own, behind the proxy, wherever it listens."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        self._folder, self._proxy = folder, proxy

    def start(self) -> None:
        """The proxy leads there."""
        self._running = open_postgres(self._folder)
        self.url = self._running.__enter__()
        self._proxy.upstream = server_of(self.url)

    def stop(self) -> None:
        self._running.__exit__(None, None, None)

    def end(self, how: signal.Signals) -> None:
        """SIGKILL: it crashes. SIGQUIT: it shuts down immediately. SIGINT: fast. In any case it is not there any more."""
        os.kill(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]), how)
        self.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT, signal.SIGINT], ids=lambda how: how.name)
async def test_a_restart_of_the_server_is_ridden_out(own_server: Server, proxy: Proxy, how: signal.Signals) -> None:
    await _execute(own_server.url, "CREATE TABLE executions (work int); CREATE TABLE effects (work int PRIMARY KEY)")
    holder = await asyncpg.connect(own_server.url)
    await holder.execute("SELECT pg_advisory_lock(7)")
    settings = load(**CALM, database_url=proxy.through(own_server.url))
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        await fill(engine, 3)
        assert await transact(database, 0) == 0
        calls = [asyncio.create_task(transact(database, work)) for work in range(1, 6)]
        waiting = asyncio.create_task(database.run(text("SELECT pg_advisory_xact_lock(7)")))
        await until(lambda: any("pg_advisory" in sql for sql in proxy.executed))
        with ridden_out(), measured(f"a restart after {how.name}"):
            own_server.end(how)
            holder.terminate()
            await until(lambda: not proxy.connections)
            own_server.start()
            assert await asyncio.gather(*calls) == [1, 2, 3, 4, 5]
            await waiting
        with unnoticed():
            assert await transact(database, 6) == 6
        ((effects,),) = await database.run(text("SELECT array_agg(work ORDER BY work) FROM effects"))
        assert effects == list(range(7))


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


async def test_sessions_that_an_administrator_ends_are_replaced(
    proxied: Database, pool: AsyncEngine, proxy: Proxy, direct: Any, traces: Traces
) -> None:
    idle = await fill(pool, 3)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY($1)"
    await direct.execute(end, idle)
    await until(lambda: not proxy.connections)
    with unnoticed():
        assert await pid_of(proxied) not in idle
    await direct.execute("SELECT pg_advisory_lock(7)")
    with ridden_out():
        call = asyncio.create_task(proxied.run(text("/* test.wait */ SELECT 7 AS seven FROM pg_advisory_xact_lock(7)")))
        await until_true(lambda: _ended(direct, "test.wait"))
        await direct.execute("SELECT pg_advisory_unlock(7)")
        (row,) = await call
        assert row.seven == 7


async def _ended(direct: Any, name: str) -> bool:
    """The backend that is at this statement was ended."""
    active = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'active' AND query LIKE $1 || '%'"
    return bool(await direct.fetchval(active, f"/* {name} */"))


# What the server says -------------------------------------------------------------------------------------------------

FAILS = """
CREATE SEQUENCE calls;
CREATE FUNCTION fails(code text, times int) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE call bigint := nextval('calls');
BEGIN
  IF call <= times THEN RAISE EXCEPTION 'call %', call USING ERRCODE = code; END IF;
  RETURN call;
END $$
"""
CALL = text("/* test.fails */ SELECT fails(:code, :times) AS calls")


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "57014", "53300", "57P03", "25006"])
async def test_what_the_server_cannot_do_at_the_moment_is_tried_again(
    proxied: Database, direct: Any, code: str
) -> None:
    await direct.execute(FAILS)
    with ridden_out() as retries:
        ((calls,),) = await proxied.run(CALL, {"code": code, "times": 2})
    assert calls == 3
    assert [entry["attempt"] for entry in retries] == [1, 2]


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "57014", "53300"])
async def test_a_moment_that_is_not_the_connection_s_fault_costs_no_connection(
    proxied: Database, direct: Any, code: str
) -> None:
    await direct.execute(FAILS)
    pid = await pid_of(proxied)
    await proxied.run(CALL, {"code": code, "times": 1})
    assert await pid_of(proxied) == pid


async def test_too_many_connections_are_waited_for(postgres: str, database_url: str, direct: Any) -> None:
    role = f"few_{uuid4().hex}"
    await direct.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'p' CONNECTION LIMIT 1")
    url = make_url(database_url).set(username=role, password="p").render_as_string(hide_password=False)
    settings = load(**CALM, database_url=url)
    try:
        async with open_engine(settings) as engine:
            with ridden_out() as retries:
                occupant = await asyncpg.connect(url)
                call = asyncio.create_task(pid_of(Database(engine, settings)))
                await until(lambda: len(retries) > 1)
                await occupant.close()
                assert await call
            assert "too many connections" in retries[0]["reason"]
    finally:
        await until_true(lambda: _nobody(direct, role))
        await direct.execute(f"DROP ROLE {role}")


async def _nobody(direct: Any, role: str) -> bool:
    return bool(await direct.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", role) == 0)


async def test_a_wrong_password_is_told_at_once(calm: Settings, proxy: Proxy) -> None:
    assert calm.database_url
    url = make_url(calm.database_url.get_secret_value()).set(password="wrong").render_as_string(hide_password=False)
    wrong = load(**CALM, database_url=url)
    async with open_engine(wrong) as engine:
        with unnoticed(), pytest.raises(DatabaseRefused, match="The password is wrong"):
            await Database(engine, wrong).run(PID)
    assert proxy.accepted == 1


@pytest.mark.parametrize(
    ("sql", "error"),
    [("SELEC 1", "syntax error"), ("SELECT 1 / 0", "division by zero"), ("SELECT CAST(:n AS int)", "invalid input")],
    ids=["syntax", "division", "argument"],
)
async def test_a_mistake_of_ours_is_told_at_once(proxied: Database, sql: str, error: str) -> None:
    with unnoticed(), pytest.raises(Exception, match=error) as told:
        await proxied.run(text(sql), {"n": "x"} if ":n" in sql else None)
    assert not isinstance(told.value, DatabaseUnavailable)


async def test_a_privilege_that_is_lacking_is_told_at_once(proxied: Database) -> None:
    with unnoticed(), pytest.raises(DatabaseRefused, match="lacks a privilege"):
        await proxied.run(LACKING)


LACKING = text("DO $$ BEGIN RAISE insufficient_privilege; END $$")

# The kernel -----------------------------------------------------------------------------------------------------------

KERNEL = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture
async def network(database_url: str) -> AsyncIterator[Network]:
    async with open_network(server_of(database_url)) as network:
        yield network


@KERNEL
async def test_an_idle_connection_whose_packets_are_lost_is_given_up_within_a_ping(
    network: Network, database_url: str
) -> None:
    settings = load(**CALM | {"ping_timeout": PING}, database_url=network.through(database_url))
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        async with engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).driver_connection
        pid = pid_behind(raw)
        await network.drop()
        with measured("an idle connection in a kernel's black hole") as watch:
            call = asyncio.create_task(pid_of(database))
            await until(raw.is_closed)
        assert watch.seconds >= PING
        await network.restore()
        assert await call != pid


@KERNEL
async def test_a_statement_whose_request_is_lost_is_given_up_with_its_packets(
    network: Network, database_url: str, traces: Traces
) -> None:
    """TCP_USER_TIMEOUT: what nobody acknowledges for `socket_timeout` is over, before the statement's own time is."""
    given = CALM | {"socket_timeout": BRISK["socket_timeout"]}
    settings = load(**given, database_url=network.through(database_url))
    async with open_engine(settings) as engine, engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await network.drop()
        with measured("a request in a kernel's black hole") as watch, pytest.raises(Exception) as told:
            await connection.execute(WORK, {"work": 1})
        print(repr(told.value))
    assert BRISK["socket_timeout"] <= watch.seconds < STUCK
    assert await traces.effects() == []


@KERNEL
async def test_a_statement_whose_reply_is_lost_is_given_up_in_its_time(
    network: Network, database_url: str, direct: Any, traces: Traces
) -> None:
    """The request was acknowledged, and so no socket's time is up."""
    settings = load(**CALM, database_url=network.through(database_url))
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        # prepares it, or it would wait for the table's lock before it is executed
        await database.run(WORK, {"work": 0})
        database._deadline = STATEMENT
        with ridden_out() as retries, measured("a reply in a kernel's black hole") as watch:
            async with direct.transaction():
                await direct.execute("LOCK TABLE effects IN EXCLUSIVE MODE")
                call = asyncio.create_task(database.run(WORK, {"work": 1}))
                await until_true(lambda: _waits(direct))
                await network.drop()
            await until(lambda: len(retries) > 0)
            database._deadline = STUCK  # the next try's, which has no connection yet
            await network.restore()
            ((work,),) = await call
        assert work == 1
        assert watch.seconds >= STATEMENT
    assert await traces.effects() == [0, 1]
    assert 2 <= await traces.executions() <= 1 + len(retries)


async def _waits(direct: Any) -> bool:
    """For the table; not from pg_stat_activity, which stands still within a transaction."""
    waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'effects'::regclass AND NOT granted"
    return bool(await direct.fetchval(waiting))

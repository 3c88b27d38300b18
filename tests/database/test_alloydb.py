"""The engine over Google's own connector, in front of the stand-in: who is let in, by which way, and what faults do."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.cloud.alloydbconnector import AsyncConnector
from sqlalchemy import text
from structlog.testing import capture_logs

from app.database.engine import open_engine
from app.database.migrate import migrate_async, newest_revision
from app.database.session import Database
from app.errors import DatabaseRefused, DatabaseUnavailable
from app.main import create_app
from app.settings import load
from tests.conftest import _administer
from tests.database.conftest import (
    BRISK,
    CALM,
    CUTS,
    PID,
    STUCK,
    WORK,
    Stopwatch,
    Traces,
    cut_once,
    fill,
    measured,
    no_farewell,
    pid_of,
    ridden_out,
    transact,
    unnoticed,
    until,
)
from tests.faults.alloydb import IAM_USER, INSTANCE, AlloyDB
from tests.faults.connection import Cut, Moment

WHO = text("SELECT session_user AS who, current_database() AS database")


@asynccontextmanager
async def over(alloydb: AlloyDB, **given: Any) -> AsyncIterator[Database]:
    """A database as the service has it, with these settings."""
    settings = load(**{**CALM, **alloydb.settings, **given})
    async with open_engine(settings) as engine:
        yield Database(engine, settings)


# Who is let in --------------------------------------------------------------------------------------------------------


async def test_a_user_with_a_password_is_let_in(alloydb: AlloyDB) -> None:
    async with over(alloydb) as database:
        (row,) = await database.run(WHO)
    assert (row.who, row.database) == (alloydb.settings["alloydb_user"], alloydb.settings["alloydb_database"])
    assert alloydb.proxy.accepted == 1


async def test_without_a_password_the_service_s_own_identity_is_let_in(alloydb: AlloyDB) -> None:
    await alloydb.create_iam_user()
    settings = load(**CALM, **alloydb.iam_settings())
    async with open_engine(settings) as engine:
        (row,) = await Database(engine, settings).run(WHO)
    assert row.who == IAM_USER


async def test_a_wrong_password_is_told_at_once(alloydb: AlloyDB) -> None:
    async with over(alloydb, alloydb_password="wrong") as database:
        with unnoticed(), pytest.raises(DatabaseRefused, match="The password is wrong"):
            await database.run(PID)
    assert alloydb.proxy.accepted == 1


async def test_a_token_that_the_database_does_not_take_is_told_at_once(alloydb: AlloyDB) -> None:
    await alloydb.create_iam_user()
    alloydb.tokens.token = "another"
    settings = load(**CALM, **alloydb.iam_settings())
    async with open_engine(settings) as engine:
        with unnoticed(), pytest.raises(DatabaseRefused, match="The password is wrong"):
            await Database(engine, settings).run(PID)


# By which way ---------------------------------------------------------------------------------------------------------

KINDS = ["PRIVATE", "PUBLIC", "PSC"]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_kind_of_address_is_the_settings(alloydb: AlloyDB, kind: str) -> None:
    """The others lead nowhere."""
    addresses = alloydb.admin.addresses
    alloydb.admin.addresses = {k: addresses[k] if k == kind else "127.0.0.1" for k in KINDS}
    async with over(alloydb, alloydb_ip_type=kind) as database:
        assert await pid_of(database)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_address_that_the_instance_lacks_is_told_at_once(alloydb: AlloyDB, kind: str) -> None:
    alloydb.admin.addresses |= {kind: ""}
    async with over(alloydb, alloydb_ip_type=kind) as database:
        with unnoticed(), pytest.raises(DatabaseRefused, match="PROCTOR_ALLOYDB_IP_TYPE"):
            await database.run(PID)
    assert alloydb.proxy.accepted == 0


# The Admin API --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["down", "hangs"])
async def test_an_admin_api_in_trouble_is_waited_for_in_bounds_and_hinders_nobody_who_is_in(
    alloydb: AlloyDB, trouble: str
) -> None:
    async with over(alloydb) as database:
        pid = await pid_of(database)
        _trouble(alloydb, trouble)
        with unnoticed():
            assert {await pid_of(database) for _ in range(10)} == {pid}
        async with over(alloydb, connect_timeout=0.5) as newcomer:
            with measured(f"the Admin API {trouble}") as watch, pytest.raises(DatabaseUnavailable):
                await newcomer.run(PID, patience=0)
            assert watch.seconds < STUCK
            with ridden_out() as retries:
                call = asyncio.create_task(pid_of(newcomer))
                await until(lambda: len(retries) > 0)
                assert await pid_of(database) == pid
                alloydb.admin.down, alloydb.admin.hangs = None, False
                assert await call


def _trouble(alloydb: AlloyDB, trouble: str) -> None:
    if trouble == "down":
        alloydb.admin.down = grpc.StatusCode.UNAVAILABLE
    else:
        alloydb.admin.hangs = True


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, r"roles alloydb\.client"),
        (grpc.StatusCode.NOT_FOUND, "PROCTOR_ALLOYDB_INSTANCE"),
        (grpc.StatusCode.UNAUTHENTICATED, "credentials"),
        (grpc.StatusCode.INVALID_ARGUMENT, "name is not one"),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else "",
)
async def test_what_the_admin_api_refuses_is_told_at_once_with_advice(
    alloydb: AlloyDB, code: grpc.StatusCode, advice: str
) -> None:
    alloydb.admin.down = code
    async with over(alloydb) as database:
        with measured(code.name) as watch, unnoticed(), pytest.raises(DatabaseRefused, match=advice):
            await database.run(PID)
        assert watch.seconds < STUCK
        alloydb.admin.down = None
        assert await pid_of(database)


async def test_a_token_endpoint_that_is_away_is_waited_for(alloydb: AlloyDB) -> None:
    """No token is not a token that was refused."""
    alloydb.tokens._server.close()
    async with over(alloydb) as database:
        with pytest.raises(DatabaseUnavailable) as told:
            await database.run(PID, patience=0)
    assert not isinstance(told.value, DatabaseRefused)


async def test_a_caller_that_is_cancelled_as_it_connects_spoils_nothing_for_the_next(alloydb: AlloyDB) -> None:
    """The connector shares its keys, its lock and what it was told among all who connect."""
    async with over(alloydb) as database:
        for turns in range(12):
            await _cancelled(asyncio.create_task(pid_of(database)), turns)
        alloydb.admin.hangs = True
        call = asyncio.create_task(pid_of(database))
        await until(lambda: bool(alloydb.admin.calls))
        await _cancelled(call)
        alloydb.admin.hangs, alloydb.proxy.unanswered = False, True
        call = asyncio.create_task(pid_of(database))
        await until(lambda: alloydb.proxy.accepted > 0)
        await _cancelled(call)
        alloydb.proxy.unanswered = False
        assert await pid_of(database)


async def _cancelled(call: "asyncio.Task[int]", turns: int = 0) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()


async def test_a_certificate_about_to_expire_is_replaced_by_the_next_connection(alloydb: AlloyDB) -> None:
    def certificates() -> int:
        return alloydb.admin.calls.count("GenerateClientCertificate")

    alloydb.admin.certificate_lifetime = timedelta(minutes=3)
    async with over(alloydb) as database:
        pid = await pid_of(database)
        assert certificates() == 1
        alloydb.admin.certificate_lifetime = timedelta(hours=1)
        with unnoticed():
            assert await pid_of(database) == pid
            assert certificates() == 1
            for _ in range(2):
                alloydb.proxy.cut("fin")
                assert await pid_of(database) != pid
                assert certificates() == 2


# A process that is held up ---------------------------------------------------------------------------------------------


async def test_a_deadline_that_runs_out_while_the_first_connection_is_made_spoils_nothing_for_the_next(
    alloydb: AlloyDB,
) -> None:
    """On uvloop, which looks at its timers before it begins a new task."""
    told, pid = await _on_uvloop(alloydb, _HELD_UP, connect_timeout=0.5)
    assert "TimeoutError" in told
    assert int(pid)


@pytest.mark.parametrize("when", ["made", "used"])
async def test_a_connector_that_cancels_whoever_connects_is_replaced(
    alloydb: AlloyDB, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its key pair was cancelled as it was made, or what is shared by all who use it was."""
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    make = AsyncConnector.__init__

    def make_broken(connector: Any, **options: Any) -> None:
        monkeypatch.undo()
        make(connector, **options)
        if when == "made":
            connector._keys.cancel()
        else:
            connector._cache[INSTANCE] = SimpleNamespace(connect_info=lambda: cancelled)

    monkeypatch.setattr(AsyncConnector, "__init__", make_broken)
    with capture_logs() as logs:
        async with over(alloydb) as database:
            assert await asyncio.gather(pid_of(database), pid_of(database))
    assert [log["log_level"] for log in logs if "connector is broken" in log["event"]] == ["warning"]
    assert any("ConnectorBroken" in log.get("reason", "") for log in logs)


async def _on_uvloop(alloydb: AlloyDB, program: str, **given: Any) -> list[str]:
    """The lines that `program` prints, in a process of its own with the service's loop."""
    given = {**CALM, **alloydb.settings, **given}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, json.dumps(given)),
        env={**os.environ, **alloydb.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    return output.decode().splitlines()


_HELD_UP = """
import json, sys, time
import uvloop
from google.cloud.alloydbconnector import AsyncConnector
from sqlalchemy import text
from app.database.engine import open_engine
from app.database.session import Database
from app.errors import DatabaseUnavailable
from app.settings import load

settings = load(**json.loads(sys.argv[1]))
connect = AsyncConnector.connect

async def held_up(connector, *arguments, **options):
    AsyncConnector.connect = connect
    time.sleep(2 * settings.connect_timeout)
    return await connect(connector, *arguments, **options)

async def main():
    AsyncConnector.connect = held_up
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        try:
            await database.run(text("SELECT 1"), patience=0)
        except DatabaseUnavailable as error:
            print(error)
        ((pid,),) = await database.run(text("SELECT pg_backend_pid()"))
        print(pid)

uvloop.run(main())
"""


# Faults over TLS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CUTS)
async def test_dead_idle_connections_are_replaced_unnoticed(alloydb: AlloyDB, how: Cut) -> None:
    async with over(alloydb, ping_timeout=BRISK["ping_timeout"]) as database:
        pids = await fill(database.engine, 3)
        assert alloydb.proxy.cut(how) == 3
        with measured(f"dead idle connections, {how}, TLS") as watch, unnoticed():
            assert await pid_of(database) not in pids
        assert watch.seconds < STUCK


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize(("moment", "executions"), [("before", 1), ("after", 2)])
async def test_a_statement_that_is_cut_is_done_again_and_its_effect_is_there_once(
    alloydb: AlloyDB, traces: Traces, moment: Moment, executions: int, how: Cut
) -> None:
    async with over(alloydb) as database:
        point = cut_once(database, alloydb.proxy, "test.work", moment, how)
        with measured(f"a statement cut {moment} by {how}, TLS") as watch, ridden_out() as retries:
            ((work,),) = await database.run(WORK, {"work": 1})
    assert (work, point.happened) == (1, 1)
    assert await traces.effects() == [1]
    assert await traces.fit(executions, retries, how)
    assert watch.seconds < STUCK


async def test_closing_into_a_black_hole_waits_for_nothing(alloydb: AlloyDB) -> None:
    with no_farewell():
        async with over(alloydb) as database:
            await fill(database.engine, 3)
            assert alloydb.proxy.cut("silence") == 3
            began = Stopwatch()
    assert began.seconds < STUCK


async def test_a_server_that_became_read_only_is_left(alloydb: AlloyDB, traces: Traces) -> None:
    async with over(alloydb) as database:
        old = await fill(database.engine, 3)
        assert await alloydb.proxy.demote() == 3
        with ridden_out():
            await transact(database)
        assert not set(await fill(database.engine, 3)) & set(old)
    assert await traces.effects() == [1]


# The service ----------------------------------------------------------------------------------------------------------


async def test_the_service_starts_and_is_ready(alloydb: AlloyDB, tmp_path: Path) -> None:
    settings = load(
        **CALM | alloydb.settings,
        queue_endpoint="127.0.0.1:9",
        artifacts=f"file://{tmp_path}/artifacts",
        scratch=tmp_path / "scratch",
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app) as state:
        assert app.state.refused is None
        assert state is not None
        assert await pid_of(state["services"].database)
    assert any("preflight.lacking" in sql for sql in alloydb.proxy.executed)


async def test_migrations_run(alloydb: AlloyDB, postgres: str) -> None:
    empty = f"empty_{alloydb.settings['alloydb_database']}"
    await _administer(postgres, f"CREATE DATABASE {empty}")
    try:
        settings = load(**CALM | alloydb.settings | {"alloydb_database": empty})
        assert await migrate_async(settings) == ("", newest_revision())
        assert await migrate_async(settings) == (newest_revision(), newest_revision())
    finally:
        await _administer(postgres, f"DROP DATABASE {empty} WITH (FORCE)")

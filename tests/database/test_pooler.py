"""Through the real PgBouncer in transaction mode, whose sessions are another client's from one transaction to the next."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import preflight
from app.database.engine import open_engine
from app.database.migrate import LOCK, migrate_async, newest_revision
from app.database.session import Database
from app.errors import DatabaseRefused, SettingsError
from app.ledger import Ledger
from app.local.stack import open_stack
from app.settings import Settings, load
from tests.conftest import _administer, of_database
from tests.database.conftest import CALM, PID, WORK, Traces, transact, until_true
from tests.database.life import live
from tests.faults.alloydb import INSTANCE
from tests.faults.pgbouncer import PROGRAM, SESSIONS, WHY_NOT, open_pgbouncer

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)

IGNORANT = (
    "statement_timeout,idle_in_transaction_session_timeout,idle_session_timeout,default_transaction_isolation,"
    "tcp_keepalives_idle,tcp_keepalives_interval,tcp_keepalives_count"
)


@pytest.fixture
def pooler(database_url: str, tmp_path: Path) -> Iterator[str]:
    with open_pgbouncer(database_url, tmp_path / "pgbouncer") as url:
        yield url


@pytest.fixture
def pooled(pooler: str) -> Settings:
    return load(**CALM, database_url=pooler, database_pooler="transaction")


async def test_many_at_once_share_few_sessions_and_leave_no_statement_behind(pooled: Settings, direct: Any) -> None:
    async with open_engine(pooled) as engine:
        database = Database(engine, pooled)

        async def echo(n: int) -> None:
            for _ in range(5):
                (row,) = await database.run(text(f"SELECT CAST(:n AS int), 'kind {n % 7}'"), {"n": n})
                assert tuple(row) == (n, f"kind {n % 7}")

        await asyncio.gather(*(echo(n) for n in range(40)))
        pids = {row.pid for _ in range(5) for row in await database.run(PID)}
        prepared = await database.run(text("SELECT name FROM pg_prepared_statements WHERE name <> ''"))
    assert len(pids) <= SESSIONS
    assert list(prepared) == []


async def test_each_transaction_has_its_limits_and_leaves_none(
    pooled: Settings, pooler: str, database_url: str
) -> None:
    names = ["statement_timeout", "idle_in_transaction_session_timeout", "application_name", "transaction_isolation"]
    shown = text("SELECT " + ", ".join(f"current_setting('{name}')" for name in names))
    async with open_engine(pooled) as engine:
        database = Database(engine, pooled)

        async def within(connection: AsyncConnection) -> Any:
            return tuple((await connection.execute(shown)).one())

        for found in (tuple((await database.run(shown))[0]), await database.transaction(within)):
            assert found == ("18s", "18s", "proctor worker-1", "read committed")
        other = await asyncpg.connect(pooler, statement_cache_size=0)
        try:
            for _ in range(3):
                async with other.transaction():
                    assert await other.fetchval("SELECT current_setting('statement_timeout')") == "0"
        finally:
            await other.close()


async def test_a_session_that_the_pooler_lost_is_replaced(pooled: Settings, traces: Traces, direct: Any) -> None:
    async with open_engine(pooled) as engine:
        database = Database(engine, pooled)
        for work in (1, 2):
            await transact(database, work)
            await direct.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await database.run(WORK, {"work": 3})
    assert await traces.effects() == [1, 2, 3]


async def test_an_evaluation_lives_in_the_ledger(pooled: Settings) -> None:
    async with open_engine(pooled) as engine:
        database = Database(engine, pooled)
        assert (await preflight.look(database)).revision == newest_revision()

        assert await live(database, Ledger(database, lease=120, worker="worker-1", revision="r"))


async def test_the_whole_system_works(pooler: str, tmp_path: Path) -> None:
    import httpx

    given: dict[str, Any] = {"database_url": pooler, "database_pooler": "transaction", "scratch": tmp_path / "scratch"}
    async with (
        open_stack(tmp_path / "stack", min_backoff=0.1, log_level="warning", log_format="json", **given) as stack,
        httpx.AsyncClient(base_url=stack.url, timeout=60) as client,
    ):
        spec = {"task": "proctor/programming", "model": "scripted/agent", "limit": 2}
        submitted = await client.post("/evaluations", json=spec)
        assert submitted.status_code == 202, submitted.text
        path = f"/evaluations/{submitted.json()['id']}"

        async def over() -> bool:
            return bool((await client.get(path)).json()["state"] != "running")

        async with asyncio.timeout(120):
            while not await over():
                await asyncio.sleep(0.1)
        found = (await client.get(path)).json()
    assert found["state"] == "succeeded", found["error"]
    assert found["samples"]["succeeded"] == 2


# Migrations -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def empty(postgres: str) -> Any:
    name = f"empty_{uuid4().hex}"
    await _administer(postgres, f"CREATE DATABASE {name}")
    yield of_database(postgres, name)
    await _administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


async def test_migrations_run_one_at_a_time(empty: str, tmp_path: Path) -> None:
    with open_pgbouncer(empty, tmp_path / "pgbouncer", default_pool_size="8") as url:
        settings = load(**CALM, database_url=url, database_pooler="transaction")
        ends = await asyncio.gather(*(migrate_async(settings) for _ in range(3)))
    assert sorted(ends) == [("", newest_revision())] + [(newest_revision(), newest_revision())] * 2


async def test_a_migration_that_dies_leaves_no_lock_on_a_pooled_session(pooler: str, direct: Any) -> None:
    """It is killed while it has the lock; the pooler keeps the session for others."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDS, pooler], stdout=subprocess.PIPE, env={**os.environ})
    try:
        assert process.stdout
        assert await asyncio.to_thread(process.stdout.readline) == b"held\n"
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = $1"
        assert await direct.fetchval(locks, LOCK) == 1
    finally:
        process.kill()
        process.communicate()

    async def free() -> bool:
        return bool(await direct.fetchval(locks, LOCK) == 0)

    await until_true(free)


_HOLDS = """
import asyncio, sys
from app.database.engine import open_engine
from app.database.migrate import _alone
from app.settings import load

async def main():
    async with open_engine(load(database_url=sys.argv[1], database_pooler="transaction")) as engine, _alone(engine, 10):
        print("held", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


# Without the setting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", ["extra_float_digits", IGNORANT], ids=["refuses start-up settings", "ignores them"])
async def test_without_the_setting_the_pooler_is_named_at_once(database_url: str, tmp_path: Path, ignored: str) -> None:
    with open_pgbouncer(database_url, tmp_path / "pgbouncer", ignore_startup_parameters=ignored) as url:
        settings = load(**CALM, database_url=url)
        async with open_engine(settings) as engine:
            with pytest.raises(DatabaseRefused, match="PROCTOR_DATABASE_POOLER=transaction") as told:
                await preflight.look(Database(engine, settings))
        assert "\n" not in str(told.value)
        for command in ("serve", "migrate"):
            environment = {"PATH": os.environ["PATH"], "PROCTOR_DATABASE_URL": url, "PROCTOR_AUTH": "none"}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "app.cli", command),
                env=environment | {"PROCTOR_QUEUE_ENDPOINT": "127.0.0.1:9", "PROCTOR_SCRATCH": str(tmp_path / "s")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            output, errors = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode, output
            assert "PROCTOR_DATABASE_POOLER=transaction" in errors.decode()
            assert "Traceback" not in (output + errors).decode()


def test_the_connector_goes_past_poolers() -> None:
    with pytest.raises(SettingsError, match="PROCTOR_DATABASE_POOLER"):
        load(alloydb_instance=INSTANCE, alloydb_user="u", database_pooler="transaction")

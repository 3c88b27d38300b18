"""The stand-in, as the unmodified connector takes it for AlloyDB."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from google.api_core.exceptions import PermissionDenied
from google.cloud.alloydbconnector import AsyncConnector, RefreshStrategy

from tests.conftest import of_database
from tests.faults.alloydb import IAM_USER, PORT, AlloyDB, open_alloydb
from tests.faults.certificates import Authority
from tests.faults.connection import Cut

LOST = (asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError, OSError)
STUCK = 20
"""Seconds: what takes longer is stuck."""


@pytest.fixture
async def alloydb(database_url: str, tmp_path: Path) -> AsyncIterator[AlloyDB]:
    async with open_alloydb(database_url, tmp_path) as alloydb:
        yield alloydb


@asynccontextmanager
async def connector_of(alloydb: AlloyDB, **options: Any) -> AsyncIterator[AsyncConnector]:
    endpoint = alloydb.settings["alloydb_endpoint"]
    strategy = RefreshStrategy.LAZY
    async with AsyncConnector(alloydb_api_endpoint=endpoint, refresh_strategy=strategy, **options) as connector:
        yield connector


@asynccontextmanager
async def connected(connector: AsyncConnector, settings: dict[str, Any]) -> AsyncIterator[Any]:
    connection = await connector.connect(
        settings["alloydb_instance"],
        "asyncpg",
        user=settings["alloydb_user"],
        password=settings.get("alloydb_password"),
        db=settings["alloydb_database"],
    )
    try:
        yield connection
    finally:
        connection.terminate()


async def test_the_connector_connects_over_tls_with_a_certificate_it_was_given(
    alloydb: AlloyDB, database_url: str
) -> None:
    async with connector_of(alloydb) as connector, connected(connector, alloydb.settings) as connection:
        assert await connection.fetchval("SELECT current_database()") == database_url.rpartition("/")[2]
        assert connection._transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert sorted(alloydb.admin.calls) == ["GenerateClientCertificate", "GetConnectionInfo"]
        assert len(alloydb.proxy.connections) == 1


async def test_a_client_without_a_certificate_is_refused(alloydb: AlloyDB, database_url: str, tmp_path: Path) -> None:
    trusting = ssl.create_default_context(cafile=tmp_path / "authority.pem")
    host, _ = alloydb.proxy.address
    with pytest.raises(LOST):
        await asyncpg.connect(database_url, host=host, port=PORT, ssl=trusting, direct_tls=True)


async def test_a_certificate_of_another_authority_is_refused(alloydb: AlloyDB) -> None:
    authority, alloydb.admin.client_authority = alloydb.admin.client_authority, Authority()
    async with connector_of(alloydb) as connector:
        with pytest.raises(LOST):
            async with connected(connector, alloydb.settings):
                pass
        assert not alloydb.proxy.connections
        alloydb.admin.client_authority = authority
        async with connected(connector, alloydb.settings) as connection:
            assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("kind", ["PRIVATE", "PUBLIC", "PSC"])
async def test_every_kind_of_address_leads_to_it_and_no_other_is_used(alloydb: AlloyDB, kind: str) -> None:
    alloydb.admin.addresses = {k: alloydb.admin.addresses[k] if k == kind else "" for k in alloydb.admin.addresses}
    async with connector_of(alloydb, ip_type=kind) as connector, connected(connector, alloydb.settings) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_an_iam_user_logs_in_with_the_token_as_its_password(alloydb: AlloyDB) -> None:
    await alloydb.create_iam_user()
    settings = alloydb.iam_settings()
    async with connector_of(alloydb, enable_iam_auth=True) as connector, connected(connector, settings) as connection:
        assert await connection.fetchval("SELECT session_user") == IAM_USER
        assert await connection.fetchval("SELECT count(*) FROM evaluations") == 0
        await connection.execute("CREATE TABLE iam (i int)")
    assert alloydb.tokens.calls > 0


async def test_an_iam_user_with_another_token_is_refused(alloydb: AlloyDB) -> None:
    await alloydb.create_iam_user()
    alloydb.tokens.token = "another"
    async with connector_of(alloydb, enable_iam_auth=True) as connector:
        with pytest.raises(asyncpg.InvalidPasswordError):
            async with connected(connector, alloydb.iam_settings()):
                pass


async def test_what_the_admin_api_refuses_is_refused_and_what_was_known_before_still_works(alloydb: AlloyDB) -> None:
    async with connector_of(alloydb) as knowing:
        async with connected(knowing, alloydb.settings):
            pass
        alloydb.admin.down = grpc.StatusCode.PERMISSION_DENIED
        async with connected(knowing, alloydb.settings) as connection:
            assert await connection.fetchval("SELECT 1") == 1
    async with connector_of(alloydb) as connector:
        with pytest.raises(PermissionDenied):
            async with connected(connector, alloydb.settings):
                pass
        alloydb.admin.down = None
        async with connected(connector, alloydb.settings) as connection:
            assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("fault", ["down", "hangs"])
async def test_an_admin_api_that_is_away_or_hangs_keeps_the_connector_waiting(alloydb: AlloyDB, fault: str) -> None:
    setattr(alloydb.admin, fault, grpc.StatusCode.UNAVAILABLE if fault == "down" else True)
    connecting = asyncio.create_task(connect(alloydb))
    await until(lambda: bool(alloydb.admin.calls))
    await asyncio.sleep(0.3)
    assert not connecting.done()
    connecting.cancel()
    await asyncio.wait({connecting})
    assert alloydb.proxy.accepted == 0


async def connect(alloydb: AlloyDB) -> None:
    async with connector_of(alloydb) as connector, connected(connector, alloydb.settings):
        pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(STUCK):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_certificate_that_is_about_to_expire_is_renewed_by_the_next_connect(alloydb: AlloyDB) -> None:
    async with connector_of(alloydb) as connector:
        alloydb.admin.certificate_lifetime = timedelta(minutes=3)
        async with connected(connector, alloydb.settings):
            assert alloydb.admin.calls.count("GenerateClientCertificate") == 1
        alloydb.admin.certificate_lifetime = timedelta(hours=1)
        for _ in range(2):
            async with connected(connector, alloydb.settings):
                assert alloydb.admin.calls.count("GenerateClientCertificate") == 2


@pytest.mark.parametrize("how", ["fin", "rst", "silence", "drop"])
async def test_a_connection_over_tls_is_cut_as_any_other(alloydb: AlloyDB, how: Cut) -> None:
    closed = how in ("fin", "rst")
    async with connector_of(alloydb) as connector, connected(connector, alloydb.settings) as connection:
        assert await connection.fetchval("SELECT 1") == 1
        assert alloydb.proxy.cut(how) == 1
        with pytest.raises(LOST if closed else TimeoutError):
            await connection.fetchval("SELECT 1", timeout=5 if closed else 0.2)
        async with connected(connector, alloydb.settings) as another:
            assert await another.fetchval("SELECT 1") == 1


async def test_two_stand_ins_run_at_once(alloydb: AlloyDB, postgres: str, tmp_path: Path) -> None:
    folder = tmp_path / "another"
    folder.mkdir()
    async with open_alloydb(of_database(postgres, "postgres"), folder) as another:
        for one in (alloydb, another):
            async with connector_of(one) as connector, connected(connector, one.settings) as connection:
                assert await connection.fetchval("SELECT current_database()") == one.settings["alloydb_database"]
    assert alloydb.proxy.address != another.proxy.address


async def test_a_child_process_connects_with_its_environment(alloydb: AlloyDB) -> None:
    settings = alloydb.settings
    login = {
        key: settings[f"alloydb_{name}"]
        for key, name in [("user", "user"), ("password", "password"), ("db", "database")]
    }
    program = f"""
import asyncio
from google.cloud.alloydbconnector import AsyncConnector

async def main():
    async with AsyncConnector(alloydb_api_endpoint="{settings["alloydb_endpoint"]}", refresh_strategy="LAZY") as connector:
        connection = await connector.connect("{settings["alloydb_instance"]}", "asyncpg", **{login})
        print(await connection.fetchval("SELECT 41 + 1"))
        await connection.close()

asyncio.run(main())
"""
    environment = {"PATH": os.environ["PATH"]} | alloydb.environment
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert output == b"42\n", errors.decode()


async def test_nobody_beyond_loopback_is_asked_for_anything(alloydb: AlloyDB, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()
    resolve = socket.getaddrinfo

    def record(host: Any, *arguments: Any, **named: Any) -> Any:
        asked.add(str(host))
        return resolve(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    async with connector_of(alloydb) as connector, connected(connector, alloydb.settings):
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("google.auth"):
                await asyncio.to_thread(thread.join)
    assert asked <= {"localhost", "127.0.0.1", alloydb.proxy.address[0]}


async def test_the_end_of_the_stand_in_leaves_nothing_behind(database_url: str, tmp_path: Path) -> None:
    tasks, credentials = asyncio.all_tasks(), os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    async with open_alloydb(database_url, tmp_path) as alloydb:
        assert os.environ["GOOGLE_APPLICATION_CREDENTIALS"] == alloydb.environment["GOOGLE_APPLICATION_CREDENTIALS"]
        async with connector_of(alloydb) as connector, connected(connector, alloydb.settings) as connection:
            alloydb.proxy.cut("silence")
            alloydb.admin.hangs = True
            hanging = asyncio.create_task(connect(alloydb))
            await until(lambda: len(alloydb.admin.calls) >= 4)
            hanging.cancel()
            assert not connection.is_closed()
    await until(lambda: not asyncio.all_tasks() - tasks)
    assert os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") == credentials

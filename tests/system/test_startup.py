"""What a wrong database does to the service as it starts: one line and an end, or patience, according to what is wrong."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import httpx
import pytest
from structlog.testing import capture_logs

from app.database.migrate import as_comment, newest_revision
from app.errors import DatabaseRefused
from app.main import create_app
from app.settings import Settings, load
from app.web.health import Readiness, ready
from app.web.problems import ProblemResponse
from tests.faults.proxy import Proxy

INSTANCE = "projects/p/locations/us-central1/clusters/c/instances/i"


@asynccontextmanager
async def serving(folder: Path, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`proctor serve` with these variables; its stderr is a pipe."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PROCTOR_", "GOOGLE_"))}
    given = {
        "PROCTOR_QUEUE_ENDPOINT": "127.0.0.1:9",
        "PROCTOR_ARTIFACTS": f"file://{folder}/artifacts",
        "PROCTOR_SCRATCH": str(folder / "scratch"),
        "CLOUDSDK_CONFIG": str(folder),  # nobody's credentials
        "NO_GCE_CHECK": "true",
        "PROCTOR_PORT": "0",
        **{f"PROCTOR_{name.upper()}": value for name, value in variables.items()},
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "serve"),
        env=kept | given,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def last_words(folder: Path, **variables: str) -> tuple[int | None, str]:
    """The exit code, and the line after the last that is a log's; there is no traceback."""
    async with serving(folder, **variables) as process:
        _, told = await process.communicate()
    text = told.decode()
    assert "Traceback" not in text, text
    *logged, last = text.splitlines()
    assert all(line.startswith("{") for line in logged), text
    return process.returncode, last


async def test_a_login_that_is_refused_ends_the_service_with_one_line(database_url: str, tmp_path: Path) -> None:
    wrong = {
        database_url.replace("proctor:", "proctor:x"): "The password is wrong",
        f"{database_url}_none": "The database does not exist",
    }
    for url, reason in wrong.items():
        code, line = await last_words(tmp_path, database_url=url)
        assert code == 2
        assert line.startswith(f"proctor: The database refused: {reason}")


async def test_a_database_that_is_not_this_version_s_ends_the_service_with_one_line(
    postgres: str, database_url: str, tmp_path: Path
) -> None:
    code, line = await last_words(tmp_path, database_url=postgres)
    assert (code, line) == (2, "proctor: The database has no tables yet: run `proctor migrate`.")
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    await connection.execute(f"COMMENT ON TABLE alembic_version IS '{as_comment('9998')}'")
    code, line = await last_words(tmp_path, database_url=database_url)
    assert code == 2
    assert f"is at revision 9999, which is newer than this version of Proctor ({newest_revision()})" in line
    assert "and serves 9998 or later: deploy a newer version." in line
    await connection.close()


async def test_newer_tables_that_still_serve_this_version_do_not_stop_it(database_url: str, settings: Settings) -> None:
    """A deploy migrates first: what serves meanwhile may be started again, and is ready."""
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    await connection.execute(f"COMMENT ON TABLE alembic_version IS '{as_comment(newest_revision())}'")
    app = create_app(settings.model_copy(update={"queue_endpoint": "127.0.0.1:9"}))
    async with app.router.lifespan_context(app) as state:
        asked = SimpleNamespace(**(state or {}))
        found = await ready(asked.services)
        assert isinstance(found, Readiness)
        assert (found.tables, found.ahead) == ("9999", True)
        await connection.execute("UPDATE alembic_version SET version_num = '0001'")
        refused = await ready(asked.services)
        assert isinstance(refused, ProblemResponse)
        assert b"is at revision 0001, not" in bytes(refused.body)
    await connection.close()


async def test_a_user_without_privileges_ends_the_service_with_the_grant_that_is_missing(
    database_url: str, settings: Settings
) -> None:
    user = f"poor_{uuid4().hex}"
    connection = await asyncpg.connect(database_url)
    await connection.execute(f"CREATE ROLE \"{user}\" LOGIN PASSWORD 'p'")
    try:
        poor = settings.model_copy(update={"database_url": load(database_url=_as(database_url, user)).database_url})
        with pytest.raises(DatabaseRefused, match="lacks a privilege"):
            await _start(poor)
        await connection.execute(f'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{user}"')
        with pytest.raises(DatabaseRefused, match=r"lacks evaluations INSERT.*GRANT SELECT, INSERT, UPDATE"):
            await _start(poor)
        await connection.execute(f'GRANT INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO "{user}"')
        await _start(poor)
    finally:
        await connection.execute(f'DROP OWNED BY "{user}"; DROP ROLE "{user}"')
        await connection.close()


def _as(url: str, user: str) -> str:
    return f"postgresql://{user}:p@{url.rpartition('@')[2]}"


async def _start(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"queue_endpoint": "127.0.0.1:9"}))
    async with app.router.lifespan_context(app):
        pass


async def test_without_google_credentials_alloydb_is_refused_in_one_line(tmp_path: Path) -> None:
    code, line = await last_words(tmp_path, alloydb_instance=INSTANCE, alloydb_user="worker")
    assert code == 2, line
    assert line.startswith("proctor: There are no Google credentials for AlloyDB")


async def test_a_service_that_would_let_everybody_in_ends_with_one_line(tmp_path: Path) -> None:
    code, line = await last_words(tmp_path, database_url="postgresql://nobody@127.0.0.1:9/none", host="0.0.0.0")
    assert code == 2, line
    assert line.startswith("proctor: PROCTOR_AUTH=none would let everybody in who reaches PROCTOR_HOST 0.0.0.0")


async def test_a_database_that_is_down_makes_the_service_not_ready_and_not_dead(
    database_url: str, tmp_path: Path
) -> None:
    """It starts without its database, and is ready once that is there: nobody has to start it again."""
    async with Proxy(server_of(database_url)) as proxy:
        proxy.refuse = True
        url = proxy.through(database_url)
        async with serving(tmp_path, database_url=url, database_patience="0.5") as process:
            await _logged(process, "the database is not there yet")
            message = str((await _logged(process, "Uvicorn running"))["message"])
            async with httpx.AsyncClient(base_url=message.split()[3], timeout=60) as client:
                assert (await client.get("/health/live")).status_code == 200
                ready = await client.get("/health/ready")
                assert (ready.status_code, ready.headers["content-type"]) == (503, "application/problem+json")
                assert "did not answer" in ready.json()["detail"]
                assert (await client.post("/tasks/execute", json={"execution_id": "x.plan"})).status_code == 503
                proxy.refuse = False
                assert (await client.get("/health/ready")).status_code == 200


@pytest.mark.usefixtures("every_log")
async def test_the_connection_budget_is_told_and_its_excess_is_warned_of(settings: Settings) -> None:
    with capture_logs() as logs:
        await _start(settings.model_copy(update={"max_instances": 10}))
        await _start(settings.model_copy(update={"max_instances": 100}))
    holds, fails = (entry for entry in logs if entry["event"].startswith("connection budget"))
    granted = 300 - 3  # max_connections of the tests' server less superuser_reserved_connections
    assert (holds["log_level"], holds["connections_needed"], holds["connections_granted"]) == ("info", 150, granted)
    assert (fails["log_level"], fails["connections_needed"], fails["connections_granted"]) == ("warning", 1500, granted)


def server_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


async def _logged(process: asyncio.subprocess.Process, message: str) -> dict[str, object]:
    assert process.stderr is not None
    async with asyncio.timeout(60):
        async for line in process.stderr:
            record: dict[str, object] = json.loads(line)
            if message in str(record["message"]):
                return record
    raise AssertionError(f"the service ended without saying {message!r}")

"""Fixtures that every test may use: real parts, each test on a database of its own."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.engine import open_engine
from app.database.migrate import migrate_async
from app.database.session import Database
from app.ledger import Ledger
from app.local.postgres import open_postgres
from app.local.stack import Stack, open_stack
from app.settings import Settings, load
from tests.recorded import Recorded

TEMPLATE = "proctor_template"

# What a shell starts in the background is deaf to SIGINT, and so would be the children that tests stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def every_log() -> Iterator[None]:
    """Logs of every severity can be captured, whatever the process has configured before."""
    configured = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**configured)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for all tests of this process, with a migrated template database. Yields the URL of ``postgres``."""
    with open_postgres(tmp_path_factory.mktemp("postgres"), durable=False, options=("max_connections=300",)) as url:
        asyncio.run(make_template(url))
        yield url


async def make_template(url: str) -> None:
    await _administer(url, f"CREATE DATABASE {TEMPLATE}")
    await migrate_async(load(database_url=of_database(url, TEMPLATE)))


async def _administer(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def of_database(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


@asynccontextmanager
async def own_database(postgres: str) -> AsyncIterator[str]:
    """A migrated database that nobody else sees."""
    name = f"test_{uuid4().hex}"
    await _administer(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield of_database(postgres, name)
    await _administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database_url(postgres: str) -> AsyncIterator[str]:
    async with own_database(postgres) as url:
        yield url


@pytest.fixture(scope="session")
def recorded() -> Recorded:
    """Traces and metrics of the stack, of all tests of this process."""
    return Recorded()


@pytest.fixture(scope="session")
async def stack(postgres: str, recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The whole system, once for all tests of this process: queue, service, children. Tests tell their evaluations apart
    by what they submit."""
    data = tmp_path_factory.mktemp("stack")
    quick: dict[str, Any] = {"min_backoff": 0.1, "renew_interval": 0.5, "log_level": "warning", "log_format": "json"}
    quick |= {"telemetry": recorded.telemetry, "scratch": data / "scratch"}
    async with own_database(postgres) as url, open_stack(data, database_url=url, **quick) as stack:
        yield stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
        yield client


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return load(
        database_url=database_url,
        artifacts=f"file://{tmp_path}/artifacts",
        scratch=tmp_path / "scratch",
        worker="worker-1",
        revision="revision-1",
    )


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    async with open_engine(settings) as engine:
        yield engine


@pytest.fixture
def database(engine: AsyncEngine, settings: Settings) -> Database:
    return Database(engine, settings)


@pytest.fixture
def ledger(database: Database, settings: Settings) -> Ledger:
    return Ledger(database, lease=settings.lease, worker=settings.worker, revision=settings.revision)

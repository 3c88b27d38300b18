"""Brings the database's tables to the newest revision in `migrations/`; alembic is configured in pyproject.toml."""

import asyncio
import functools
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from app.database.engine import open_engine
from app.settings import Settings

_PACKAGE = Path(__file__).parents[1]
MIGRATIONS = next(f for f in (_PACKAGE / "migrations", _PACKAGE.with_name("migrations")) if f.is_dir())
"""A wheel has them inside the package, a checkout beside it."""
LOCK = 0x50524F43  # "PROC": one migration at a time, whoever starts it
STATEMENT_TIMEOUT = 600
"""Seconds for one statement of a migration, and for waiting until another migration is over. Ours."""


def config() -> Config:
    config = Config()  # not of pyproject.toml, which an installed Proctor does not have
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


@functools.cache
def newest_revision() -> str:
    """Of the migrations that this version brings."""
    return ScriptDirectory.from_config(config()).get_current_head() or ""


@functools.cache
def revisions() -> frozenset[str]:
    """All that this version knows."""
    return frozenset(script.revision for script in ScriptDirectory.from_config(config()).walk_revisions())


def migrate(settings: Settings, revision: str = "head") -> tuple[str, str]:
    """Upgrades to `revision`; returns the revisions before and after (empty: no tables yet). Safe to run twice, at once
    too: the second waits for the first."""
    return asyncio.run(migrate_async(settings, revision))


async def migrate_async(settings: Settings, revision: str = "head") -> tuple[str, str]:
    unhurried = settings.model_copy(update={"statement_timeout": STATEMENT_TIMEOUT})
    async with open_engine(unhurried) as engine, engine.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            return await connection.run_sync(_upgrade, revision)


def _upgrade(connection: Connection, revision: str) -> tuple[str, str]:
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    before = MigrationContext.configure(connection).get_current_revision() or ""
    settings = config()
    settings.attributes["connection"] = connection
    command.upgrade(settings, revision)
    return before, MigrationContext.configure(connection).get_current_revision() or ""

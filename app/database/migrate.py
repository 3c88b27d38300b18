"""Brings the database's tables to the newest revision in `migrations/`; alembic is configured in pyproject.toml.

It runs while the service does, of this version and of the one before: see `migrations/script.py.mako` for what a migration
may do.
"""

import asyncio
import functools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    retry_if_result,
    stop_after_delay,
    wait_random_exponential,
)

from app.database.engine import open_engine, usual_isolation
from app.database.failures import describe, state_of
from app.errors import DatabaseUnavailable
from app.settings import Settings

_PACKAGE = Path(__file__).parents[1]
MIGRATIONS = next(f for f in (_PACKAGE / "migrations", _PACKAGE.with_name("migrations")) if f.is_dir())
"""A wheel has them inside the package, a checkout beside it."""
LOCK = 0x50524F43  # "PROC": one migration at a time, whoever starts it
STATEMENT_TIMEOUT = 600
"""Seconds for one statement outside a transaction, as an index that is made while others write. Ours."""

BRIEF = {"lock_timeout": 2, "statement_timeout": 20}
"""Seconds, within a migration's transaction: whoever asks for a table after it queues behind it, first for its lock, then
for its statements. Ours: together less than the service's own `statement_timeout` (30), so that no statement of the
service fails for a migration."""

PATIENCE = 600
"""Seconds for which a lock is tried for again, and another migration's end awaited. Ours: longer than any statement of
the service, and within the time that a deploy's job has."""

_NO_LOCK = ("55P03", "40P01")  # not available in time; deadlock
_TOO_LONG = "57014"

log = structlog.get_logger(__name__)


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


def as_comment(revision: str) -> str:
    """What a migration leaves as the comment on ``alembic_version``: the oldest revision whose code its tables serve."""
    return f"These tables serve Proctor from revision {revision} on."


def serves_from(comment: str | None) -> str | None:
    found = re.search(r"from revision (\S+) on", comment or "")
    return found[1] if found else None


def migrate(settings: Settings, revision: str = "head") -> tuple[str, str]:
    """Upgrades to `revision`; returns the revisions before and after (empty: no tables yet). Safe to run twice, at once
    too: the second waits for the first. Raises `DatabaseUnavailable` when a lock was not to be had for `PATIENCE`."""
    return asyncio.run(migrate_async(settings, revision))


async def migrate_async(
    settings: Settings, revision: str = "head", *, scripts: Config | None = None, patience: float = PATIENCE
) -> tuple[str, str]:
    """What was migrated before a lock could not be had stays; the rest is tried again. `scripts`: others than ours."""
    unhurried = settings.model_copy(update={"statement_timeout": STATEMENT_TIMEOUT})
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda error: state_of(error) in _NO_LOCK),
        stop=stop_after_delay(patience),
        wait=wait_random_exponential(multiplier=0.5, max=15),
        before_sleep=_tell,
        reraise=True,
    )
    async with open_engine(unhurried) as engine, _alone(engine, patience), engine.connect() as connection:
        before = await connection.run_sync(_current)
        try:
            async for attempt in retrying:
                with attempt:
                    await connection.run_sync(_upgrade, scripts or config(), revision, usual_isolation(settings))
        except Exception as error:
            if state_of(error) == _TOO_LONG:
                raise DatabaseUnavailable(
                    f"A statement of the migration took longer than it may while others serve ({describe(error)}): it is"
                    " undone. Do that work in smaller steps, see migrations/script.py.mako."
                ) from error
            if state_of(error) not in _NO_LOCK:
                raise
            raise DatabaseUnavailable(
                f"The migration did not get its lock for {patience:.0f} s ({describe(error)}): look in pg_stat_activity for a"
                " transaction that lasts, end it, and run `proctor migrate` again."
            ) from error
        return before, await connection.run_sync(_current)


@asynccontextmanager
async def _alone(engine: AsyncEngine, patience: float) -> AsyncIterator[None]:
    """Holds the lock in a transaction of its own that does nothing else: it ends with whoever holds it, where a pooler keeps
    the session for others too. It has no snapshot meanwhile, so that an index that is made concurrently does not
    wait for it; for the same reason the lock is asked for again and again, not waited for."""
    retrying = AsyncRetrying(
        retry=retry_if_result(lambda had: not had),
        stop=stop_after_delay(patience),
        wait=wait_random_exponential(multiplier=0.05, max=1),
        retry_error_callback=lambda _: False,
    )
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")

        async def take() -> bool:
            had = bool(await connection.scalar(_TAKE, {"lock": LOCK}))
            if not had:
                await connection.rollback()
            return had

        if not await retrying(take):
            raise DatabaseUnavailable(
                f"Another migration has been running for {patience:.0f} s: try again when it is over."
            )
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await raw.execute(_NO_LIMITS)
        try:
            yield
        finally:
            with suppress(DBAPIError):  # a connection that is lost has let go of it
                await connection.rollback()


_TAKE = text("SELECT pg_try_advisory_xact_lock(:lock)")
_NO_LIMITS = """
SELECT set_config('idle_in_transaction_session_timeout', '0', true),
       CASE WHEN current_setting('server_version_num')::int >= 170000 THEN set_config('transaction_timeout', '0', true) END
"""
"""For the transaction that holds the lock. To be sent in one step, which also ends what the two steps of a prepared
statement leave open: its portal keeps a snapshot for as long as the transaction lasts. Postgres has had
`transaction_timeout` since 17."""


def _upgrade(connection: Connection, scripts: Config, revision: str, isolation: IsolationLevel) -> None:
    connection.rollback()  # alembic sees to its own transactions
    connection.execution_options(isolation_level="READ COMMITTED")
    scripts.attributes["connection"] = connection
    try:
        command.upgrade(scripts, revision)
    finally:
        connection.rollback()
        connection.execution_options(isolation_level=isolation)


def _current(connection: Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        log.warning("the migration is tried again", attempt=state.attempt_number, reason=describe(error))

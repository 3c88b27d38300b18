"""What the service must know of its database before it serves: that it is let in, that the tables are this version's or a
later one's that still serve it, and that there are connections enough for as many workers as may run.

A deploy migrates first. Until the new revision serves, and wherever a deploy is rolled back, this version works on newer
tables: each migration says from which revision on (see `migrations/script.py.mako`)."""

from dataclasses import dataclass

import structlog
from sqlalchemy import text

from app.database.failures import POOLER
from app.database.migrate import newest_revision, revisions, serves_from
from app.database.session import Database
from app.errors import DatabaseRefused
from app.settings import Settings

TABLES = ("evaluations", "task_executions", "execution_attempts", "sample_results")

# Postgres keeps some connections back for administrators; `reserved_connections` is new in Postgres 16.
_LOOK = text("""/* preflight.look */
SELECT to_regclass('alembic_version') IS NOT NULL AS migrated, current_user AS who,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
       - coalesce(current_setting('reserved_connections', true), '0')::int AS connections,
       (SELECT setting FROM pg_settings WHERE name = 'statement_timeout') AS statement_timeout
""")
_REVISION = text("""/* preflight.revision */
SELECT version_num, obj_description('alembic_version'::regclass, 'pg_class') AS comment FROM alembic_version
""")
_LACKING = text("""/* preflight.lacking */
SELECT t || ' ' || p AS privilege
FROM unnest(CAST(:tables AS text[])) t, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) p WHERE NOT has_table_privilege(t, p)
""")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """`revision`: the tables'; `ahead`: it is newer than the code. `connections`: how many the database grants to ordinary
    users."""

    revision: str
    connections: int
    ahead: bool = False


async def look(database: Database, *, patience: float = 0) -> Found:
    """Raises `DatabaseUnavailable` when there is no answer, `DatabaseRefused` when the answer is no: one line that says
    what is wrong and what to do."""
    (row,) = await database.run(_LOOK, patience=patience)
    if row.statement_timeout != database.statement_limit:
        raise DatabaseRefused(
            f"{POOLER}: the limits that a connection begins with do not reach the server (statement_timeout is"
            f" {row.statement_timeout} ms, not {database.statement_limit})."
        )
    if not row.migrated:
        raise DatabaseRefused("The database has no tables yet: run `proctor migrate`.")
    versions = await database.run(_REVISION, patience=patience)
    revision = versions[0].version_num if versions else "none"
    ahead = _is_ahead(revision, serves_from(versions[0].comment) if versions else None)
    lacking = [r.privilege for r in await database.run(_LACKING, {"tables": list(TABLES)}, patience=patience)]
    if lacking:
        raise DatabaseRefused(
            f"The database user {row.who} lacks {', '.join(lacking)}: GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES"
            f' IN SCHEMA public TO "{row.who}".'
        )
    return Found(revision, row.connections, ahead)


def _is_ahead(current: str, oldest: str | None) -> bool:
    """Whether the tables are newer than this version, and serve it. `oldest`: the first revision that they serve."""
    newest = newest_revision()
    if current == newest:
        return False
    if current in revisions() or current == "none":
        raise DatabaseRefused(f"The database is at revision {current}, not {newest}: run `proctor migrate`.")
    if oldest not in revisions():
        serves = f" and serves {oldest} or later" if oldest else ""
        raise DatabaseRefused(
            f"The database is at revision {current}, which is newer than this version of Proctor ({newest}){serves}: deploy a"
            " newer version."
        )
    return True


def tell_revision(found: Found) -> None:
    if found.ahead:
        log.info("the tables are newer and serve this version too", tables=found.revision, code=newest_revision())


def tell_budget(settings: Settings, found: Found) -> None:
    """Logs the arithmetic, and warns when it does not work out: the last instances would be turned away."""
    needed = settings.max_instances * settings.connections
    figures = {
        "instances": settings.max_instances,
        "connections_each": settings.connections,
        "connections_needed": needed,
        "connections_granted": found.connections,
    }
    if needed <= found.connections:
        log.info("connection budget", **figures)
    else:
        log.warning(
            "connection budget cannot hold: raise the database's max_connections, or lower maxScale and"
            " PROCTOR_MAX_INSTANCES",
            **figures,
        )

"""Alembic's entry: `proctor migrate` hands it a connection; on its own (`alembic revision …`) it reads the settings.

Each migration is a transaction of its own, with its locks and statements bounded (`BRIEF`), and leaves word in the database
of the oldest code that its tables still serve.
"""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from sqlalchemy import Connection, event

from app.database.engine import open_engine
from app.database.migrate import BRIEF, as_comment
from app.database.tables import metadata
from app.settings import load


def run(connection: Connection) -> None:
    """`connection` is in no transaction."""
    context.configure(connection=connection, **CONFIGURED)
    event.listen(connection, "begin", be_brief)
    try:
        with context.begin_transaction():
            context.run_migrations()
    finally:
        event.remove(connection, "begin", be_brief)


def be_brief(connection: Connection) -> None:
    """Outside a transaction (`autocommit_block`) nobody waits behind what is done."""
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        for name, seconds in BRIEF.items():
            connection.exec_driver_sql(f"SET LOCAL {name} = '{seconds}s'")


def leave_word(ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]) -> None:
    words = "NULL"
    for head in heads:
        (script,) = context.script.get_revisions(head)
        words = f"'{as_comment(script.module.serves_from)}'"
    ctx.execute(f"COMMENT ON TABLE alembic_version IS {words}")


CONFIGURED: dict[str, Any] = {
    "target_metadata": metadata,
    "transaction_per_migration": True,
    "on_version_apply": leave_word,
}


async def run_alone() -> None:
    async with open_engine(load()) as engine, engine.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        await connection.run_sync(run)
        await connection.commit()


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **CONFIGURED)
    with context.begin_transaction():
        context.run_migrations()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_alone())

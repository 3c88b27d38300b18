"""Alembic's entry: `proctor migrate` hands it a connection; on its own (`alembic revision …`) it reads the settings."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from app.database.engine import open_engine
from app.database.tables import metadata
from app.settings import load


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()


async def run_alone() -> None:
    async with open_engine(load()) as engine, engine.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            await connection.run_sync(run)


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_alone())

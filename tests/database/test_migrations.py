"""The migrations build exactly the tables that the code speaks of."""

import asyncio
from uuid import uuid4

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.database.migrate import migrate_async, newest_revision
from app.database.tables import metadata
from app.settings import Settings, load
from tests.conftest import of_database

CATALOGUE = """
SELECT 'column', c.table_name, c.column_name,
       concat_ws(' ', c.data_type, c.collation_name, c.is_nullable, c.column_default)
FROM information_schema.columns c WHERE c.table_schema = 'public' AND c.table_name <> 'alembic_version'
UNION ALL
SELECT 'constraint', c.conrelid::regclass::text, c.conname, pg_get_constraintdef(c.oid) FROM pg_constraint c
JOIN pg_namespace n ON n.oid = c.connamespace
WHERE n.nspname = 'public' AND c.conrelid::regclass::text <> 'alembic_version'
UNION ALL
SELECT 'index', tablename, indexname, indexdef FROM pg_indexes
WHERE schemaname = 'public' AND tablename <> 'alembic_version'
ORDER BY 1, 2, 3
"""


async def catalogue(url: str) -> list[tuple[str, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(CATALOGUE)]
    finally:
        await connection.close()


async def test_migrations_and_tables_agree(postgres: str, database_url: str) -> None:
    name = f"metadata_{uuid4().hex}"
    admin = await asyncpg.connect(postgres)
    await admin.execute(f"CREATE DATABASE {name}")
    engine = create_async_engine(of_database(postgres, name).replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()

    migrated, declared = await catalogue(database_url), await catalogue(of_database(postgres, name))

    await admin.execute(f"DROP DATABASE {name}")
    await admin.close()
    assert migrated == declared
    assert len(declared) > 80


async def test_migrating_twice_and_at_once_is_the_same_as_once(postgres: str) -> None:
    name = f"twice_{uuid4().hex}"
    admin = await asyncpg.connect(postgres)
    await admin.execute(f"CREATE DATABASE {name}")
    settings = load(database_url=of_database(postgres, name))
    ends = await asyncio.gather(*(migrate_async(settings) for _ in range(4)))
    assert sorted(ends) == [("", newest_revision())] + [(newest_revision(), newest_revision())] * 3
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def test_a_healthy_connection_is_kept(engine: AsyncEngine, settings: Settings) -> None:
    pids = set()
    for _ in range(5):
        async with engine.connect() as connection:
            pids.add((await connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one())
    assert len(pids) == 1

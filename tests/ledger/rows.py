"""The rows as they are, for tests to compare."""

from typing import Any
from uuid import UUID

from sqlalchemy import Row, Table, select, text

from app.database.session import Database
from app.database.tables import evaluations, execution_attempts, sample_results, task_executions


async def evaluation(database: Database, id: UUID) -> Row[Any]:
    (row,) = await database.run(select(evaluations).where(evaluations.c.id == id))
    return row


async def all_evaluations(database: Database) -> list[Row[Any]]:
    return list(await database.run(select(evaluations)))


async def execution(database: Database, id: str) -> Row[Any]:
    (row,) = await database.run(select(task_executions).where(task_executions.c.id == id))
    return row


async def executions(database: Database, evaluation_id: UUID) -> dict[str, str]:
    """State of each execution, by the last part of its id, in the order of the plan."""
    e = task_executions.c
    found = select(e.id, e.state).where(e.evaluation_id == evaluation_id).order_by(e.position)
    return {r.id.rpartition(".")[2]: r.state for r in await database.run(found)}


async def history(database: Database, execution_id: str) -> list[tuple[int, str | None]]:
    """Each attempt with its outcome; None: it goes on."""
    return [(r.attempt, r.outcome) for r in await attempts(database, execution_id)]


async def attempts(database: Database, execution_id: str) -> list[Row[Any]]:
    a = execution_attempts.c
    found = select(execution_attempts).where(a.execution_id == execution_id).order_by(a.attempt)
    return list(await database.run(found))


async def results(database: Database, evaluation_id: UUID) -> list[Row[Any]]:
    r = sample_results.c
    found = select(sample_results).where(r.evaluation_id == evaluation_id).order_by(r.sample_id, r.epoch)
    return list(await database.run(found))


async def reports(database: Database, evaluation_id: UUID) -> int:
    """How often the report was made or armed again: each time one Cloud Task."""
    e = task_executions.c
    found = await database.run(select(e.enqueues).where(e.evaluation_id == evaluation_id, e.kind == "report"))
    return sum(r.enqueues for r in found)


async def everything(database: Database) -> list[tuple[Any, ...]]:
    """All rows of the database with their physical version: equal only if nothing at all was written, not even the same
    again."""
    tables = (evaluations, task_executions, execution_attempts, sample_results)
    return [tuple(row) for table in tables for row in await _versions(database, table)]


async def _versions(database: Database, table: Table) -> list[Row[Any]]:
    found = text(f"SELECT tableoid, ctid::text, xmin::text, to_jsonb(t) FROM {table.name} t ORDER BY ctid")
    return list(await database.run(found))


async def seconds_until(database: Database, execution_id: str, column: str) -> float:
    """From now, by the database's clock."""
    found = text(f"SELECT extract(epoch FROM {column} - clock_timestamp())::float8 FROM task_executions WHERE id = :id")
    (row,) = await database.run(found, {"id": execution_id})
    return float(row[0])

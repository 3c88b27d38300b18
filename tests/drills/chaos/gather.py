"""Writes the history down once everything is over."""

import json
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg

from tests.drills.chaos.history import Attempt, Call, Evaluation, Execution, File, Logged, Result
from tests.drills.chaos.logs import Logs
from tests.faults.models import Request

_ROWS = {
    "evaluations": "SELECT id::text, state, remaining, created_at, finished_at, cancel_requested_at, results, usage,"
    " error, log FROM evaluations ORDER BY created_at",
    "executions": "SELECT id, evaluation_id::text AS evaluation, kind, state, attempt, failures, crashes, created_at,"
    " finished_at, samples, error FROM task_executions ORDER BY evaluation_id, position",
    "attempts": "SELECT execution_id AS execution, attempt, worker, started_at, ended_at, outcome, error, usage,"
    " (push ->> 'x-cloudtasks-tasketa')::float8 AS due_at FROM execution_attempts ORDER BY execution_id, attempt",
    "results": "SELECT evaluation_id::text AS evaluation, sample_id AS sample, epoch, execution_id AS execution, attempt,"
    " scores, usage, error, transcript, recorded_at, note FROM sample_results ORDER BY evaluation_id, sample_id, epoch",
}


async def rows(database_url: str) -> dict[str, Any]:
    """The four tables, as fields of a `History`: one moment's, for all of them."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            found = {name: [_values(row) for row in await connection.fetch(sql)] for name, sql in _ROWS.items()}
    finally:
        await connection.close()
    for execution in found["executions"]:
        execution["samples"] = tuple((str(s["id"]), s["epoch"]) for s in execution["samples"] or ())
    return {
        "evaluations": [Evaluation(**row) for row in found["evaluations"]],
        "executions": [Execution(**row) for row in found["executions"]],
        "attempts": [Attempt(**row) for row in found["attempts"]],
        "results": [Result(**row) for row in found["results"]],
    }


def _values(row: Any) -> dict[str, Any]:
    return {name: _value(name, value) for name, value in row.items()}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.timestamp()
    if name in ("results", "usage", "error", "samples", "scores") and value is not None:
        return json.loads(value)
    return value


def calls(requests: Iterable[Request]) -> list[Call]:
    """The model provider's, in the drill's own process, by the clock of the epoch."""
    shift = time.time() - time.monotonic()
    return [
        Call(
            conversation=r.conversation,
            kind=r.kind,
            turns=r.turns,
            tokens=r.tokens,
            at=r.at + shift,
            answered=None if r.answered is None else r.answered + shift,
            status=r.status,
        )
        for r in requests
    ]


def files(root: Path) -> list[File]:
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted((File(str(f.relative_to(root)), f.stat().st_mtime) for f in found), key=lambda file: file.path)


async def logged(logs: Logs, root: Path, rows: dict[str, Any]) -> list[Logged]:
    """What the logs hold that these rows point at."""
    urls = {result.transcript for result in rows["results"]} | {e.log for e in rows["evaluations"] if e.log}
    return await logs.read(root, sorted(url.removeprefix(f"file://{root}/") for url in urls))

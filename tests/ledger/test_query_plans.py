"""Each statement finds its rows by an index, however many executions there ever were.

The database holds a million runs of 9,900 evaluations. Each statement is carried out for real, and undone; and more than
once, because Postgres plans what is prepared (as all of ours is) for its values at first, and after five times perhaps
for any values.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from hashlib import md5
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import ARRAY, TextClause
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.types import TypeEngine

from app import ledger_statements as sql
from app.database.tables import metadata
from app.evaluations.spend import SPEND
from tests.conftest import TEMPLATE, of_database

MOST_ROWS = 1000
"""Rows of one table that a statement may look at: those it is about, with room for the planner's own choice."""

# Evaluation n has 100 runs, the first one 10,100. One in ten (1, 11, 21 …) is still running: half of its runs are done,
# of the others one in ten runs and nine are pending and enqueued; in one evaluation of a hundred, run 100 is due.
SHAPES = """
CREATE TEMPORARY TABLE shapes AS
SELECT n, md5(n::text)::uuid AS id, CASE n WHEN 1 THEN 10100 ELSE 100 END AS runs, n % 10 = 1 AS open
FROM generate_series(1, 9900) AS n
"""
EVALUATIONS = """
INSERT INTO evaluations (id, created_by, idempotency_key, spec, spec_digest, state, remaining, finished_at)
SELECT id, 'user-' || n % 50, id, '{"task": "t", "model": "m"}', '', CASE WHEN open THEN 'running' ELSE 'succeeded' END,
       CASE WHEN open THEN runs / 2 ELSE 0 END, CASE WHEN NOT open THEN now() END
FROM shapes
"""
PLANS_AND_REPORTS = """
INSERT INTO task_executions (id, evaluation_id, kind, position, state, attempt, enqueues, finished_at)
SELECT id || '.plan', id, 'plan', 0, 'succeeded', 1, 1, now() FROM shapes
UNION ALL SELECT id || '.report', id, 'report', 2147483647, 'succeeded', 1, 1, now() FROM shapes WHERE NOT open
"""
RUNS = """
INSERT INTO task_executions (id, evaluation_id, kind, position, samples, state, attempt, claim_id, worker,
                             lease_expires_at, enqueues, sweep_at, finished_at)
SELECT s.id || '.' || r, s.id, 'run', r, jsonb_build_array(jsonb_build_object('id', r, 'epoch', 1)), x.state,
       (x.state <> 'pending')::int, CASE x.state WHEN 'running' THEN s.id END,
       CASE x.state WHEN 'running' THEN 'worker' END, CASE x.state WHEN 'running' THEN now() + interval '1 day' END, 1,
       CASE WHEN x.state <> 'succeeded'
            THEN now() + CASE WHEN r = 100 AND s.n % 100 = 11 THEN interval '-1 minute' ELSE interval '1 day' END END,
       CASE x.state WHEN 'succeeded' THEN now() END
FROM shapes s CROSS JOIN LATERAL generate_series(1, s.runs) AS r
CROSS JOIN LATERAL (SELECT CASE WHEN NOT s.open OR r <= s.runs / 2 THEN 'succeeded' WHEN r % 10 = 1 THEN 'running'
                                ELSE 'pending' END AS state) AS x
WHERE s.n % 2 = {half}
"""
RAN = """
FROM shapes s CROSS JOIN LATERAL generate_series(1, s.runs) AS r
WHERE s.n % 5 = 1 AND (NOT s.open OR r <= s.runs / 2 OR r % 10 = 1)
"""
ATTEMPTS = f"""
INSERT INTO execution_attempts (execution_id, attempt, claim_id, worker, revision, ended_at, outcome)
SELECT s.id || '.' || r, 1, s.id, 'worker', '', now(), 'succeeded' {RAN}
"""
RESULTS = f"""
INSERT INTO sample_results (evaluation_id, sample_id, epoch, execution_id, attempt, scores, usage, transcript)
SELECT s.id, r, 1, s.id || '.' || r, 1, '{{}}', '{{}}', 'file:///logs/a.eval' {RAN} AND (NOT s.open OR r % 10 <> 1)
"""


@pytest.fixture
async def loaded(postgres: str) -> AsyncIterator[str]:
    """The URL of the database that holds all that."""
    name = "a_million_executions"
    admin = await asyncpg.connect(postgres)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    url = of_database(postgres, name)
    # two connections, because loading is all computing and two cores are the least there is
    await asyncio.gather(
        load(url, EVALUATIONS, RUNS.format(half=0), PLANS_AND_REPORTS),
        load(url, RUNS.format(half=1), ATTEMPTS, RESULTS),
    )
    await load(url, "ANALYZE")
    yield url
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def load(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    # no foreign keys are checked on the way in: they hold by construction
    for statement in ("SET session_replication_role = replica", SHAPES, *statements):
        await connection.execute(statement)
    await connection.close()


def evaluation(n: int) -> UUID:
    return UUID(md5(str(n).encode()).hexdigest())


LARGE, OPEN, OVER = evaluation(1), evaluation(11), evaluation(2)
RUNNING, PENDING = f"{LARGE}.5051", f"{LARGE}.5052"
SAMPLE = {"sample_id": "5051", "epoch": 1, "scores": {}, "usage": {}, "transcript": "file:///logs/b.eval"}
SUBMITTED = {
    "evaluation": uuid4(),
    "created_by": "user-1",
    "spec": {"task": "t"},
    "spec_digest": "",
    "traceparent": None,
    "sweep": 120.0,
}
CLAIMED = {"claim_id": uuid4(), "worker": "worker", "revision": "", "lease": 120.0, "push": None, "sweep": 120.0}
MADE_BY: dict[str, Any] = {"versions": {"inspect_ai": "1"}, "earlier_versions": None}
SETTLED: dict[str, Any] = {
    "id": RUNNING,
    "attempt": 1,
    "outcome": "succeeded",
    "crashed": False,
    "max_failures": 1,
    "error_limit": 1,
    "sweep": 120.0,
    "sweep_released": 600.0,
    "error": None,
    "samples": [SAMPLE],
    "replace": False,
    "runs": [],
    "runs_due": 0.0,
    "usage": None,
    "cost": None,
    **MADE_BY,
    "mixed_versions": None,
    "end_state": "failed",
    "results": None,
    "reports": True,
    "end_usage": None,
    "end_error": None,
    "log": None,
}
EXPIRING = {"days": 0.0, "lease": 120.0}
MINE = [{"id": f"{evaluation(n)}.51", "attempt": 1, "progress": {"tokens": 1}} for n in range(11, 161, 10)]
FAN_OUT = [{"n": 20_000 + n, "samples": [{"id": n, "epoch": 1}]} for n in range(100)]

# for the values given; for any values; and what Postgres chooses in the end
PLANNED = ("force_custom_plan", "force_generic_plan", "auto")
LOOKED_AT = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck", "Rows Removed by Join Filter")

CASES: dict[str, tuple[TextClause, dict[str, Any]]] = {
    "submit": (sql.SUBMIT, SUBMITTED | {"idempotency_key": "new"}),
    "submit the same key": (sql.SUBMIT, SUBMITTED | {"idempotency_key": str(LARGE)}),
    "claim": (sql.CLAIM, CLAIMED | {"id": PENDING}),
    "claim what is held": (sql.CLAIM, CLAIMED | {"id": RUNNING}),
    "settle": (sql.SETTLE, SETTLED),
    "settle a fan-out": (sql.SETTLE, SETTLED | {"runs": FAN_OUT}),
    "record": (sql.RECORD, {"id": RUNNING, "attempt": 1, "samples": [SAMPLE], **MADE_BY}),
    "renew": (sql.RENEW, {"mine": MINE, "lease": 120.0, "sweep": 120.0}),
    "cancel": (sql.CANCEL, {"evaluation": OPEN, "sweep": 120.0}),
    "errored": (sql.MARK_ERRORED, {"id": RUNNING, "attempt": 1, "errored": 1}),
    "stop": (sql.STOP, {"evaluation": OPEN, "sweep": 120.0}),
    "lock to retry": (sql.LOCK_TO_RETRY, {"evaluation": OVER}),
    "rearm runs": (sql.REARM, {"evaluation": OVER, "what": "runs"}),
    "rearm the report": (sql.REARM, {"evaluation": OVER, "what": "report"}),
    "reopen": (sql.REOPEN, {"evaluation": OVER, "remaining": 0}),
    "take due": (sql.TAKE_DUE, {"most": 500, "sweep": 120.0}),
    "enqueued": (
        sql.ENQUEUED,
        {"tasks": [{"id": f"{evaluation(n)}.100", "number": 1} for n in (11, 111)], "sweep_enqueued": 86400.0},
    ),
    "cancelled": (sql.CANCELLED, {"evaluation": OPEN}),
    "unfinished": (sql.UNFINISHED, {"evaluation": OPEN}),
    "spend": (SPEND, {"ids": [OVER, OPEN]}),
    "interrupted": (sql.INTERRUPTED, {"id": RUNNING, "attempt": 2}),
    "scored": (sql.SCORED, {"id": RUNNING}),
    "versions": (sql.VERSIONS, {"evaluation": OPEN}),
    "expire transcripts": (sql.EXPIRE_TRANSCRIPTS, EXPIRING),
    "expire checkpoints": (sql.EXPIRE_CHECKPOINTS, EXPIRING),
    "expired": (
        sql.EXPIRED,
        {"evaluation": OVER, "until": "2026-01-01T00:00:00Z", "what": "transcripts", "done": True},
    ),
    "to report": (sql.TO_REPORT, {"evaluation": OVER}),
    "spent": (sql.SPENT, {"id": RUNNING, "attempt": 1, "usage": {"tokens": 1}, "cost": 0.1}),
    "counted log": (sql.COUNTED_LOG, {"evaluation": OVER}),
    "plan": (sql.PLAN, {"id": f"{OPEN}.plan"}),
    "samples page": (sql.SAMPLES_PAGE, {"evaluation": LARGE, "position": 5000, "place": 1, "most": 100}),
}


# One test, so that the database is loaded once however many workers share the suite.
async def test_each_statement_looks_at_few_rows_of_a_million(loaded: str, subtests: pytest.Subtests) -> None:
    for case, (statement, parameters) in CASES.items():
        for planned in PLANNED:
            with subtests.test(case=case, planned=planned):
                looks_at_few_rows(await carried_out(loaded, statement, parameters, planned))


def looks_at_few_rows(nodes: list[dict[str, Any]]) -> None:
    tables = sorted({node["Relation Name"] for node in nodes if node.get("Relation Name") in metadata.tables})
    assert tables, "it looks at some"
    assert [node for node in nodes if node["Node Type"] == "Seq Scan" and node["Relation Name"] in tables] == []
    assert {table: n for table in tables if (n := rows_looked_at(nodes, table)) > MOST_ROWS} == {}


def test_every_statement_of_the_ledger_is_tried() -> None:
    ours = {name for name, value in vars(sql).items() if isinstance(value, TextClause)}
    tried = {name for name in ours for statement, _ in CASES.values() if statement is getattr(sql, name)}
    about_all = {
        "ALL_DUE",  # everything that is open, and for after a disaster
        "WAITING",  # everything that waits, once a minute
    }
    assert ours - tried == about_all


async def carried_out(
    url: str, statement: TextClause, parameters: dict[str, Any], planned: str
) -> list[dict[str, Any]]:
    """The nodes of the plan, with what each really did, before it was undone."""
    compiled = statement.compile(dialect=dialect())  # type: ignore[no-untyped-call]
    values = [literal(parameters[name], compiled.binds[name].type) for name in compiled.positiontup or ()]
    execute = f"EXECUTE it({', '.join(values)})"
    connection = await asyncpg.connect(url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(f"SET LOCAL plan_cache_mode = {planned}")
    await connection.execute(f"PREPARE it AS {compiled}")
    for _ in range(6 if planned == "auto" else 0):  # from the sixth time on the general plan may be taken
        await connection.execute(f"EXPLAIN {execute}")
    explained = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {execute}")
    await transaction.rollback()
    await connection.close()
    return list(below(json.loads(explained)[0]["Plan"]))


def below(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from below(child)


def rows_looked_at(nodes: list[dict[str, Any]], table: str) -> float:
    """Those that went on and those that a filter removed; what a ModifyTable returns was looked at below it."""
    scans = [n for n in nodes if n.get("Relation Name") == table and n["Node Type"] != "ModifyTable"]
    return float(sum(n["Actual Loops"] * sum(n[what] for what in n if what in LOOKED_AT) for n in scans))


def literal(value: Any, type: TypeEngine[Any]) -> str:
    """Of unknown type, so that the parameter's own decides."""
    if value is None:
        return "NULL"
    if isinstance(type, JSONB):
        value = json.dumps(value)
    elif isinstance(type, ARRAY):
        value = "{" + ",".join(map(str, value)) + "}"
    return "'" + str(value).replace("'", "''") + "'"

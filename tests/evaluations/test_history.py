"""Executions with their attempts, and what is explained of them, as read from the ledger."""

import re
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from app.database.session import Database
from app.errors import NotFound
from app.evaluations.explain import Rules
from app.evaluations.read import Reader
from app.ledger import End, Held, Ledger, Settlement
from tests.ledger.factories import FAULT, claim, ended, errored, let_expire, make_due, planned, report, scored, settle


@pytest.fixture
def reader(database: Database) -> Reader:
    return Reader(database)


def used(tokens: int, calls: int = 2) -> dict[str, Any]:
    """A progress, as attempts leave it."""
    return {"samples_done": 0, "model_calls": calls, "tokens": tokens, "cost": 0.25, "step": "model m"}


def timeless(sentences: list[str]) -> list[str]:
    return [re.sub(r"[\d.]+ (s|min|h)\b", "…", sentence) for sentence in sentences]


async def take_over(ledger: Ledger, database: Database, execution: str) -> None:
    await let_expire(database, execution)
    assert (await claim(ledger, execution)).verdict == "taken over"


async def set_attempt(database: Database, execution: str, attempt: int, column: str, value: str | None) -> None:
    change = f"UPDATE execution_attempts SET {column} = CAST(:value AS jsonb) WHERE execution_id = :id AND attempt = :n"
    await database.run(text(change), {"id": execution, "n": attempt, "value": value})


async def test_every_attempt_has_its_row(ledger: Ledger, database: Database, reader: Reader) -> None:
    execution = f"{await planned(ledger)}.1"
    push = {"x-cloudtasks-taskname": "t", "x-cloudtasks-taskretrycount": "0"}
    assert await ledger.claim(execution, uuid4(), push)
    await ledger.renew([Held(execution, 1, used(12_340))])
    await take_over(ledger, database, execution)
    second = await reader.execution(execution)
    failed = Settlement("failed", error=FAULT, max_failures=2, usage=used(700, 1), cost=0.1)
    assert await ledger.settle(execution, 2, failed)
    await settle(ledger, await claim(ledger, execution), samples=[scored(1)], usage=used(900), cost=0.5)

    view = await reader.execution(execution)
    rows = [(a.attempt, a.outcome, a.error_class, a.tokens, a.model_calls, a.cost) for a in view.attempts]
    assert rows == [
        (1, "interrupted", "infrastructure", 12_340, 2, 0.25),
        (2, "failed", "evaluation", 700, 1, 0.1),
        (3, "succeeded", None, 900, 2, 0.5),
    ]
    assert [(a.worker, a.revision) for a in view.attempts] == [("worker-1", "revision-1")] * 3
    assert [a.push for a in view.attempts] == [push, None, None]
    for a in view.attempts:
        assert a.ended_at is not None
        assert a.seconds == (a.ended_at - a.started_at).total_seconds() > 0
    assert re.match(r"It succeeded \d\.\d s ago", view.explanation[0])
    assert view.explanation[1].endswith("the worker or its child was lost. It had spent 12,340 tokens.")
    assert second.attempts[1].outcome is None


async def test_what_runs_is_told_by_the_database_s_clock(ledger: Ledger, database: Database, reader: Reader) -> None:
    execution = f"{await planned(ledger)}.1"
    await claim(ledger, execution)
    await ledger.renew([Held(execution, 1, used(3456, 12))])
    await database.run(text("UPDATE execution_attempts SET started_at = started_at - interval '312 s'"))

    view = await reader.execution(execution)
    (running,) = view.attempts
    assert (running.tokens, running.model_calls, running.cost, running.outcome) == (3456, 12, 0.25, None)
    assert 312 <= running.seconds < 330
    lease, progress, *_ = view.explanation
    assert lease.startswith("It runs: worker worker-1 (attempt 1) holds it; its lease lasts 1")
    assert progress.endswith("s: 12 model calls, 3,456 tokens; its last step: model m.")

    await database.run(
        text("UPDATE task_executions SET lease_expires_at = now() - interval '312 s' WHERE worker IS NOT NULL")
    )
    assert re.search(r"its lease ran out (5 min 1|3[12])\d s ago", (await reader.execution(execution)).explanation[0])


async def test_what_was_given_back_waits_for_the_queue_and_what_is_due_for_the_sweeper(
    ledger: Ledger, database: Database, reader: Reader
) -> None:
    """The tie between an attempt's end and `sweep_at` is the ledger's own; here it is held to it."""
    execution = f"{await planned(ledger)}.1"
    assert "No Cloud Task has been made for it yet." in (await reader.execution(execution)).explanation

    (task,) = await ledger.take_due(10)
    assert (
        "It is not known whether its Cloud Task (number 1) exists." in (await reader.execution(execution)).explanation
    )
    await ledger.enqueued([task])
    enqueued = (await reader.execution(execution)).explanation
    assert "The queue has its Cloud Task (number 1) and is to deliver it." in enqueued
    assert enqueued[-1].startswith("The sweeper looks at it next in 2")

    await settle(ledger, await claim(ledger, execution), "interrupted", error=FAULT)
    back = (await reader.execution(execution)).explanation
    assert back[:2] == ["It waits for attempt 2.", "The queue is to deliver its Cloud Task again."]
    await make_due(database, execution)
    assert "It is due for the sweeper" in (await reader.execution(execution)).explanation[2]


async def test_what_is_armed_again_says_so(ledger: Ledger, reader: Reader) -> None:
    evaluation = await ended(ledger, "failed", end=End("failed"))
    execution = f"{evaluation}.1"
    before = (await reader.execution(execution)).explanation
    assert before[-1] == f"To run it again: proctor retry {evaluation}"
    await ledger.retry(evaluation)
    assert (await reader.execution(execution)).explanation[0] == "It is to run again, after 1 attempt."


async def test_rows_of_an_older_form_are_read(ledger: Ledger, database: Database, reader: Reader) -> None:
    evaluation = await planned(ledger)
    execution = f"{evaluation}.1"
    for _ in range(3):
        await settle(ledger, await claim(ledger, execution), "interrupted")
    by_model = '{"m": {"input_tokens": 1, "total_tokens": 600}, "judge": {"total_tokens": 34}, "odd": {}}'
    await set_attempt(database, execution, 1, "usage", by_model)
    await set_attempt(database, execution, 2, "usage", None)
    await set_attempt(database, execution, 3, "error", '{"error_class": "unheard of", "message": "?"}')

    view = await reader.execution(execution)
    assert [(a.tokens, a.model_calls, a.error_class) for a in view.attempts] == [(634, None, None)] + [(None,) * 3] * 2
    assert (await reader.evaluation(evaluation)).tokens.spent == 634


async def test_an_evaluation_s_worst_executions_are_explained_first(
    ledger: Ledger, database: Database, reader: Reader
) -> None:
    evaluation = await planned(ledger, 9)
    ids = [f"{evaluation}.{n}" for n in range(10)]
    held = {n: await claim(ledger, ids[n]) for n in (1, 2, 3, 4, 5, 7)}
    await settle(ledger, held[1], samples=[scored(1)])
    await settle(ledger, held[2], "failed", error=FAULT)
    await settle(ledger, held[3], "interrupted", error=FAULT)
    await take_over(ledger, database, ids[5])
    await let_expire(database, ids[7])
    await database.run(
        text("UPDATE task_executions SET sweep_at = now() - interval '1 h' WHERE id = :id"), {"id": ids[9]}
    )

    found = await reader.explanation(evaluation)
    assert [e.id for e in found.executions] == [ids[n] for n in (7, 9, 2, 3, 5)]
    assert found.explanation[:2] == [
        "It runs: 2 of its 9 runs are over; 3 are running, 4 are pending.",
        "1 run failed so far.",
    ]
    for explained in found.executions:
        whole = await reader.execution(explained.id)
        assert (explained.state, explained.attempt, explained.samples) == (whole.state, whole.attempt, whole.samples)
        assert timeless(explained.explanation) == timeless(whole.explanation)


async def test_of_executions_that_nobody_has_begun_one_is_explained_if_there_is_nothing_else(
    ledger: Ledger, reader: Reader
) -> None:
    evaluation = await planned(ledger, 3)
    assert [e.id for e in (await reader.explanation(evaluation)).executions] == [f"{evaluation}.1"]
    await claim(ledger, f"{evaluation}.3")
    assert [e.id for e in (await reader.explanation(evaluation)).executions] == [f"{evaluation}.3"]


async def test_an_evaluation_that_is_over_says_how_it_ended(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger, 2)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), samples=[scored(1)])
    await settle(ledger, await claim(ledger, f"{evaluation}.2"), "failed", samples=[errored(2)], error=FAULT)
    await report(ledger, evaluation, End("failed", error=FAULT))
    found = await reader.explanation(evaluation)
    assert found.explanation[0].endswith("s ago (evaluation): The task raised an error.")
    assert found.explanation[1] == f"Of its 2 runs, 1 failed. To run those again: proctor retry {evaluation}"
    assert [(e.id, e.explanation[-1]) for e in found.executions] == [
        (f"{evaluation}.2", f"To run it again: proctor retry {evaluation}")
    ]


async def test_the_rules_that_are_told_are_those_given(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger)
    await claim(ledger, f"{evaluation}.1")
    rules = Rules(renew_interval=42)
    for explained in (
        await reader.execution(f"{evaluation}.1", rules),
        (await reader.explanation(evaluation, rules)).executions[0],
    ):
        assert "is renewed every 42 s" in explained.explanation[0]


async def test_what_is_not_there_is_not_found(reader: Reader) -> None:
    with pytest.raises(NotFound, match=r"no execution 'e\.1'"):
        await reader.execution("e.1")
    with pytest.raises(NotFound, match="no evaluation"):
        await reader.explanation(uuid4())

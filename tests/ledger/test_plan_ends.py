"""However a plan ends, the report comes, exactly once: nothing else could end the evaluation."""

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import End, Enqueue, Ledger, Outcome
from tests.ledger import rows
from tests.ledger.factories import FAULT, claim, let_expire, push, report, samples_of, settle, submitted
from tests.ledger.transactions import uncommitted, until_blocked


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled"])
async def test_a_plan_that_leads_to_no_run_reports(ledger: Ledger, database: Database, outcome: Outcome) -> None:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    settled = await settle(ledger, plan, outcome, error=FAULT)

    assert (settled.runs, settled.report) == (0, Enqueue(f"{evaluation}.report", 1))
    assert (await settle(ledger, plan, outcome)).verdict == "already"
    assert await rows.executions(database, evaluation) == {"plan": outcome, "report": "pending"}
    assert (await rows.evaluation(database, evaluation)).remaining == 0
    await report(ledger, evaluation, End("failed", error=FAULT))
    assert (await rows.evaluation(database, evaluation)).state == "failed"


@pytest.mark.parametrize("outcome", ["failed", "interrupted"])
async def test_a_plan_that_is_tried_again_does_not_report_yet(
    ledger: Ledger, database: Database, outcome: Outcome
) -> None:
    evaluation = await submitted(ledger)
    first = await settle(ledger, await claim(ledger, f"{evaluation}.plan"), outcome, max_failures=2)

    assert (first.state, first.report) == ("pending", None)
    assert (await rows.evaluation(database, evaluation)).remaining == 1
    second = await settle(ledger, await claim(ledger, f"{evaluation}.plan"), runs=samples_of(2))
    assert (second.runs, second.report) == (2, None)
    assert (await rows.evaluation(database, evaluation)).remaining == 2


async def test_a_plan_that_was_taken_over_fans_out_once(ledger: Ledger, database: Database) -> None:
    evaluation = await submitted(ledger)
    first = await claim(ledger, f"{evaluation}.plan")
    await let_expire(database, f"{evaluation}.plan")
    second = await claim(ledger, f"{evaluation}.plan")

    settled = await asyncio.gather(*(settle(ledger, c, runs=samples_of(3)) for c in [first, second] * 10))

    assert [s.verdict for s in settled].count("recorded") == 1
    assert {s.verdict for s in settled[::2]} == {"stale"}
    assert sum(s.runs for s in settled) == 3
    assert (await rows.evaluation(database, evaluation)).remaining == 3


async def test_a_plan_cancelled_before_it_was_claimed_reports(ledger: Ledger, database: Database) -> None:
    evaluation = await submitted(ledger)
    cancelled = await ledger.cancel(evaluation)

    assert cancelled is not None
    assert (cancelled.executions, cancelled.report) == (1, Enqueue(f"{evaluation}.report", 1))
    assert await rows.executions(database, evaluation) == {"plan": "cancelled", "report": "pending"}
    await report(ledger, evaluation)
    assert (await rows.evaluation(database, evaluation)).state == "cancelled"


async def test_a_plan_cancelled_while_it_runs_fans_out_to_nothing_and_reports(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    cancelled = await ledger.cancel(evaluation)
    assert cancelled is not None
    assert (cancelled.executions, cancelled.report) == (0, None), "what runs is not ended from outside"

    settled = await settle(ledger, plan, runs=samples_of(3))
    assert (settled.runs, settled.report) == (0, Enqueue(f"{evaluation}.report", 1))
    assert (await rows.evaluation(database, evaluation)).remaining == 0


async def test_a_fan_out_that_waits_for_a_cancellation_sees_it(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    async with uncommitted(engine) as user:
        await user.cancel(evaluation)
        waiting = asyncio.create_task(settle(ledger, plan, runs=samples_of(3)))
        await until_blocked(database)
    settled = await waiting
    assert (settled.runs, settled.report) == (0, Enqueue(f"{evaluation}.report", 1))


async def test_a_cancellation_that_waits_for_a_fan_out_reaches_its_runs_by_their_claims(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    async with uncommitted(engine) as other:
        await settle(other, plan, runs=samples_of(2))
        waiting = asyncio.create_task(ledger.cancel(evaluation))
        await until_blocked(database)
    cancelled = await waiting
    assert cancelled is not None
    assert cancelled.executions == 0

    runs = [await claim(ledger, f"{evaluation}.{n}") for n in (1, 2)]
    assert all(run.cancel for run in runs)
    reports = [(await settle(ledger, run, "cancelled")).report for run in runs]
    assert reports == [None, Enqueue(f"{evaluation}.report", 1)]


async def test_plans_racing_their_cancellation_always_come_to_one_report(ledger: Ledger, database: Database) -> None:
    for _ in range(20):
        evaluation = await submitted(ledger)
        plan = await claim(ledger, f"{evaluation}.plan")
        cancelling = [asyncio.create_task(ledger.cancel(evaluation)) for _ in range(3)]
        settled = await settle(ledger, plan, runs=samples_of(3))
        ends = [settled.report, *(c.report for c in await asyncio.gather(*cancelling) if c)]
        for n in range(1, settled.runs + 1):
            late = await push(ledger, f"{evaluation}.{n}")
            if late.granted:
                assert late.cancel
                ends.append((await settle(ledger, late, "cancelled")).report)
        assert [e for e in ends if e] == [Enqueue(f"{evaluation}.report", 1)]
        assert (await rows.evaluation(database, evaluation)).remaining == 0

"""Cancelling: what waits ends at once, what runs learns of it, and the evaluation still gets its report."""

import asyncio
from collections.abc import Sequence
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Cancelled, Enqueue, Held, Ledger, Outcome, Settled
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import (
    claim,
    ended,
    lost_reply,
    planned,
    push,
    report,
    run_out,
    scored,
    settle,
    submitted,
    watched,
)
from tests.ledger.transactions import uncommitted


async def cancel(ledger: Ledger, evaluation: UUID) -> Cancelled:
    cancelled = await ledger.cancel(evaluation)
    assert cancelled is not None
    return cancelled


async def test_an_evaluation_that_does_not_exist_cannot_be_cancelled(ledger: Ledger) -> None:
    assert await ledger.cancel(uuid4()) is None


async def test_what_is_pending_ends_at_once_and_what_runs_learns_of_it_by_renewal(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger, 3)
    running = await claim(ledger, f"{evaluation}.2")
    cancelled = await cancel(ledger, evaluation)

    assert (cancelled.state, cancelled.executions, cancelled.report) == ("running", 2, None)
    states = await rows.executions(database, evaluation)
    assert states == {"plan": "succeeded", "1": "cancelled", "2": "running", "3": "cancelled"}
    assert (await rows.evaluation(database, evaluation)).remaining == 1
    (renewal,) = await ledger.renew([Held(running.execution_id, 1)])
    assert (renewal.lost, renewal.cancel) == (False, True)


async def test_the_last_running_execution_of_a_cancelled_evaluation_brings_the_report(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger, 3)
    running = await claim(ledger, f"{evaluation}.2")
    await cancel(ledger, evaluation)
    settled = await settle(ledger, running, "cancelled", samples=[scored(2)])
    assert (settled.state, settled.report) == ("cancelled", Enqueue(f"{evaluation}.report", 1))

    await report(ledger, evaluation)
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.results) == ("cancelled", {"accuracy": 1}), "what was scored is still worth reporting"


async def test_cancelling_the_last_pending_execution_brings_the_report(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 2)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))
    cancelled = await cancel(ledger, evaluation)
    assert (cancelled.executions, cancelled.report) == (1, Enqueue(f"{evaluation}.report", 1))
    assert (await rows.evaluation(database, evaluation)).remaining == 0


async def test_cancelling_twice_is_the_same_as_once(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 2)
    await cancel(ledger, evaluation)
    asked = (await rows.evaluation(database, evaluation)).cancel_requested_at

    again = await cancel(ledger, evaluation)
    assert (again.state, again.executions, again.report) == ("running", 0, None)
    assert (await rows.evaluation(database, evaluation)).cancel_requested_at == asked
    assert await rows.reports(database, evaluation) == 1


async def test_fifty_cancellations_at_once_count_each_execution_once(ledger: Ledger, database: Database) -> None:
    for _ in range(4):
        evaluation = await planned(ledger, 20)
        cancelled = await asyncio.gather(*(cancel(ledger, evaluation) for _ in range(CROWD)))
        assert sum(c.executions for c in cancelled) == 20
        assert [c.report for c in cancelled if c.report] == [Enqueue(f"{evaluation}.report", 1)]
        assert (await rows.evaluation(database, evaluation)).remaining == 0


async def test_a_cancellation_whose_reply_was_lost_is_the_same_as_one(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await planned(ledger, 3)
    with lost_reply(engine) as lost:
        await cancel(ledger, evaluation)

    assert len(lost) == 1
    assert (await rows.evaluation(database, evaluation)).remaining == 0
    assert await rows.reports(database, evaluation) == 1


@pytest.mark.parametrize("outcomes", [("succeeded",), ("failed", "succeeded")])
async def test_an_evaluation_that_is_over_stays_as_it_ended(
    ledger: Ledger, database: Database, outcomes: Sequence[Outcome]
) -> None:
    evaluation = await ended(ledger, *outcomes)
    before = await rows.everything(database)
    cancelled = await cancel(ledger, evaluation)
    assert (cancelled.state, cancelled.executions, cancelled.report) == ("succeeded", 0, None)
    assert await rows.everything(database) == before


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_report_goes_on_when_it_is_cancelled_and_the_evaluation_ends_as_cancelled(
    ledger: Ledger, database: Database, claimed: bool
) -> None:
    evaluation = await planned(ledger)
    await run_out(ledger, evaluation, "succeeded")
    under_way = await claim(ledger, f"{evaluation}.report") if claimed else None
    cancelled = await cancel(ledger, evaluation)
    assert (cancelled.state, cancelled.executions, cancelled.report) == ("running", 0, None)

    await settle(ledger, under_way or await claim(ledger, f"{evaluation}.report"))
    assert (await rows.evaluation(database, evaluation)).state == "cancelled"
    assert await rows.reports(database, evaluation) == 1


async def test_a_released_execution_of_a_cancelled_evaluation_is_claimed_to_be_ended(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger)
    run = await claim(ledger, f"{evaluation}.1")
    await cancel(ledger, evaluation)
    assert (await settle(ledger, run, "interrupted")).state == "pending"

    last = await claim(ledger, f"{evaluation}.1")
    assert last.cancel
    assert (await settle(ledger, last, "cancelled")).report == Enqueue(f"{evaluation}.report", 1)


async def test_a_cancellation_does_not_wait_for_an_execution_that_is_locked(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await planned(ledger, 2)
    async with uncommitted(engine) as other:
        await claim(other, f"{evaluation}.1")
        async with asyncio.timeout(5):
            assert (await cancel(ledger, evaluation)).executions == 1
    (renewal,) = await ledger.renew([Held(f"{evaluation}.1", 1)])
    assert renewal.cancel, "what it skipped learns of it all the same"


async def test_cancellations_racing_claims_and_settles_come_to_one_report(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    async def run(evaluation: UUID, n: int, turns: int) -> Settled | None:
        for _ in range(turns):
            await asyncio.sleep(0)
        pushed = await push(ledger, f"{evaluation}.{n}")
        if not pushed.granted:
            assert (pushed.verdict, pushed.state) == ("over", "cancelled")
            return None
        return await settle(ledger, pushed, "cancelled" if pushed.cancel else "succeeded", samples=[scored(n)])

    with watched(engine) as errors:
        for turn in range(15):
            evaluation = await planned(ledger, 40)
            runs = [asyncio.create_task(run(evaluation, n, 4 * n)) for n in range(1, 41)]
            for _ in range(turn):
                await asyncio.sleep(0.002)
            cancelled = await asyncio.gather(*(cancel(ledger, evaluation) for _ in range(3)))
            settled = [s for s in await asyncio.gather(*runs) if s]

            made = [c.report for c in cancelled] + [s.report for s in settled]
            assert [r for r in made if r] == [Enqueue(f"{evaluation}.report", 1)]
            assert len(settled) + sum(c.executions for c in cancelled) == 40
            assert (await rows.evaluation(database, evaluation)).remaining == 0
            assert await rows.reports(database, evaluation) == 1
    assert errors == []


async def test_a_pending_plan_racing_its_cancellation_is_ended_by_one_of_the_two(
    ledger: Ledger, database: Database
) -> None:
    for _ in range(15):
        evaluation = await submitted(ledger)
        cancelling = asyncio.create_task(cancel(ledger, evaluation))
        plan = await push(ledger, f"{evaluation}.plan")
        made = [(await cancelling).report]
        if plan.granted:
            made.append((await settle(ledger, plan, "cancelled" if plan.cancel else "succeeded")).report)
        assert [r for r in made if r] == [Enqueue(f"{evaluation}.report", 1)]
        assert (await rows.evaluation(database, evaluation)).remaining == 0

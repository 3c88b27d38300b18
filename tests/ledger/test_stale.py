"""The fence: whoever was superseded is told so, and changes nothing."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Claim, Held, Ledger, Outcome, Renewal, Settlement
from tests.ledger import rows
from tests.ledger.factories import (
    FAULT,
    SUCCEEDED,
    claim,
    let_expire,
    planned,
    push,
    report,
    samples_of,
    scored,
    settle,
    submitted,
)
from tests.ledger.transactions import uncommitted, until_blocked

Then = Callable[[Ledger, Claim], Awaitable[object]]


async def goes_on(ledger: Ledger, later: Claim) -> None:
    """The later attempt still runs."""


def settles(outcome: Outcome) -> Then:
    return lambda ledger, later: settle(ledger, later, outcome)


async def superseded(ledger: Ledger, database: Database, then: Then) -> Claim:
    """An attempt whose lease ran out, and what became of the one that took over."""
    stale = await claim(ledger, f"{await planned(ledger, 2)}.1")
    await let_expire(database, stale.execution_id)
    await then(ledger, await claim(ledger, stale.execution_id))
    return stale


ENDS = pytest.mark.parametrize(
    "then", [goes_on, settles("succeeded"), settles("failed"), settles("cancelled"), settles("interrupted")]
)


@ENDS
async def test_a_stale_attempt_cannot_settle(ledger: Ledger, database: Database, then: Then) -> None:
    stale = await superseded(ledger, database, then)
    before = await rows.everything(database)
    outcomes: tuple[Outcome, ...] = ("succeeded", "failed", "cancelled", "interrupted")
    for outcome in outcomes:
        settled = await settle(ledger, stale, outcome, samples=[scored(1)], error=FAULT, versions={"a": "1"})
        assert (settled.verdict, settled.runs, settled.report) == ("stale", 0, None)
    assert await rows.everything(database) == before


@ENDS
async def test_a_stale_attempt_cannot_record(ledger: Ledger, database: Database, then: Then) -> None:
    stale = await superseded(ledger, database, then)
    before = await rows.everything(database)
    assert await ledger.record(stale.execution_id, stale.attempt, [scored(1)]) is False
    assert await rows.everything(database) == before


@ENDS
async def test_a_stale_attempt_cannot_renew(ledger: Ledger, database: Database, then: Then) -> None:
    stale = await superseded(ledger, database, then)
    before = await rows.everything(database)
    held = [Held(stale.execution_id, stale.attempt, {"tokens": 1})]
    assert await ledger.renew(held) == [Renewal(stale.execution_id, stale.attempt, lost=True, cancel=False)]
    assert await rows.everything(database) == before


async def test_a_stale_plan_cannot_fan_out(ledger: Ledger, database: Database) -> None:
    stale = await claim(ledger, f"{await submitted(ledger)}.plan")
    await let_expire(database, stale.execution_id)
    await claim(ledger, stale.execution_id)
    before = await rows.everything(database)
    settled = await settle(ledger, stale, runs=samples_of(3))
    assert (settled.verdict, settled.state, settled.runs) == ("stale", "running", 0)
    assert await rows.everything(database) == before


async def test_a_stale_report_cannot_end_the_evaluation(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 1)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))
    stale = await claim(ledger, f"{evaluation}.report")
    await let_expire(database, stale.execution_id)
    await claim(ledger, stale.execution_id)
    before = await rows.everything(database)
    assert (await settle(ledger, stale, end=SUCCEEDED)).verdict == "stale"
    assert await rows.everything(database) == before


async def test_a_report_from_before_a_retry_cannot_end_the_evaluation_again(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 1)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), "failed")
    old = await claim(ledger, f"{evaluation}.report")
    await settle(ledger, old, end=SUCCEEDED)
    await ledger.retry(evaluation)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))

    before = await rows.everything(database)
    assert (await settle(ledger, old, end=SUCCEEDED)).verdict == "already"
    assert await rows.everything(database) == before
    await report(ledger, evaluation)
    assert (await settle(ledger, old, end=SUCCEEDED)).verdict == "stale"


async def test_an_attempt_that_ended_cannot_record_or_renew_any_more(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    await settle(ledger, run, "interrupted")
    before = await rows.everything(database)
    assert await ledger.record(run.execution_id, run.attempt, [scored(1)]) is False
    (renewal,) = await ledger.renew([Held(run.execution_id, run.attempt)])
    assert renewal.lost
    assert await rows.everything(database) == before


async def test_an_attempt_that_was_never_made_is_stale(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    before = await rows.everything(database)
    settled = await ledger.settle(run.execution_id, run.attempt + 1, Settlement("succeeded"))
    assert settled is not None
    assert settled.verdict == "stale"
    assert await rows.everything(database) == before


async def test_an_expired_lease_that_nobody_took_is_still_the_attempts_own(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    await let_expire(database, run.execution_id)
    assert await ledger.record(run.execution_id, run.attempt, [scored(1)])
    assert (await ledger.renew([Held(run.execution_id, run.attempt)]))[0].lost is False
    assert (await push(ledger, run.execution_id)).verdict == "held", "the renewal gave it back"
    await let_expire(database, run.execution_id)
    assert (await settle(ledger, run)).verdict == "recorded"


async def test_a_record_that_waits_for_a_take_over_is_refused(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    await let_expire(database, run.execution_id)
    async with uncommitted(engine) as other:
        await claim(other, run.execution_id)
        waiting = asyncio.create_task(ledger.record(run.execution_id, run.attempt, [scored(1)]))
        await until_blocked(database)
    assert await waiting is False
    assert await rows.results(database, run.evaluation_id) == []


async def test_a_settle_that_waits_for_a_take_over_is_stale(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    await let_expire(database, run.execution_id)
    async with uncommitted(engine) as other:
        await claim(other, run.execution_id)
        waiting = asyncio.create_task(settle(ledger, run, samples=[scored(1)]))
        await until_blocked(database)
    assert (await waiting).verdict == "stale"
    assert await rows.results(database, run.evaluation_id) == []
    assert (await rows.evaluation(database, run.evaluation_id)).remaining == 1


async def test_a_renewal_that_waits_for_a_take_over_is_lost(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    await let_expire(database, run.execution_id)
    async with uncommitted(engine) as other:
        await claim(other, run.execution_id)
        waiting = asyncio.create_task(ledger.renew([Held(run.execution_id, run.attempt, {"tokens": 1})]))
        await until_blocked(database)
    assert [r.lost for r in await waiting] == [True]
    row = await rows.execution(database, run.execution_id)
    assert (row.worker, row.progress) == ("worker-2", None)


async def test_a_take_over_waits_for_a_record_and_then_finds_its_sample(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    """Which is why what is scored is asked after the claim, by a statement of its own."""
    run = await claim(ledger, f"{await planned(ledger, 1)}.1")
    await let_expire(database, run.execution_id)
    async with uncommitted(engine) as holder:
        assert await holder.record(run.execution_id, run.attempt, [scored(1)])
        waiting = asyncio.create_task(claim(ledger, run.execution_id))
        await until_blocked(database)
    assert await ledger.scored(await waiting) == {("1", 1)}

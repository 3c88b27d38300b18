"""The sweep: whatever is due gets a Cloud Task, each under a number of its own, and nobody else the same one."""

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Enqueue, Held, Ledger, Outcome
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import (
    claim,
    let_expire,
    lost_reply,
    make_due,
    planned,
    settle,
    submitted,
    watched,
)
from tests.ledger.transactions import uncommitted

MINUTE = 60
DAY = 24 * 60 * MINUTE


async def test_fifty_sweepers_at_once_never_take_the_same_execution(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await planned(ledger, 300)
    with watched(engine) as errors:
        taken = await asyncio.gather(*(ledger.take_due(10) for _ in range(CROWD)))
        left = await ledger.take_due(300)

    all_taken = sorted([t.execution_id for some in taken for t in some] + [t.execution_id for t in left])
    assert all_taken == sorted(f"{evaluation}.{n}" for n in range(1, 301))
    assert {t.number for some in taken for t in some} == {1}
    assert max(len(some) for some in taken) == 10
    assert errors == []


async def test_a_sweeper_passes_over_what_another_holds(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    await planned(ledger, 3)
    async with uncommitted(engine) as other:
        (first,) = await other.take_due(1)
        async with asyncio.timeout(5):
            rest = await ledger.take_due(10)
    assert len(rest) == 2
    assert first not in rest


async def test_what_is_taken_is_due_again_in_two_minutes_under_a_higher_number(
    ledger: Ledger, database: Database
) -> None:
    run = f"{await planned(ledger)}.1"
    for number in (1, 2, 3):
        await make_due(database, run)
        assert await ledger.take_due(10) == [Enqueue(run, number)]
        assert 110 < await rows.seconds_until(database, run, "sweep_at") <= 2 * MINUTE
        assert await ledger.take_due(10) == []


async def test_a_sweep_whose_reply_was_lost_is_made_up_for_two_minutes_later(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = f"{await planned(ledger)}.1"
    with lost_reply(engine) as lost:
        assert await ledger.take_due(10) == [], "nobody knows of number 1"
    assert len(lost) == 1
    await make_due(database, run)
    assert await ledger.take_due(10) == [Enqueue(run, 2)]


async def test_the_longest_due_goes_first(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 3)
    for n in (2, 3, 1):
        await make_due(database, f"{evaluation}.{n}")
    taken = [(await ledger.take_due(1))[0].execution_id for _ in range(3)]
    assert taken == [f"{evaluation}.{n}" for n in (2, 3, 1)]


async def test_an_enqueued_execution_is_left_alone_for_a_day(ledger: Ledger, database: Database) -> None:
    run = f"{await planned(ledger)}.1"
    tasks = await ledger.take_due(10)
    await ledger.enqueued(tasks)
    assert DAY - 10 < await rows.seconds_until(database, run, "sweep_at") <= DAY
    await ledger.enqueued(tasks)
    assert (await rows.execution(database, run)).enqueues == 1


async def test_nothing_enqueued_is_nothing_written(ledger: Ledger, database: Database) -> None:
    await planned(ledger)
    before = await rows.everything(database)
    await ledger.enqueued([])
    assert await rows.everything(database) == before


async def test_only_the_newest_number_counts_as_enqueued(ledger: Ledger, database: Database) -> None:
    """The Cloud Task of an older number may have been purged; the newer one is not made yet."""
    run = f"{await planned(ledger)}.1"
    first = await ledger.take_due(10)
    await make_due(database, run)
    second = await ledger.take_due(10)
    before = await rows.everything(database)

    await ledger.enqueued(first)
    assert await rows.everything(database) == before
    await ledger.enqueued([*first, *second])
    assert await rows.seconds_until(database, run, "sweep_at") > DAY - 10


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled", None])
async def test_enqueued_moves_nothing_that_is_not_pending_any_more(
    ledger: Ledger, database: Database, outcome: Outcome | None
) -> None:
    """The push may come before the creation of its Cloud Task is noted."""
    run = f"{await planned(ledger)}.1"
    tasks = await ledger.take_due(10)
    claimed = await claim(ledger, run)
    if outcome:
        await settle(ledger, claimed, outcome)
    before = await rows.everything(database)
    await ledger.enqueued(tasks)
    assert await rows.everything(database) == before


async def test_a_claimed_execution_is_due_two_minutes_after_its_lease(ledger: Ledger, database: Database) -> None:
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    assert await ledger.take_due(10) == []
    claimed = await rows.execution(database, run)
    assert 2 * MINUTE - 1 < (claimed.sweep_at - claimed.lease_expires_at).total_seconds() < 2 * MINUTE + 1

    await let_expire(database, run)
    assert await ledger.take_due(10) == [], "the push's own retry comes first"
    await make_due(database, run)
    assert await ledger.take_due(10) == [Enqueue(run, 1)]
    assert (await claim(ledger, run)).verdict == "taken over"


async def test_a_renewal_puts_the_sweep_off(ledger: Ledger, database: Database) -> None:
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    await make_due(database, run)
    await ledger.renew([Held(run, 1)])
    assert await ledger.take_due(10) == []


async def test_what_is_over_is_never_due(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 3)
    outcomes: tuple[Outcome, ...] = ("succeeded", "failed", "cancelled")
    for n, outcome in enumerate(outcomes, 1):
        await settle(ledger, await claim(ledger, f"{evaluation}.{n}"), outcome)
    assert await ledger.take_due(10) == [], "the report is left to the settle that brought it"
    await make_due(database, f"{evaluation}.report")
    assert await ledger.take_due(10) == [Enqueue(f"{evaluation}.report", 2)]


async def test_a_submission_that_was_never_enqueued_is_due_after_two_minutes(
    ledger: Ledger, database: Database
) -> None:
    plan = f"{await submitted(ledger)}.plan"
    assert await ledger.take_due(10) == []
    await make_due(database, plan)
    assert await ledger.take_due(10) == [Enqueue(plan, 2)]


async def test_after_the_queue_was_lost_whatever_is_not_over_is_due(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 4)
    await ledger.enqueued(await ledger.take_due(10))
    await claim(ledger, f"{evaluation}.1")
    await settle(ledger, await claim(ledger, f"{evaluation}.2"))
    assert await ledger.take_due(10) == []

    await ledger.all_due()
    assert sorted(t.execution_id for t in await ledger.take_due(10)) == [f"{evaluation}.{n}" for n in (1, 3, 4)]
    assert await ledger.unfinished(evaluation) == [f"{evaluation}.{n}" for n in (1, 3, 4)]

"""Claiming: one attempt at a time, and whoever does not get it is told why."""

import asyncio
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Held, Ledger, Outcome, Settlement
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import (
    claim,
    errored,
    let_expire,
    lost_reply,
    planned,
    push,
    samples_of,
    scored,
    settle,
    submitted,
)
from tests.ledger.transactions import uncommitted, until_blocked


async def test_a_claim_brings_all_that_the_work_needs(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 2, samples=3)
    pushed = await ledger.claim(f"{evaluation}.2", uuid4(), {"X-CloudTasks-TaskName": "a-2-1"})

    assert pushed is not None
    assert (pushed.verdict, pushed.kind, pushed.attempt, pushed.evaluation_id) == ("claimed", "run", 1, evaluation)
    assert pushed.samples == tuple(samples_of(2, 3)[1])
    assert not pushed.cancel
    (attempt,) = await rows.attempts(database, f"{evaluation}.2")
    assert (attempt.worker, attempt.revision) == ("worker-1", "revision-1")
    assert attempt.push == {"X-CloudTasks-TaskName": "a-2-1"}


async def test_an_execution_that_does_not_exist_is_no_claim(ledger: Ledger) -> None:
    assert await ledger.claim(f"{uuid4()}.plan", uuid4()) is None


async def test_of_fifty_claims_one_wins_and_all_others_are_told_the_holder(ledger: Ledger, database: Database) -> None:
    for _ in range(5):
        run = f"{await planned(ledger)}.1"
        claims = await asyncio.gather(*(push(ledger, run) for _ in range(CROWD)))

        won = [c for c in claims if c.granted]
        lost = [c for c in claims if not c.granted]
        assert [(c.verdict, c.attempt) for c in won] == [("claimed", 1)]
        assert {(c.verdict, c.state, c.holder, c.attempt) for c in lost} == {("held", "running", "worker-1", 1)}
        assert all(c.lease_left is not None and 0 < c.lease_left <= 120 for c in lost)
        assert await rows.history(database, run) == [(1, None)]


async def test_one_claim_sent_fifty_times_is_one_attempt(ledger: Ledger, database: Database) -> None:
    for _ in range(5):
        run, claim_id = f"{await planned(ledger)}.1", uuid4()
        claims = await asyncio.gather(*(push(ledger, run, claim_id) for _ in range(CROWD)))

        assert sorted(c.verdict for c in claims) == ["claimed"] + ["yours"] * (CROWD - 1)
        assert {c.attempt for c in claims} == {1}
        assert await rows.history(database, run) == [(1, None)]


async def test_ten_pushes_that_each_send_their_claim_five_times_agree_on_one_winner(ledger: Ledger) -> None:
    for _ in range(5):
        run, pushes = f"{await planned(ledger)}.1", [uuid4() for _ in range(10)]
        claims = await asyncio.gather(*(push(ledger, run, claim_id) for claim_id in pushes * 5))

        granted = [{c.granted for c in claims[n::10]} for n in range(10)]
        assert granted.count({True}) == 1
        assert granted.count({False}) == 9
        assert {c.attempt for c in claims} == {1}


async def test_of_fifty_claims_after_the_lease_one_takes_over(ledger: Ledger, database: Database) -> None:
    for _ in range(5):
        run = f"{await planned(ledger)}.1"
        await claim(ledger, run)
        await let_expire(database, run)
        claims = await asyncio.gather(*(push(ledger, run) for _ in range(CROWD)))

        (won,) = [c for c in claims if c.granted]
        assert (won.verdict, won.attempt, won.crashes, won.failures) == ("taken over", 2, 1, 0)
        assert {(c.verdict, c.attempt) for c in claims if not c.granted} == {("held", 2)}
        assert await rows.history(database, run) == [(1, "interrupted"), (2, None)]


async def test_a_lease_really_ends_by_itself(database: Database) -> None:
    hasty = Ledger(database, lease=0.05, worker="worker-2")
    run = f"{await planned(hasty)}.1"
    await claim(hasty, run)
    await asyncio.sleep(0.06)
    assert (await push(hasty, run)).verdict == "taken over"


async def test_a_lease_that_ended_stays_with_the_push_that_asks_again(ledger: Ledger, database: Database) -> None:
    run, claim_id = f"{await planned(ledger)}.1", uuid4()
    await push(ledger, run, claim_id)
    await let_expire(database, run)

    again = await push(ledger, run, claim_id)
    assert (again.verdict, again.attempt, again.crashes) == ("yours", 1, 0)


async def test_a_claim_whose_reply_was_lost_is_still_its_own(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = f"{await planned(ledger)}.1"
    with lost_reply(engine) as lost:
        claimed = await claim(ledger, run)

    assert len(lost) == 1
    assert (claimed.verdict, claimed.attempt) == ("yours", 1)
    assert await rows.history(database, run) == [(1, None)]


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled"])
async def test_what_is_over_cannot_be_claimed_and_says_how_it_ended(
    ledger: Ledger, database: Database, outcome: Outcome
) -> None:
    run = f"{await planned(ledger)}.1"
    await settle(ledger, await claim(ledger, run), outcome)
    before = await rows.everything(database)

    late = await push(ledger, run)

    assert (late.verdict, late.state, late.granted) == ("over", outcome, False)
    assert await rows.everything(database) == before


async def test_a_refused_claim_writes_nothing(ledger: Ledger, database: Database) -> None:
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    before = await rows.everything(database)
    assert (await push(ledger, run)).verdict == "held"
    assert await rows.everything(database) == before


async def test_a_take_over_closes_the_dead_attempt_with_its_last_progress_as_usage(
    ledger: Ledger, database: Database
) -> None:
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    await ledger.renew([Held(run, 1, {"tokens": 100})])
    await ledger.renew([Held(run, 1, {"tokens": 4711})])
    await let_expire(database, run)
    await claim(ledger, run)

    dead, alive = await rows.attempts(database, run)
    assert (dead.outcome, dead.usage) == ("interrupted", {"tokens": 4711})
    assert dead.error["error_class"] == "infrastructure"
    assert "worker-1" in dead.error["message"]
    assert (alive.outcome, alive.usage) == (None, None)
    assert (await rows.execution(database, run)).progress is None, "progress is the attempt's, not the execution's"


async def test_crashes_count_take_overs_and_a_recorded_sample_resets_them(ledger: Ledger, database: Database) -> None:
    run = f"{await planned(ledger, samples=2)}.1"
    seen = []
    for _ in range(4):
        seen.append((await claim(ledger, run)).crashes)
        await let_expire(database, run)
    assert seen == [0, 1, 2, 3]

    attempt = (await claim(ledger, run)).attempt
    assert await ledger.record(run, attempt, [scored(1)])
    assert (await rows.execution(database, run)).crashes == 0
    await let_expire(database, run)
    assert (await claim(ledger, run)).crashes == 1
    assert (await rows.execution(database, run)).failures == 0, "a lost worker is not charged"


async def test_the_same_error_again_is_no_progress_and_its_score_is(ledger: Ledger, database: Database) -> None:
    """Else a sample that fails beside one that takes its process with it would keep both going for ever."""
    run = f"{await planned(ledger, samples=2)}.1"
    crashes = []
    for ended in ([errored(1)], [errored(1)], [errored(1)], [scored(1)]):
        granted = await claim(ledger, run)
        assert await ledger.record(run, granted.attempt, ended)
        crashes.append((await rows.execution(database, run)).crashes)
        await let_expire(database, run)
    assert crashes == [0, 1, 2, 0]


async def test_the_same_error_again_in_the_end_of_an_attempt_is_no_progress_either(
    ledger: Ledger, database: Database
) -> None:
    run = f"{await planned(ledger, samples=2)}.1"
    crashes = []
    for _ in range(3):
        granted = await claim(ledger, run)
        await settle(ledger, granted, "interrupted", crashed=True, samples=[errored(1)])
        crashes.append((await rows.execution(database, run)).crashes)
    assert crashes == [1, 2, 3]


async def test_a_claim_that_waits_for_a_release_is_granted(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    """Decided on the table instead of the locked row, it would be refused although nobody holds it."""
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    async with uncommitted(engine) as holder:
        await holder.settle(run, 1, Settlement("interrupted"))
        waiting = asyncio.create_task(push(ledger, run))
        await until_blocked(database)
    assert ((await waiting).verdict, (await waiting).attempt) == ("claimed", 2)


async def test_a_claim_that_waits_for_another_is_told_its_holder(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = f"{await planned(ledger)}.1"
    async with uncommitted(engine, worker="worker-2") as other:
        await claim(other, run)
        waiting = asyncio.create_task(push(ledger, run))
        await until_blocked(database)
    refused = await waiting
    assert (refused.verdict, refused.holder, refused.attempt) == ("held", "worker-2", 1)


async def test_a_take_over_that_waits_for_a_renewal_is_refused(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    await let_expire(database, run)
    async with uncommitted(engine) as holder:
        await holder.renew([Held(run, 1)])
        waiting = asyncio.create_task(push(ledger, run))
        await until_blocked(database)
    assert (await waiting).verdict == "held"
    assert await rows.history(database, run) == [(1, None)]


async def test_a_cancelled_evaluations_execution_is_claimed_with_that_word(ledger: Ledger) -> None:
    """What ends it is the settle that follows, so that the count of what remains has one way only."""
    evaluation = await submitted(ledger)
    await claim(ledger, f"{evaluation}.plan")
    await ledger.cancel(evaluation)
    await ledger.settle(f"{evaluation}.plan", 1, Settlement("interrupted"))

    again = await push(ledger, f"{evaluation}.plan")
    assert (again.granted, again.cancel) == (True, True)

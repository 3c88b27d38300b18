"""Renewing: one statement for all that a worker holds, which says what is lost and what is to be cancelled."""

import asyncio

from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Held, Ledger, Renewal
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import claim, let_expire, lost_reply, planned, push, settle, watched


async def test_a_renewal_keeps_others_out_and_writes_the_progress(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await let_expire(database, run.execution_id)
    assert await ledger.renew([Held(run.execution_id, 1, {"tokens": 5})]) == [
        Renewal(run.execution_id, 1, lost=False, cancel=False)
    ]

    assert (await push(ledger, run.execution_id)).verdict == "held"
    assert 110 < await rows.seconds_until(database, run.execution_id, "lease_expires_at") <= 120
    assert 230 < await rows.seconds_until(database, run.execution_id, "sweep_at") <= 240
    assert (await rows.execution(database, run.execution_id)).progress == {"tokens": 5}


async def test_a_renewal_without_progress_leaves_the_last_one(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await ledger.renew([Held(run.execution_id, 1, {"tokens": 5})])
    await ledger.renew([Held(run.execution_id, 1)])
    assert (await rows.execution(database, run.execution_id)).progress == {"tokens": 5}


async def test_nothing_held_is_nothing_renewed(ledger: Ledger) -> None:
    assert await ledger.renew([]) == []


async def test_each_of_a_workers_leases_is_answered_for_itself(ledger: Ledger, database: Database) -> None:
    kept, cancelled = await planned(ledger, 3), await planned(ledger)
    for execution in (f"{kept}.1", f"{kept}.2", f"{kept}.3", f"{cancelled}.1"):
        await claim(ledger, execution)
    await let_expire(database, f"{kept}.2")
    await claim(ledger, f"{kept}.2")
    await settle(ledger, (await push(ledger, f"{kept}.3")), "interrupted")
    await ledger.cancel(cancelled)

    held = [Held(f"{kept}.1", 1), Held(f"{kept}.2", 1), Held(f"{kept}.3", 1), Held(f"{cancelled}.1", 1)]
    answers = {r.execution_id: (r.lost, r.cancel) for r in await ledger.renew([*held, Held(f"{kept}.99", 1)])}
    assert answers == {
        f"{kept}.1": (False, False),
        f"{kept}.2": (True, False),
        f"{kept}.3": (True, False),
        f"{kept}.99": (True, False),
        f"{cancelled}.1": (False, True),
    }


async def test_a_worker_that_took_over_from_itself_loses_only_its_old_attempt(
    ledger: Ledger, database: Database
) -> None:
    """Cut off from the database, it got the same execution again before it knew that the first lease was gone."""
    run = f"{await planned(ledger)}.1"
    await claim(ledger, run)
    await let_expire(database, run)
    await claim(ledger, run)

    renewals = await ledger.renew([Held(run, 1, {"tokens": 1}), Held(run, 2, {"tokens": 2})])
    assert {r.attempt: r.lost for r in renewals} == {1: True, 2: False}
    assert (await rows.execution(database, run)).progress == {"tokens": 2}


async def test_a_renewal_whose_reply_was_lost_is_the_same_as_one(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    with lost_reply(engine) as lost:
        renewals = await ledger.renew([Held(run.execution_id, 1, {"tokens": 5})], patience=5)

    assert len(lost) == 1
    assert renewals == [Renewal(run.execution_id, 1, lost=False, cancel=False)]
    assert await rows.history(database, run.execution_id) == [(1, None)]


async def test_fifty_renewals_of_the_same_leases_in_opposite_orders_never_wait_in_a_circle(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await planned(ledger, 20)
    held = [Held(f"{evaluation}.{n}", 1) for n in range(1, 21)]
    await asyncio.gather(*(claim(ledger, h.execution_id) for h in held))
    turns = [(held[n % 20 :] + held[: n % 20])[:: -1 if n % 2 else 1] for n in range(CROWD)]
    with watched(engine) as errors:
        for _ in range(4):
            answers = await asyncio.gather(*(ledger.renew(turn) for turn in turns))
            assert {(r.lost, r.cancel) for renewals in answers for r in renewals} == {(False, False)}
    assert errors == []

"""A worker's leases: renewed while held, and whoever loses one learns of it."""

import asyncio
from uuid import uuid4

import pytest
from sqlalchemy import event, text

from app.database.session import Database
from app.errors import DatabaseUnavailable
from app.leases import Leases
from app.ledger import Claim, Ledger, Settlement
from app.settings import Settings
from app.spec import Spec

SOON = 30
"""Seconds within which a renewal every few hundredths must have come."""


@pytest.fixture
def quick(settings: Settings) -> Settings:
    return settings.model_copy(update={"renew_interval": 0.05, "renew_patience": 0.2})


async def claimed(ledger: Ledger) -> Claim:
    submitted = await ledger.submit(Spec(task="t", model="m"), "me")
    claim = await ledger.claim(f"{submitted.evaluation_id}.plan", uuid4())
    assert claim
    return claim


async def renewals(database: Database) -> "asyncio.Queue[None]":
    """An item for each renewal that is sent."""
    seen: asyncio.Queue[None] = asyncio.Queue()

    @event.listens_for(database.engine.sync_engine, "after_cursor_execute")
    def executed(_: object, __: object, statement: str, *___: object) -> None:
        if "ledger.renew" in statement:
            seen.put_nowait(None)

    return seen


async def test_a_held_lease_is_renewed_with_its_progress(ledger: Ledger, database: Database, quick: Settings) -> None:
    claim, sent = await claimed(ledger), await renewals(database)
    async with Leases(ledger, quick).hold(claim.execution_id, claim.attempt) as lease:
        lease.progress = {"tokens": 7}
        for _ in range(2):
            await asyncio.wait_for(sent.get(), SOON)
        (row,) = await database.run(
            text(
                "SELECT progress, lease_expires_at > started_at + interval '120 s' AS longer FROM task_executions e"
                " JOIN execution_attempts a ON a.execution_id = e.id"
            )
        )
    assert (row.progress, row.longer) == ({"tokens": 7}, True)


async def test_one_statement_renews_all_leases_of_a_worker(ledger: Ledger, database: Database, quick: Settings) -> None:
    claims, sent = [await claimed(ledger) for _ in range(3)], await renewals(database)
    leases = Leases(ledger, quick)
    async with (
        leases.hold(claims[0].execution_id, 1),
        leases.hold(claims[1].execution_id, 1),
        leases.hold(claims[2].execution_id, 1),
    ):
        await asyncio.wait_for(sent.get(), SOON)
        (row,) = await database.run(
            text("SELECT count(*) AS held FROM task_executions WHERE lease_expires_at > created_at + interval '120 s'")
        )
    assert row.held == 3


async def test_an_idle_worker_makes_no_statement(ledger: Ledger, database: Database, quick: Settings) -> None:
    claim, sent = await claimed(ledger), await renewals(database)
    leases = Leases(ledger, quick)
    async with leases.hold(claim.execution_id, 1):
        await asyncio.wait_for(sent.get(), SOON)
    while not sent.empty():
        sent.get_nowait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sent.get(), 0.3)  # six intervals
    async with leases.hold(claim.execution_id, 1):  # and it takes up again
        await asyncio.wait_for(sent.get(), SOON)


async def test_a_lease_that_another_attempt_took_is_lost(ledger: Ledger, database: Database, quick: Settings) -> None:
    claim = await claimed(ledger)
    async with Leases(ledger, quick).hold(claim.execution_id, claim.attempt) as lease:
        await database.run(text("UPDATE task_executions SET lease_expires_at = now() - interval '1 s'"))
        taken = await ledger.claim(claim.execution_id, uuid4())
        # a renewal may have come between: then the lease is still ours, and the claim was refused
        if taken and taken.verdict == "held":
            await database.run(text("UPDATE task_executions SET attempt = attempt + 1"))
        assert await asyncio.wait_for(lease.ended, SOON) == "lost"


async def test_a_cancellation_comes_back_with_the_renewal(ledger: Ledger, quick: Settings) -> None:
    claim = await claimed(ledger)
    async with Leases(ledger, quick).hold(claim.execution_id, claim.attempt) as lease:
        await ledger.cancel(claim.evaluation_id)
        assert await asyncio.wait_for(lease.ended, SOON) == "cancel"


async def test_a_renewal_that_crosses_our_own_settle_changes_nothing(
    ledger: Ledger, database: Database, quick: Settings
) -> None:
    claim, sent = await claimed(ledger), await renewals(database)
    leases = Leases(ledger, quick)
    async with leases.hold(claim.execution_id, claim.attempt) as lease:
        lease.settling = True
        await ledger.settle(claim.execution_id, claim.attempt, Settlement("succeeded"))
        while not sent.empty():
            sent.get_nowait()
        for _ in range(
            3
        ):  # the first may have crossed the settle, the second found nothing, and has been heard by the third
            await asyncio.wait_for(sent.get(), SOON)
    assert not lease.ended.done()


async def test_a_drain_waits_for_a_claim_under_way_and_for_what_it_comes_to(ledger: Ledger, quick: Settings) -> None:
    claim, leases = await claimed(ledger), Leases(ledger, quick)
    with leases.claiming():
        draining = asyncio.create_task(leases.drain())
        await asyncio.sleep(0)
        assert not draining.done()
    async with leases.hold(claim.execution_id, claim.attempt) as lease:
        assert await asyncio.wait_for(lease.ended, SOON) == "drain"
        assert not draining.done()
    await asyncio.wait_for(draining, SOON)


class Unreachable:
    """A ledger whose database is away for the first so many renewals. Not a stand-in for a database: what the leases do
    with the error is all that is asked here."""

    def __init__(self, ledger: Ledger, failures: float) -> None:
        self._ledger = ledger
        self._failures = failures

    async def renew(self, held: object, *, patience: float) -> object:
        self._failures -= 1
        if self._failures >= 0:
            raise DatabaseUnavailable("away")
        return await self._ledger.renew(held, patience=patience)  # type: ignore[arg-type]  # passed through


async def test_work_survives_failed_renewals_until_the_patience_ends(
    ledger: Ledger, database: Database, quick: Settings
) -> None:
    claim, sent = await claimed(ledger), await renewals(database)
    patient = quick.model_copy(update={"renew_patience": SOON})
    passing = Leases(Unreachable(ledger, 2), patient)  # type: ignore[arg-type]  # only renew is asked of it
    async with passing.hold(claim.execution_id, claim.attempt) as lease:
        await asyncio.wait_for(sent.get(), SOON)
        assert not lease.ended.done()
    lasting = Leases(Unreachable(ledger, float("inf")), quick)  # type: ignore[arg-type]
    async with lasting.hold(claim.execution_id, claim.attempt) as lease:
        assert await asyncio.wait_for(lease.ended, SOON) == "unreachable"

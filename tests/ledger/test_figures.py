"""What the ledger decides can be read from the metrics; and every Cloud Task knows its evaluation's trace."""

import pytest
from sqlalchemy import TextClause, text

from app.database.session import Database
from app.ledger import Ledger, Outcome
from app.settings import Settings
from tests.ledger.factories import SPEC, claim, let_expire, make_due, planned, push, samples_of, scored, settle
from tests.recorded import Recorded

TRACE = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def recorded() -> Recorded:
    """Its own."""
    return Recorded()


@pytest.fixture
def counted(database: Database, settings: Settings, recorded: Recorded) -> Ledger:
    return Ledger(database, lease=settings.lease, worker="worker-1", meters=recorded.telemetry.meter)


async def test_claims_are_counted_by_kind_and_verdict(counted: Ledger, database: Database, recorded: Recorded) -> None:
    run = f"{await planned(counted)}.1"
    first = await claim(counted, run)
    await push(counted, run)
    await let_expire(database, run)
    second = await claim(counted, run)
    await settle(counted, second, samples=[scored(1)])
    await push(counted, run)
    assert await counted.claim(f"{run}.x", first.evaluation_id) is None
    told = {
        verdict: recorded.value("proctor.ledger.claims", kind="run", verdict=verdict)
        for verdict in ("claimed", "held", "taken over", "over")
    }
    assert told == {"claimed": 1, "held": 1, "taken over": 1, "over": 1}
    assert recorded.value("proctor.ledger.claims", kind="plan") == 1
    assert recorded.value("proctor.ledger.claims", verdict="unknown") == 1


async def test_refused_writes_are_counted_by_transition(
    counted: Ledger, database: Database, recorded: Recorded
) -> None:
    stale = await claim(counted, f"{await planned(counted)}.1")
    await let_expire(database, stale.execution_id)
    later = await claim(counted, stale.execution_id)
    assert recorded.value("proctor.ledger.stale_writes") == 0
    assert not await counted.record(stale.execution_id, stale.attempt, [scored(1)])
    assert (await settle(counted, stale, samples=[scored(1)])).verdict == "stale"
    assert await counted.record(later.execution_id, later.attempt, [scored(1)])
    await settle(counted, later)
    assert recorded.value("proctor.ledger.stale_writes", transition="record") == 1
    assert recorded.value("proctor.ledger.stale_writes", transition="settle") == 1


@pytest.mark.parametrize(
    ("outcome", "cause", "counted_as"),
    [
        ("interrupted", "drain", "drain"),
        ("interrupted", "deadline", "deadline"),
        ("interrupted", "crash", "crash"),
        ("failed", None, "failed"),
    ],
)
async def test_what_has_to_be_tried_again_is_counted_by_cause(
    counted: Ledger, recorded: Recorded, outcome: Outcome, cause: str | None, counted_as: str
) -> None:
    run = f"{await planned(counted)}.1"
    await settle(counted, await claim(counted, run), outcome, cause=cause, max_failures=2)
    await settle(counted, await claim(counted, run), samples=[scored(1)])
    assert recorded.value("proctor.ledger.retries") == recorded.value("proctor.ledger.retries", cause=counted_as) == 1


async def test_a_lease_that_was_lost_is_a_retry_too(counted: Ledger, database: Database, recorded: Recorded) -> None:
    lost = await claim(counted, f"{await planned(counted)}.1")
    await let_expire(database, lost.execution_id)
    await claim(counted, lost.execution_id)
    assert recorded.value("proctor.ledger.retries", cause="lease lost") == 1


async def test_what_waits_has_waited_since_it_was_made_or_given_back(counted: Ledger, database: Database) -> None:
    assert await counted.waiting() == (0, 0)
    evaluation = await planned(counted, 2)
    await database.run(_aged(3600))
    age, pending = await counted.waiting()
    assert (3600 <= age < 3660, pending) == (True, 2)
    await settle(counted, await claim(counted, f"{evaluation}.1"), "interrupted")
    await claim(counted, f"{evaluation}.2")
    age, pending = await counted.waiting()
    assert (0 <= age < 60, pending) == (True, 1), "it was given back just now"


async def test_every_cloud_task_of_an_evaluation_knows_its_trace(ledger: Ledger, database: Database) -> None:
    """Whoever makes it: the push that fans out or brings the report, a cancellation, the sweeper."""
    evaluation = (await ledger.submit(SPEC, "me", traceparent=TRACE)).evaluation_id
    await make_due(database, f"{evaluation}.plan")
    assert [t.traceparent for t in await ledger.take_due(10)] == [TRACE]
    await settle(ledger, await claim(ledger, f"{evaluation}.plan"), runs=samples_of(2))
    assert [t.traceparent for t in await ledger.take_due(10)] == [TRACE, TRACE]
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), samples=[scored(1)])
    settled = await settle(ledger, await claim(ledger, f"{evaluation}.2"), samples=[scored(2)])
    assert settled.report
    assert settled.report.traceparent == TRACE
    other = (await ledger.submit(SPEC, "me", traceparent=TRACE)).evaluation_id
    cancelled = await ledger.cancel(other)
    assert cancelled
    assert cancelled.report
    assert cancelled.report.traceparent == TRACE


def _aged(seconds: float) -> TextClause:
    return text(f"UPDATE task_executions SET created_at = clock_timestamp() - interval '{seconds} s'")

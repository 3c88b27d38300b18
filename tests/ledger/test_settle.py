"""Settling: an attempt ends once, with its results, the counters, and whatever comes next."""

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import End, Enqueue, Ledger, Outcome, Settlement
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import (
    FAULT,
    SUCCEEDED,
    claim,
    let_expire,
    lost_reply,
    planned,
    report,
    samples_of,
    scored,
    settle,
    submitted,
)
from tests.ledger.transactions import uncommitted, until_blocked


async def test_what_is_gone_on_with_was_left_by_attempts_since_the_last_that_ended_by_itself(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger, 1)
    run = f"{evaluation}.1"
    found = []
    for outcome in ("interrupted", "failed", "interrupted", "interrupted", "succeeded"):
        attempt = await claim(ledger, run)
        found.append(await ledger.interrupted(attempt))
        await settle(ledger, attempt, outcome, max_failures=2)
    assert found == [[], [1], [], [3], [4, 3]]


async def test_what_a_lost_attempt_has_spent_stands_in_its_own_row_and_nowhere_else(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger, 1)
    run = f"{evaluation}.1"
    lost = await claim(ledger, run)
    await ledger.spent(run, lost.attempt, {"tokens": 5}, 0.1)  # it is still at work: its progress tells
    attempts = text("SELECT attempt, usage, cost FROM execution_attempts WHERE execution_id = :id ORDER BY attempt")
    assert [tuple(row) for row in await database.run(attempts, {"id": run})] == [(1, None, None)]
    await let_expire(database, run)
    await claim(ledger, run)
    for _ in range(2):
        await ledger.spent(run, lost.attempt, {"tokens": 70}, 0.5)
    assert [tuple(row) for row in await database.run(attempts, {"id": run})] == [
        (1, {"tokens": 70}, 0.5),
        (2, None, None),
    ]
    assert (await rows.execution(database, run)).progress is None


async def test_a_plan_fans_out_to_its_runs_in_the_datasets_order(ledger: Ledger, database: Database) -> None:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    settled = await settle(ledger, plan, runs=samples_of(3, 2), runs_due=60, versions={"inspect_ai": "0.3.285"})

    assert (settled.verdict, settled.state, settled.runs, settled.report) == ("recorded", "succeeded", 3, None)
    assert list(await rows.executions(database, evaluation)) == ["plan", "1", "2", "3"]
    second = await rows.execution(database, f"{evaluation}.2")
    assert second.samples == [{"id": 2, "epoch": 1}, {"id": 1002, "epoch": 1}]
    assert 50 < await rows.seconds_until(database, second.id, "sweep_at") <= 60
    row = await rows.evaluation(database, evaluation)
    assert (row.remaining, row.versions) == (3, {"inspect_ai": "0.3.285"})


async def test_fifty_settles_each_sent_twice_are_recorded_once_and_bring_one_report(
    ledger: Ledger, database: Database
) -> None:
    for _ in range(4):
        evaluation = await planned(ledger, CROWD)
        claims = await asyncio.gather(*(claim(ledger, f"{evaluation}.{n}") for n in range(1, CROWD + 1)))
        ends = [(c, scored(n)) for n, c in enumerate(claims, 1)]

        both = await asyncio.gather(*(settle(ledger, c, samples=[sample]) for c, sample in ends for _ in range(2)))
        again = await asyncio.gather(*(settle(ledger, c, samples=[sample]) for c, sample in ends))

        assert sorted(s.verdict for s in both) == ["already"] * CROWD + ["recorded"] * CROWD
        assert {(s.verdict, s.state, s.report) for s in again} == {("already", "succeeded", None)}
        assert [s.report for s in both if s.report] == [Enqueue(f"{evaluation}.report", 1)]
        assert (await rows.evaluation(database, evaluation)).remaining == 0
        assert await rows.reports(database, evaluation) == 1
        assert len(await rows.results(database, evaluation)) == CROWD


async def test_one_settle_sent_fifty_times_at_once_is_recorded_once(ledger: Ledger, database: Database) -> None:
    for _ in range(4):
        evaluation = await planned(ledger, 2)
        run = await claim(ledger, f"{evaluation}.1")
        settled = await asyncio.gather(*(settle(ledger, run, samples=[scored(1)]) for _ in range(CROWD)))

        assert sorted(s.verdict for s in settled) == ["already"] * (CROWD - 1) + ["recorded"]
        assert {s.state for s in settled} == {"succeeded"}
        assert (await rows.evaluation(database, evaluation)).remaining == 1
        assert await rows.reports(database, evaluation) == 0, "one run is left"


@pytest.mark.parametrize(
    ("outcome", "max_failures", "state"),
    [
        ("succeeded", 1, "succeeded"),
        ("failed", 1, "failed"),
        ("failed", 2, "pending"),
        ("cancelled", 1, "cancelled"),
        ("interrupted", 1, "pending"),
    ],
)
async def test_a_settle_whose_reply_was_lost_is_answered_already_with_the_same_state(
    ledger: Ledger, database: Database, engine: AsyncEngine, outcome: Outcome, max_failures: int, state: str
) -> None:
    evaluation = await planned(ledger, 2)
    run = await claim(ledger, f"{evaluation}.1")
    with lost_reply(engine) as lost:
        settled = await settle(ledger, run, outcome, max_failures=max_failures, samples=[scored(1)])

    assert len(lost) == 1
    assert (settled.verdict, settled.state) == ("already", state)
    assert await rows.history(database, run.execution_id) == [(1, outcome)]
    assert (await rows.execution(database, run.execution_id)).failures == (outcome == "failed")
    assert (await rows.evaluation(database, evaluation)).remaining == (2 if state == "pending" else 1)
    assert len(await rows.results(database, evaluation)) == 1


async def test_an_execution_that_does_not_exist_cannot_be_settled(ledger: Ledger, database: Database) -> None:
    evaluation = await submitted(ledger)
    before = await rows.everything(database)
    assert await ledger.settle(f"{evaluation}.7", 1, Settlement("succeeded", samples=[scored()])) is None
    assert await rows.everything(database) == before


async def test_the_attempts_row_keeps_what_it_cost(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await settle(ledger, run, "failed", error=FAULT, usage={"m": {"input_tokens": 5}}, cost=0.25)

    (attempt,) = await rows.attempts(database, run.execution_id)
    assert (attempt.outcome, attempt.usage, attempt.cost) == ("failed", {"m": {"input_tokens": 5}}, 0.25)
    assert attempt.error == FAULT.model_dump(exclude_none=True)
    assert attempt.ended_at >= attempt.started_at


async def test_a_failure_with_tries_left_is_pending_again_and_the_last_one_is_final(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger)
    states = []
    for _ in range(3):
        run = await claim(ledger, f"{evaluation}.1")
        states.append((await settle(ledger, run, "failed", max_failures=3, error=FAULT)).state)

    assert states == ["pending", "pending", "failed"]
    row = await rows.execution(database, f"{evaluation}.1")
    assert (row.failures, row.attempt, row.error["message"]) == (3, 3, FAULT.message)
    assert await rows.history(database, row.id) == [(1, "failed"), (2, "failed"), (3, "failed")]
    assert await rows.reports(database, evaluation) == 1


async def test_a_failure_that_leaves_tries_does_not_count_the_execution_as_done(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger)
    run = await claim(ledger, f"{evaluation}.1")
    await settle(ledger, run, "failed", max_failures=2)
    assert (await rows.evaluation(database, evaluation)).remaining == 1
    assert await rows.reports(database, evaluation) == 0


async def test_an_interruption_is_never_charged(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger)
    for _ in range(5):
        run = await claim(ledger, f"{evaluation}.1")
        assert (await settle(ledger, run, "interrupted", max_failures=1)).state == "pending"

    row = await rows.execution(database, f"{evaluation}.1")
    assert (row.failures, row.crashes, row.attempt) == (0, 0, 5)
    assert 590 < await rows.seconds_until(database, row.id, "sweep_at") <= 600, (
        "the queue comes back before the sweeper"
    )


async def test_a_lost_child_counts_as_a_crash_and_its_samples_as_progress(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, samples=2)
    crashes = []
    for samples in ([], [], [scored(1)], []):
        run = await claim(ledger, f"{evaluation}.1")
        await settle(ledger, run, "interrupted", crashed=True, samples=samples)
        crashes.append((await rows.execution(database, run.execution_id)).crashes)
    assert crashes == [1, 2, 1, 2]


async def test_the_report_ends_the_evaluation_with_what_it_found(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))
    end = End("succeeded", {"accuracy": 0.5}, {"m": {"input_tokens": 7}}, None, "file:///logs/merged.eval")
    settled = await report(ledger, evaluation, end)

    assert (settled.verdict, settled.state, settled.report) == ("recorded", "succeeded", None)
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.results, row.usage) == ("succeeded", {"accuracy": 0.5}, {"m": {"input_tokens": 7}})
    assert (row.log, row.error, row.remaining) == ("file:///logs/merged.eval", None, 0)
    assert row.finished_at is not None


async def test_a_report_that_fails_for_good_ends_the_evaluation_as_failed(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))
    first = await report(ledger, evaluation, End("failed", error=FAULT), "interrupted")
    assert (first.state, (await rows.evaluation(database, evaluation)).state) == ("pending", "running")

    await report(ledger, evaluation, End("failed", error=FAULT), "failed")
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.error["message"]) == ("failed", FAULT.message)


async def test_fifty_settles_of_the_report_end_the_evaluation_once(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))
    claimed = await claim(ledger, f"{evaluation}.report")
    settled = await asyncio.gather(*(settle(ledger, claimed, end=SUCCEEDED) for _ in range(CROWD)))

    assert sorted(s.verdict for s in settled) == ["already"] * (CROWD - 1) + ["recorded"]
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.remaining) == ("succeeded", 0)


async def test_two_settles_that_wait_for_each_other_still_count_to_zero(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    """The second sees the evaluation as the first left it, not as its own snapshot shows it."""
    evaluation = await planned(ledger, 2)
    first, second = await claim(ledger, f"{evaluation}.1"), await claim(ledger, f"{evaluation}.2")
    async with uncommitted(engine) as other:
        assert (await settle(other, first)).report is None
        waiting = asyncio.create_task(settle(ledger, second))
        await until_blocked(database)
    assert (await waiting).report == Enqueue(f"{evaluation}.report", 1)

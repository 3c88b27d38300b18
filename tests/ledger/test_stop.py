"""Stopping: once more samples have errored than the policy allows, nothing further starts, and the evaluation gets its
report."""

import asyncio
from typing import Any
from uuid import UUID

from app.database.session import Database
from app.ledger import Claim, Enqueue, Held, Ledger, Stop
from app.runner.messages import Failure
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import FAULT, claim, errored, push, report, samples_of, scored, settle, submitted


async def _planned(ledger: Ledger, runs: int, error_limit: int | None, samples: int = 1) -> UUID:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    await settle(ledger, plan, runs=samples_of(runs, samples), error_limit=error_limit)
    return evaluation


async def _stop(ledger: Ledger, evaluation: UUID, run: Claim, errored: int = 0) -> Stop | None:
    return await ledger.stop_if_exceeded(evaluation, run.execution_id, run.attempt, errored)


async def _fail(ledger: Ledger, evaluation: UUID, n: int, **more: Any) -> Stop | None:
    run = await claim(ledger, f"{evaluation}.{n}")
    await settle(ledger, run, "failed", samples=[errored(n)], error=FAULT, **more)
    return await _stop(ledger, evaluation, run)


async def test_the_first_error_too_many_ends_what_is_pending_and_says_why(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 5, error_limit=2)
    running = await claim(ledger, f"{evaluation}.5")
    assert await _fail(ledger, evaluation, 1) is None
    stop = await _fail(ledger, evaluation, 2)
    assert stop == Stop("It was stopped: 2 samples errored, and fail_on_error allows 1.", 2, None)
    states = await rows.executions(database, evaluation)
    assert [states[n] for n in "12345"] == ["failed", "failed", "cancelled", "cancelled", "running"]
    row = await rows.evaluation(database, evaluation)
    assert (row.remaining, row.stop_reason, row.state) == (1, stop.reason, "running")
    assert (await rows.execution(database, f"{evaluation}.3")).error["message"] == stop.reason
    (renewal,) = await ledger.renew([Held(running.execution_id, 1)])
    assert (renewal.stopped, renewal.cancel, renewal.lost) == (True, False, False)


async def test_a_failure_with_tries_left_is_no_error_yet(ledger: Ledger) -> None:
    evaluation = await _planned(ledger, 2, error_limit=1)
    assert await _fail(ledger, evaluation, 1, max_failures=2) is None


async def test_an_evaluation_that_may_have_any_number_of_errors_is_never_stopped(ledger: Ledger) -> None:
    evaluation = await _planned(ledger, 3, error_limit=None)
    assert [await _fail(ledger, evaluation, n) for n in (1, 2)] == [None, None]


async def test_an_attempt_that_goes_on_counts_the_errors_that_are_final(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 2, error_limit=1, samples=2)
    run = await claim(ledger, f"{evaluation}.1")
    await ledger.record(run.execution_id, run.attempt, [errored(1)])
    assert await _stop(ledger, evaluation, run, 1) == Stop(
        "It was stopped: 1 sample errored, and fail_on_error allows none.", 1, None
    )
    assert (await rows.execution(database, f"{evaluation}.2")).state == "cancelled"


async def test_samples_of_a_failed_run_that_have_their_score_are_no_errors(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 1, error_limit=9, samples=3)
    run = await claim(ledger, f"{evaluation}.1")
    await settle(ledger, run, "failed", samples=[scored(1), errored(1001)], error=FAULT)
    await _stop(ledger, evaluation, run)
    assert (await rows.execution(database, run.execution_id)).errored == 2


async def test_an_earlier_attempt_counts_nothing(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 2, error_limit=1)
    first = await claim(ledger, f"{evaluation}.1")
    await settle(ledger, first, "interrupted")
    await claim(ledger, f"{evaluation}.1")
    assert await _stop(ledger, evaluation, first, 1) is None
    assert (await rows.execution(database, f"{evaluation}.1")).errored == 0


async def test_the_last_that_a_stop_ends_brings_the_report(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 3, error_limit=1)
    stop = await _fail(ledger, evaluation, 1)
    assert stop is not None
    assert (stop.executions, stop.report) == (2, Enqueue(f"{evaluation}.report", 1))
    assert (await claim(ledger, f"{evaluation}.report")).stop_reason == stop.reason


async def test_what_was_given_back_meanwhile_is_told_when_it_is_claimed(ledger: Ledger) -> None:
    evaluation = await _planned(ledger, 2, error_limit=1)
    other = await claim(ledger, f"{evaluation}.2")
    stop = await _fail(ledger, evaluation, 1)
    assert stop is not None
    await settle(ledger, other, "interrupted")
    again = await claim(ledger, f"{evaluation}.2")
    assert again.stop_reason == stop.reason
    settled = await settle(ledger, again, "cancelled")
    assert settled.report == Enqueue(f"{evaluation}.report", 1)


async def test_of_errors_at_the_same_time_none_goes_unseen(ledger: Ledger, database: Database) -> None:
    """The limit is the number of errors, so that whoever comes last must see all the others'."""
    for _ in range(4):
        evaluation = await _planned(ledger, CROWD + 3, error_limit=CROWD)
        stops = await asyncio.gather(*(_fail(ledger, evaluation, n) for n in range(1, CROWD + 1)))
        assert [stop for stop in stops if stop is not None]
        row = await rows.evaluation(database, evaluation)
        states = list((await rows.executions(database, evaluation)).values())
        assert (row.remaining, states.count("cancelled"), states.count("failed")) == (0, 3, CROWD)
        assert [stop.report for stop in stops if stop is not None and stop.report] == [
            Enqueue(f"{evaluation}.report", 1)
        ]


async def test_a_retry_begins_to_count_anew(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 3, error_limit=2)
    assert [await _fail(ledger, evaluation, 1), bool(await _fail(ledger, evaluation, 2))] == [None, True]
    await report(ledger, evaluation)
    assert (await push(ledger, f"{evaluation}.1")).verdict == "over"
    assert await ledger.retry(evaluation) == ("succeeded", 3)
    row = await rows.evaluation(database, evaluation)
    assert (row.stopped_at, row.stop_reason, row.error_limit) == (None, None, 2)
    assert await _fail(ledger, evaluation, 1) is None


async def test_a_run_whose_workers_were_lost_stops_no_evaluation(ledger: Ledger, database: Database) -> None:
    evaluation = await _planned(ledger, 2, error_limit=1, samples=2)
    run = await claim(ledger, f"{evaluation}.1")
    lost = Failure(error_class="infrastructure", message="Its worker was lost 3 times without progress.")
    await settle(ledger, run, "failed", samples=[scored(1)], error=lost)
    assert await _stop(ledger, evaluation, run) is None
    assert (await rows.execution(database, run.execution_id)).errored == 0

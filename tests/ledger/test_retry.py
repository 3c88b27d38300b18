"""Retrying an evaluation: what failed or was cancelled is armed again, once, and only when the evaluation is over."""

import asyncio
from uuid import uuid4

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import End, Enqueue, Ledger
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import (
    FAULT,
    claim,
    ended,
    planned,
    push,
    report,
    run_out,
    samples_of,
    settle,
    submitted,
    watched,
)
from tests.ledger.transactions import uncommitted, until_blocked

FAILED = End("failed", error=FAULT)


async def test_an_evaluation_that_does_not_exist_cannot_be_retried(ledger: Ledger) -> None:
    assert await ledger.retry(uuid4()) is None


async def test_a_retry_whose_commit_s_reply_was_lost_is_told_that_it_worked(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await ended(ledger, "failed", end=FAILED)
    lost: list[bool] = []

    @event.listens_for(engine.sync_engine, "commit")
    def commit(connection: Connection) -> None:
        """Commits on the wire, and then the connection is gone before the pool hears of it."""
        if not lost:
            lost.append(True)
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.commit()
            raise OSError("the reply was lost")

    assert await ledger.retry(evaluation) == ("failed", 1)
    assert lost
    assert (await rows.evaluation(database, evaluation)).remaining == 1


async def test_failed_and_cancelled_runs_are_armed_again_and_counted(ledger: Ledger, database: Database) -> None:
    evaluation = await ended(ledger, "succeeded", "failed", "cancelled", "succeeded", "failed", end=FAILED)
    assert await ledger.retry(evaluation) == ("failed", 3)

    states = await rows.executions(database, evaluation)
    assert [states[n] for n in "12345"] == ["succeeded", "pending", "pending", "succeeded", "pending"]
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.remaining) == ("running", 3)
    assert (row.finished_at, row.error, row.results, row.log, row.cancel_requested_at) == (None,) * 5


async def test_what_is_armed_again_begins_afresh_under_a_higher_attempt(ledger: Ledger, database: Database) -> None:
    evaluation = await ended(ledger, "failed", end=FAILED)
    await ledger.retry(evaluation)

    row = await rows.execution(database, f"{evaluation}.1")
    assert (row.failures, row.crashes, row.error, row.finished_at, row.attempt) == (0, 0, None, None, 1)
    assert [e.execution_id for e in await ledger.take_due(10)] == [row.id], "it is due at once"
    again = await claim(ledger, row.id)
    assert (again.attempt, again.failures) == (2, 0)
    assert await rows.history(database, row.id) == [(1, "failed"), (2, None)]


async def test_the_same_report_reports_again_under_a_higher_number(ledger: Ledger, database: Database) -> None:
    evaluation = await ended(ledger, "succeeded", "failed", end=FAILED)
    await ledger.retry(evaluation)
    assert (await push(ledger, f"{evaluation}.report")).verdict == "over", "a late push of the old Cloud Task"

    settled = await settle(ledger, await claim(ledger, f"{evaluation}.2"))
    assert settled.report == Enqueue(f"{evaluation}.report", 2)
    second = await claim(ledger, f"{evaluation}.report")
    assert (second.attempt, second.failures, second.crashes) == (2, 0, 0)
    await settle(ledger, second, end=End("succeeded", {"accuracy": 1}))
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.results, row.error) == ("succeeded", {"accuracy": 1}, None)


async def test_a_plan_without_runs_is_armed_again(ledger: Ledger, database: Database) -> None:
    evaluation = await submitted(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.plan"), "failed", error=FAULT)
    await report(ledger, evaluation, FAILED)

    assert await ledger.retry(evaluation) == ("failed", 1)
    assert await rows.executions(database, evaluation) == {"plan": "pending", "report": "succeeded"}
    assert (await rows.evaluation(database, evaluation)).remaining == 1
    settled = await settle(ledger, await claim(ledger, f"{evaluation}.plan"), runs=samples_of(2))
    assert settled.runs == 2


async def test_a_plan_that_was_cancelled_while_it_ran_is_armed_again(ledger: Ledger, database: Database) -> None:
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    await ledger.cancel(evaluation)
    await settle(ledger, plan, runs=samples_of(2))
    await report(ledger, evaluation)

    assert await ledger.retry(evaluation) == ("cancelled", 1)
    settled = await settle(ledger, await claim(ledger, f"{evaluation}.plan"), runs=samples_of(2))
    assert (settled.runs, settled.report) == (2, None), "the old wish to cancel is gone"


async def test_a_report_that_failed_reports_again_if_no_run_did(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 2)
    await run_out(ledger, evaluation, "succeeded", "succeeded")
    await report(ledger, evaluation, FAILED, "failed")

    assert await ledger.retry(evaluation) == ("failed", 1)
    states = await rows.executions(database, evaluation)
    assert states == {"plan": "succeeded", "1": "succeeded", "2": "succeeded", "report": "pending"}
    assert (await rows.evaluation(database, evaluation)).remaining == 0
    assert await ledger.take_due(10) == [Enqueue(f"{evaluation}.report", 2)]
    await report(ledger, evaluation)
    assert (await rows.evaluation(database, evaluation)).state == "succeeded"


async def test_an_evaluation_cancelled_during_its_report_reports_again(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger)
    await run_out(ledger, evaluation, "succeeded")
    await ledger.cancel(evaluation)
    await report(ledger, evaluation)

    assert await ledger.retry(evaluation) == ("cancelled", 1)
    await report(ledger, evaluation)
    assert (await rows.evaluation(database, evaluation)).state == "succeeded"


async def test_nothing_is_armed_on_a_success_without_failures(ledger: Ledger, database: Database) -> None:
    evaluation = await ended(ledger, "succeeded", "succeeded")
    before = await rows.everything(database)
    assert await ledger.retry(evaluation) == ("succeeded", 0)
    assert await rows.everything(database) == before


async def test_a_success_with_failed_runs_is_retried_for_those(ledger: Ledger, database: Database) -> None:
    evaluation = await ended(ledger, "succeeded", "failed")
    assert await ledger.retry(evaluation) == ("succeeded", 1)
    assert (await rows.executions(database, evaluation))["2"] == "pending"


async def test_an_evaluation_that_runs_is_not_retried(ledger: Ledger, database: Database) -> None:
    pending = await submitted(ledger)
    running = await planned(ledger, 2)
    await run_out(ledger, running, "failed")
    before = await rows.everything(database)
    assert await ledger.retry(pending) == ("running", 0)
    assert await ledger.retry(running) == ("running", 0)
    assert await rows.everything(database) == before


async def test_no_retry_while_the_report_is_pending_or_runs_but_one_after_it(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger)
    await run_out(ledger, evaluation, "failed")
    assert await ledger.retry(evaluation) == ("running", 0)
    reporting = await claim(ledger, f"{evaluation}.report")
    assert await ledger.retry(evaluation) == ("running", 0)

    await settle(ledger, reporting, end=FAILED)
    assert await ledger.retry(evaluation) == ("failed", 1)


async def test_a_retry_that_waits_for_the_report_opens_what_it_ended(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    evaluation = await planned(ledger)
    await run_out(ledger, evaluation, "failed")
    reporting = await claim(ledger, f"{evaluation}.report")
    async with uncommitted(engine) as other:
        await settle(other, reporting, end=FAILED)
        waiting = asyncio.create_task(ledger.retry(evaluation))
        await until_blocked(database)
    assert await waiting == ("failed", 1)
    assert (await rows.evaluation(database, evaluation)).remaining == 1


async def test_a_claim_that_waits_for_a_retry_gets_what_it_armed(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    """A late push of the old Cloud Task. Its snapshot still shows the row as it ended."""
    evaluation = await ended(ledger, "failed", end=FAILED)
    async with uncommitted(engine) as user:
        await user.retry(evaluation)
        waiting = asyncio.create_task(push(ledger, f"{evaluation}.1"))
        await until_blocked(database)
    claimed = await waiting
    assert (claimed.verdict, claimed.attempt, claimed.failures) == ("claimed", 2, 0)
    row = await rows.execution(database, f"{evaluation}.1")
    assert (row.state, row.failures, row.finished_at) == ("running", 0, None)


async def test_a_claim_that_waits_for_a_retry_knows_that_the_cancellation_is_taken_back(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    """Its snapshot still shows the evaluation as it was cancelled; settled as that, the retry would come to nothing."""
    evaluation = await planned(ledger)
    await ledger.cancel(evaluation)
    await report(ledger, evaluation)
    async with uncommitted(engine) as user:
        await user.retry(evaluation)
        waiting = asyncio.create_task(push(ledger, f"{evaluation}.1"))
        await until_blocked(database)
    claimed = await waiting
    assert (claimed.verdict, claimed.cancel) == ("claimed", False)


async def test_of_fifty_retries_at_once_one_opens_the_evaluation(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    with watched(engine) as errors:
        for _ in range(3):
            evaluation = await ended(ledger, "succeeded", "failed", "cancelled", end=FAILED)
            answers = await asyncio.gather(*(ledger.retry(evaluation) for _ in range(CROWD)))

            assert answers.count(("failed", 2)) == 1
            assert answers.count(("running", 0)) == CROWD - 1
            assert (await rows.evaluation(database, evaluation)).remaining == 2
    assert errors == []


async def test_retries_racing_late_pushes_and_cancellations_come_to_one_more_report(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    async def late(execution_id: str) -> None:
        pushed = await push(ledger, execution_id)
        if pushed.granted:
            await settle(ledger, pushed, "cancelled" if pushed.cancel else "failed")

    with watched(engine) as errors:
        for _ in range(8):
            evaluation = await ended(ledger, "failed", "cancelled", "succeeded", end=FAILED)
            retries = [ledger.retry(evaluation) for _ in range(8)]
            pushes = [late(f"{evaluation}.{n}") for n in (1, 2) * 8]
            await asyncio.gather(*retries, *pushes, *(ledger.cancel(evaluation) for _ in range(4)))

            await ledger.cancel(evaluation)
            assert (await rows.evaluation(database, evaluation)).remaining == 0
            assert await rows.reports(database, evaluation) == 2
    assert errors == []


async def test_results_stand_through_a_retry_until_a_report_has_new_ones(ledger: Ledger, database: Database) -> None:
    """And through a report that came to nothing, whose reason is said."""
    first = End("succeeded", {"accuracy": 0.5}, {"m": {"input_tokens": 7}}, None, "file:///logs/merged.eval")
    evaluation = await ended(ledger, "succeeded", "failed", end=first)
    assert await ledger.retry(evaluation) == ("succeeded", 1)
    stood = ({"accuracy": 0.5}, {"m": {"input_tokens": 7}}, "file:///logs/merged.eval")
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.results, row.usage, row.log) == ("running", *stood)

    await settle(ledger, await claim(ledger, f"{evaluation}.2"))
    await report(ledger, evaluation, FAILED)
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.results, row.usage, row.log) == ("failed", *stood)
    assert row.error["message"] == FAULT.message

    assert await ledger.retry(evaluation) == ("failed", 1)
    await report(ledger, evaluation, End("succeeded", {"accuracy": 1}, {}, None, "file:///logs/new.eval"))
    row = await rows.evaluation(database, evaluation)
    assert (row.state, row.results, row.usage, row.log, row.error) == (
        "succeeded",
        {"accuracy": 1},
        {},
        "file:///logs/new.eval",
        None,
    )

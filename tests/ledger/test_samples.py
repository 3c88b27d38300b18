"""Sample results: a score is never replaced, an error is by a later attempt, and the report finds them all."""

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.database.tables import sample_results
from app.ledger import Ledger
from app.runner.messages import SampleRef
from tests.ledger import rows
from tests.ledger.factories import (
    FAULT,
    Ended,
    claim,
    errored,
    lost_reply,
    planned,
    samples_of,
    scored,
    settle,
    submitted,
)

FIRST = scored(1, log="first.eval", value=0)
LATER = scored(1, log="later.eval", value=1)


async def test_a_recorded_sample_is_there_while_the_attempt_goes_on(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger, samples=2)}.1")
    assert await ledger.record(run.execution_id, 1, [FIRST])

    (row,) = await rows.results(database, run.evaluation_id)
    assert (row.sample_id, row.epoch, row.execution_id, row.attempt) == ("1", 1, run.execution_id, 1)
    assert row.scores == {"match": {"value": 0, "answer": None, "explanation": None}}
    assert (row.transcript, row.error) == ("file:///logs/first.eval", None)
    assert (await rows.execution(database, run.execution_id)).state == "running"


async def test_a_record_whose_reply_was_lost_is_the_same_as_one(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    with lost_reply(engine) as lost:
        assert await ledger.record(run.execution_id, 1, [FIRST])

    assert len(lost) == 1
    assert len(await rows.results(database, run.evaluation_id)) == 1


@pytest.mark.parametrize(
    ("first", "later", "kept"),
    [
        (scored(log="first.eval"), scored(log="later.eval"), "first.eval"),
        (scored(log="first.eval"), errored(log="later.eval"), "first.eval"),
        (errored(log="first.eval"), scored(log="later.eval"), "later.eval"),
        (errored(log="first.eval"), errored(log="later.eval"), "later.eval"),
    ],
    ids=["score, score", "score, error", "error, score", "error, error"],
)
@pytest.mark.parametrize("by", ["record", "settle"])
async def test_a_score_is_never_replaced_and_an_error_is_by_a_later_attempt(
    ledger: Ledger, database: Database, first: Ended, later: Ended, kept: str, by: str
) -> None:
    evaluation = await planned(ledger)
    for sample in (first, later):
        run = await claim(ledger, f"{evaluation}.1")
        if by == "record":
            assert await ledger.record(run.execution_id, run.attempt, [sample])
        await settle(ledger, run, "interrupted", samples=[sample] if by == "settle" else ())

    (row,) = await rows.results(database, evaluation)
    assert row.transcript == f"file:///logs/{kept}"
    assert row.attempt == (1 if kept == "first.eval" else 2)


async def test_an_error_is_not_replaced_by_the_same_attempt(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await ledger.record(run.execution_id, 1, [errored(log="first.eval")])
    await settle(ledger, run, samples=[LATER])
    (row,) = await rows.results(database, run.evaluation_id)
    assert (row.transcript, row.error["message"]) == ("file:///logs/first.eval", FAULT.message)


async def test_a_sample_that_is_sent_twice_in_one_statement_counts_as_its_last(
    ledger: Ledger, database: Database
) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await settle(ledger, run, samples=[FIRST, LATER])
    (row,) = await rows.results(database, run.evaluation_id)
    assert row.transcript == "file:///logs/later.eval"


async def test_the_epochs_of_a_sample_are_results_of_their_own(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await settle(ledger, run, samples=[scored(1, epoch=e) for e in (1, 2, 3)])
    assert [r.epoch for r in await rows.results(database, run.evaluation_id)] == [1, 2, 3]


async def test_a_failed_attempt_leaves_the_samples_that_it_scored(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger, samples=2)}.1")
    await settle(ledger, run, "failed", max_failures=2, samples=[scored(1), errored(1001)])
    assert await ledger.scored(await claim(ledger, run.execution_id)) == {("1", 1)}


async def test_what_is_scored_is_asked_of_the_claimed_execution_only(ledger: Ledger) -> None:
    evaluation = await planned(ledger, 2, samples=2)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), samples=[scored(1), scored(1001)])
    second = await claim(ledger, f"{evaluation}.2")
    assert await ledger.scored(second) == set()
    await ledger.record(second.execution_id, 1, [scored(1002)])
    assert await ledger.scored(second) == {("1002", 1)}


async def test_ids_that_are_text_and_ids_that_are_numbers_come_back_as_they_were(ledger: Ledger) -> None:
    evaluation = await submitted(ledger)
    refs = [SampleRef(id=id, epoch=1) for id in (7, "007", "a.b/c", "ü 'quoted'")]
    await settle(ledger, await claim(ledger, f"{evaluation}.plan"), runs=[refs])
    run = await claim(ledger, f"{evaluation}.1")
    assert run.samples == tuple(refs)
    await ledger.record(run.execution_id, 1, [scored(ref.id) for ref in refs])
    assert await ledger.scored(run) == {(str(ref.id), 1) for ref in refs}


async def test_text_that_postgres_cannot_store_does_not_lose_the_result(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    fault = FAULT.model_copy(update={"message": "it printed \x00 and \ud800"})
    result, url = errored(1)
    await settle(ledger, run, samples=[(result.model_copy(update={"error": fault}), url)])
    (row,) = await rows.results(database, run.evaluation_id)
    assert row.error["message"] == "it printed \ufffd and \ufffd"


async def test_the_report_gets_every_sample_in_the_plans_order_or_the_reason_why_not(ledger: Ledger) -> None:
    evaluation = await submitted(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.plan"), runs=samples_of(12, 3))
    for n in range(12, 2, -1):
        run = await claim(ledger, f"{evaluation}.{n}")
        await settle(ledger, run, samples=[(scored if n % 2 else errored)(ref.id) for ref in run.samples[::-1]])
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), "failed", error=FAULT, samples=[scored(1)])
    await ledger.cancel(evaluation)

    to_report = await ledger.to_report(evaluation)
    wanted = [SampleRef(id=1, epoch=1), *(ref for run in samples_of(12, 3)[2:] for ref in run)]
    assert [t.sample for t in to_report.transcripts] == wanted
    reasons = [(f.error_class, f.message) for f in to_report.missing]
    assert reasons == [("evaluation", FAULT.message)] * 2 + [("cancelled", "Its run was cancelled.")] * 3


async def test_the_report_learns_how_the_plan_ended(ledger: Ledger) -> None:
    evaluation = await submitted(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.plan"), "failed", max_failures=2, error=FAULT)
    await settle(ledger, await claim(ledger, f"{evaluation}.plan"), "failed", max_failures=2, error=FAULT)
    plan = await ledger.plan(evaluation)
    assert (plan.state, plan.attempt, plan.error) == ("failed", 2, FAULT)
    assert (await ledger.to_report(evaluation)).transcripts == ()


async def test_what_a_sample_was_when_it_was_planned_goes_to_its_run_and_to_the_report(ledger: Ledger) -> None:
    evaluation = await submitted(ledger)
    smallest, largest = -(2**63), 2**63 - 1
    plan = await claim(ledger, f"{evaluation}.plan")
    await settle(ledger, plan, runs=samples_of(2, 2), digests=[[smallest, 0], [1, largest]])
    for n, digests in ((1, (smallest, 0)), (2, (1, largest))):
        run = await claim(ledger, f"{evaluation}.{n}")
        assert run.digests == digests
        await settle(ledger, run, samples=[scored(n), scored(n + 1000)])
    found = (await ledger.to_report(evaluation)).transcripts
    assert [transcript.digest for transcript in found] == [smallest, 0, 1, largest]


async def test_one_coherent_run_stands_where_a_task_decides_which_samples_end(
    ledger: Ledger, database: Database
) -> None:
    """The first attempt's scores go, also that of a sample which the second did not come to; another run's stay."""
    evaluation = await planned(ledger, 2, samples=3)
    other = await claim(ledger, f"{evaluation}.2")
    await settle(ledger, other, samples=[scored(2), scored(1002), scored(2002)])
    first = await claim(ledger, f"{evaluation}.1")
    await ledger.record(first.execution_id, 1, [scored(1, value=0)])
    await settle(ledger, first, "failed", samples=[scored(2001, value=0), errored(1001)], error=FAULT, max_failures=2)
    second = await claim(ledger, f"{evaluation}.1")
    await settle(ledger, second, samples=[scored(1, value=1), scored(1001, value=1)], replace=True)
    found = await database.run(select(sample_results).where(sample_results.c.execution_id == second.execution_id))
    assert sorted((r.sample_id, r.attempt, r.scores["match"]["value"]) for r in found) == [("1", 2, 1), ("1001", 2, 1)]
    assert {t.sample.id for t in (await ledger.to_report(evaluation)).transcripts} == {1, 1001, 2, 1002, 2002}


async def test_a_stale_attempt_replaces_nothing(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, samples=2)
    stale = await claim(ledger, f"{evaluation}.1")
    await settle(ledger, stale, "interrupted")
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), samples=[scored(1), scored(1001)])
    late = await settle(ledger, stale, samples=[scored(1, value=0)], replace=True)
    assert late.verdict == "stale"
    found = await database.run(select(sample_results))
    assert sorted((r.sample_id, r.attempt) for r in found) == [("1", 2), ("1001", 2)]

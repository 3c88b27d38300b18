"""What an evaluation has spent, and what of that retries have wasted."""

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.database.session import Database
from app.evaluations.read import Reader
from app.ledger import End, Held, Ledger, Outcome
from app.runner.messages import SampleRef, SampleResult
from tests.ledger.factories import FAULT, claim, let_expire, planned, report, settle


@pytest.fixture
def reader(database: Database) -> Reader:
    return Reader(database)


async def tokens(reader: Reader, evaluation: UUID) -> tuple[int, int, int]:
    """Spent, useful, wasted."""
    found = (await reader.evaluation(evaluation)).tokens
    return found.spent, found.useful, found.wasted


def used(tokens: int) -> dict[str, Any]:
    return {"samples_done": 0, "model_calls": 1, "tokens": tokens, "cost": 0.0, "step": ""}


def result(tokens: int, sample: int = 1, *, errored: bool = False) -> tuple[SampleResult, str]:
    """By two models."""
    usage: dict[str, Any] = {"m": {"total_tokens": tokens - 1, "input_tokens": 9}, "judge": {"total_tokens": 1}}
    error = FAULT if errored else None
    ref = SampleRef(id=sample, epoch=1)
    return SampleResult(sample=ref, usage=usage, cost=0.5, error=error, log="a.eval"), "file:///logs/a.eval"


async def attempt(
    ledger: Ledger,
    execution: str,
    outcome: Outcome,
    spent: int,
    *samples: tuple[SampleResult, str],
    max_failures: int = 2,
) -> None:
    granted = await claim(ledger, execution)
    error = None if outcome == "succeeded" else FAULT
    more = {"error": error, "usage": used(spent), "max_failures": max_failures}
    await settle(ledger, granted, outcome, samples=samples, **more)


async def test_an_evaluation_without_attempts_has_spent_nothing(ledger: Ledger, reader: Reader) -> None:
    assert await tokens(reader, await planned(ledger)) == (0, 0, 0)


async def test_what_led_to_a_score_at_once_is_not_wasted(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger, 2)
    await attempt(ledger, f"{evaluation}.1", "succeeded", 100, result(100))
    await attempt(ledger, f"{evaluation}.2", "succeeded", 50, result(50, 2))
    assert await tokens(reader, evaluation) == (150, 150, 0)
    assert (await reader.evaluation(evaluation)).cost == 1.0


async def test_what_runs_has_spent_its_progress_and_wasted_nothing(
    ledger: Ledger, database: Database, reader: Reader
) -> None:
    evaluation = await planned(ledger)
    await claim(ledger, f"{evaluation}.1")
    await ledger.renew([Held(f"{evaluation}.1", 1, used(70))])
    assert await tokens(reader, evaluation) == (70, 0, 0)
    await let_expire(database, f"{evaluation}.1")
    await claim(ledger, f"{evaluation}.1")
    await ledger.renew([Held(f"{evaluation}.1", 2, used(5))])
    assert await tokens(reader, evaluation) == (75, 0, 0), "the next attempt may go on with it"


async def test_what_a_resumed_sample_has_twice_is_wasted_and_no_more(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger)
    await attempt(ledger, f"{evaluation}.1", "interrupted", 100)
    await attempt(ledger, f"{evaluation}.1", "succeeded", 50, result(140))
    assert await tokens(reader, evaluation) == (150, 140, 10)


async def test_what_was_begun_again_is_wasted(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger, 2)
    await attempt(ledger, f"{evaluation}.1", "interrupted", 100)
    await attempt(ledger, f"{evaluation}.1", "succeeded", 120, result(120))
    await attempt(ledger, f"{evaluation}.2", "succeeded", 30, result(30, 2))
    assert await tokens(reader, evaluation) == (250, 150, 100)


async def test_a_failure_is_wasted_as_soon_as_it_is_to_be_tried_again(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger)
    failed = (result(60, 1), result(40, 1001, errored=True))
    await attempt(ledger, f"{evaluation}.1", "failed", 100, *failed)
    assert await tokens(reader, evaluation) == (100, 60, 40), "the scored sample stands"
    await attempt(ledger, f"{evaluation}.1", "succeeded", 45, result(45, 1001))
    assert await tokens(reader, evaluation) == (145, 105, 40)


async def test_an_error_that_stands_is_a_result_and_what_went_before_it_is_wasted(
    ledger: Ledger, reader: Reader
) -> None:
    evaluation = await planned(ledger)
    for spent in (100, 110):
        await attempt(ledger, f"{evaluation}.1", "failed", spent, result(spent, errored=True))
    await report(ledger, evaluation, End("failed", usage={"m": {"total_tokens": 110}}))
    assert await tokens(reader, evaluation) == (210, 110, 100)


async def test_a_cancelled_attempt_is_wasted(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger)
    await attempt(ledger, f"{evaluation}.1", "cancelled", 100)
    assert await tokens(reader, evaluation) == (100, 0, 100)


async def test_a_result_that_came_after_the_last_progress_was_spent_too(ledger: Ledger, reader: Reader) -> None:
    evaluation = await planned(ledger)
    await attempt(ledger, f"{evaluation}.1", "interrupted", 60)
    await attempt(ledger, f"{evaluation}.1", "succeeded", 0, result(90))  # adopted from the attempt that was lost
    assert await tokens(reader, evaluation) == (90, 90, 0)


async def test_attempts_of_an_older_form_count(ledger: Ledger, database: Database, reader: Reader) -> None:
    evaluation = await planned(ledger, 2)
    await attempt(ledger, f"{evaluation}.1", "succeeded", 1, result(100))
    await attempt(ledger, f"{evaluation}.2", "succeeded", 1, result(10, 2))
    by_model = """UPDATE execution_attempts SET usage = CASE WHEN execution_id LIKE '%.1'
                  THEN jsonb_build_object('tokens', jsonb_build_object('total_tokens', 130), 'odd', 'x') END"""
    await database.run(text(by_model))
    assert await tokens(reader, evaluation) == (140, 110, 30), "a model may be called tokens; NULL is 0"


async def test_each_evaluation_of_a_page_has_its_own(ledger: Ledger, reader: Reader) -> None:
    evaluations = [await planned(ledger) for _ in range(3)]
    for n, evaluation in enumerate(evaluations, 1):
        await attempt(ledger, f"{evaluation}.1", "interrupted", n)
        await attempt(ledger, f"{evaluation}.1", "succeeded", 10 * n, result(10 * n))
    page = (await reader.evaluations()).evaluations
    assert {view.id: view.tokens.wasted for view in page} == {e: n for n, e in enumerate(evaluations, 1)}
    assert {view.id: view.tokens.spent for view in page} == {e: 11 * n for n, e in enumerate(evaluations, 1)}

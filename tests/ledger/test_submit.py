"""Submitting: one key, one evaluation, one plan."""

import asyncio
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Ledger
from app.spec import Spec
from tests.ledger import rows
from tests.ledger.conftest import CROWD
from tests.ledger.factories import SPEC, lost_reply, push

OTHER = Spec(task="proctor/programming", model="mockllm/other")


async def test_an_evaluation_begins_with_its_plan_and_no_other_execution(ledger: Ledger, database: Database) -> None:
    submitted = await ledger.submit(SPEC, "user@example.com")

    assert (submitted.created, submitted.same) == (True, True)
    evaluation = await rows.evaluation(database, submitted.evaluation_id)
    assert (evaluation.state, evaluation.remaining, evaluation.created_by) == ("running", 1, "user@example.com")
    assert await rows.executions(database, submitted.evaluation_id) == {"plan": "pending"}


async def test_the_plan_is_left_to_its_submitter_for_two_minutes(ledger: Ledger, database: Database) -> None:
    evaluation = (await ledger.submit(SPEC, "user@example.com")).evaluation_id

    assert (await rows.execution(database, f"{evaluation}.plan")).enqueues == 1
    assert 100 < await rows.seconds_until(database, f"{evaluation}.plan", "sweep_at") <= 120
    assert await ledger.take_due(10) == []


async def test_the_spec_comes_back_as_it_was_sent(ledger: Ledger) -> None:
    spec = Spec(task="t", model="m/n", task_args={"deep": [1, {"a": None}]}, limit=3, tags={"team": "blue"})
    evaluation = (await ledger.submit(spec, "user@example.com")).evaluation_id

    claimed = (await push(ledger, f"{evaluation}.plan")).spec
    assert claimed == spec
    assert claimed.digest() == spec.digest()


async def test_fifty_submits_with_one_key_make_one_evaluation_and_one_plan(ledger: Ledger, database: Database) -> None:
    for _ in range(5):
        key = uuid4().hex
        answers = await asyncio.gather(*(ledger.submit(SPEC, "user@example.com", key) for _ in range(CROWD)))

        (evaluation,) = {a.evaluation_id for a in answers}
        assert sorted(a.created for a in answers) == [False] * (CROWD - 1) + [True]
        assert all(a.same for a in answers)
        assert await rows.executions(database, evaluation) == {"plan": "pending"}
        assert (await rows.evaluation(database, evaluation)).remaining == 1


async def test_without_a_key_each_submit_is_an_evaluation_of_its_own(ledger: Ledger) -> None:
    answers = await asyncio.gather(*(ledger.submit(SPEC, "user@example.com") for _ in range(CROWD)))
    assert len({a.evaluation_id for a in answers}) == CROWD
    assert all(a.created for a in answers)


async def test_a_key_that_stands_for_another_spec_is_told_so(ledger: Ledger, database: Database) -> None:
    first = await ledger.submit(SPEC, "user@example.com", "key")
    second = await ledger.submit(OTHER, "user@example.com", "key")

    assert (second.evaluation_id, second.created, second.same) == (first.evaluation_id, False, False)
    assert (await push(ledger, f"{first.evaluation_id}.plan")).spec == SPEC


async def test_two_callers_may_use_the_same_key(ledger: Ledger) -> None:
    mine = await ledger.submit(SPEC, "me@example.com", "key")
    yours = await ledger.submit(OTHER, "you@example.com", "key")
    assert mine.evaluation_id != yours.evaluation_id
    assert yours.created


async def test_a_submit_whose_reply_was_lost_made_one_evaluation(
    ledger: Ledger, database: Database, engine: AsyncEngine
) -> None:
    with lost_reply(engine) as lost:
        submitted = await ledger.submit(SPEC, "user@example.com")

    assert len(lost) == 1
    assert submitted.created, "the caller must still enqueue the plan"
    assert [e.id for e in await rows.all_evaluations(database)] == [submitted.evaluation_id]
    assert await rows.executions(database, submitted.evaluation_id) == {"plan": "pending"}

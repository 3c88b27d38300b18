"""What the database refuses for good costs what was refused: the sample, its reason beside it. No lease is stranded."""

from typing import Any

import pytest
from sqlalchemy import text

from app.database.session import Database
from app.errors import DataRefused
from app.leases import Leases
from app.ledger import Held, Ledger, Settlement
from app.recording import record, settle
from app.runner.messages import SampleRef, SampleResult, ScoreValue
from app.settings import Settings
from tests.ledger import rows
from tests.ledger.factories import Ended, claim, planned, scored

RESULTS = text("SELECT sample_id, scores, usage, cost, error FROM sample_results ORDER BY sample_id")
ODD = "something odd"
REFUSING = [
    """/* test.odd */ CREATE FUNCTION refuse_odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      IF to_jsonb(NEW)::text LIKE '%something odd%' THEN RAISE 'it is odd' USING ERRCODE = '22023'; END IF;
      RETURN NEW;
    END $$""",
    *(
        f"CREATE TRIGGER no_odd BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_odd()"
        for table in ("task_executions", "execution_attempts", "sample_results")
    ),
]
RULE = """/* test.rule */ ALTER TABLE sample_results ADD CONSTRAINT no_sevens CHECK (scores::text NOT LIKE '%7%')"""


def answered(answer: str, sample: int = 1) -> Ended:
    ref, score = SampleRef(id=sample, epoch=1), ScoreValue(value=1, answer=answer)
    result = SampleResult(sample=ref, scores={"s": score}, usage={"m": {"input_tokens": 7}}, cost=0.5, log="a.eval")
    return result, "file:///logs/a.eval"


@pytest.fixture(autouse=True)
async def refusing(database: Database) -> None:
    """The tables take nothing that says ODD, as they would not take text that cannot be stored."""
    for statement in REFUSING:
        await database.run(text(statement))


async def test_a_result_that_is_refused_fails_its_sample_with_the_reason_and_keeps_its_cost(
    ledger: Ledger, database: Database
) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    with pytest.raises(DataRefused):
        await ledger.record(run.execution_id, run.attempt, [answered(ODD)])
    held, (kept, _) = await record(ledger, run.execution_id, run.attempt, answered(ODD))
    assert held
    (row,) = await database.run(RESULTS)
    assert (row.scores, row.usage, row.cost) == ({}, {"m": {"input_tokens": 7}}, 0.5)
    assert kept.error
    assert row.error["message"] == kept.error.message
    assert "The database does not take the sample's result" in row.error["message"]
    assert (row.error["error_class"], row.error["final"]) == ("evaluation", True)


async def test_a_number_that_is_none_is_refused_like_a_value(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await record(ledger, run.execution_id, run.attempt, scored(1, value=float("nan")))
    (row,) = await database.run(RESULTS)
    assert (row.scores, row.error["error_class"]) == ({}, "evaluation")


async def test_a_rule_of_the_tables_is_the_platforms_fault(ledger: Ledger, database: Database) -> None:
    await database.run(text(RULE))
    run = await claim(ledger, f"{await planned(ledger)}.1")
    await record(ledger, run.execution_id, run.attempt, scored(1, value=7))
    (row,) = await database.run(RESULTS)
    assert (row.error["error_class"], "no_sevens" in row.error["message"]) == ("infrastructure", True)


async def test_neighbours_of_a_refused_result_are_recorded_by_the_settle(ledger: Ledger, database: Database) -> None:
    run = await claim(ledger, f"{await planned(ledger, samples=3)}.1")
    samples = [scored(1), answered(ODD, 1001), scored(2001)]
    settlement, settled = await settle(ledger, run, Settlement("succeeded", samples=samples))
    assert settled
    assert (settled.verdict, settled.state, settlement.outcome) == ("recorded", "failed", "failed")
    found = {row.sample_id: row.error is None for row in await database.run(RESULTS)}
    assert found == {"1": True, "1001": False, "2001": True}
    execution = await rows.execution(database, run.execution_id)
    assert (execution.state, "does not take the sample's result" in execution.error["message"]) == ("failed", True)


@pytest.mark.parametrize(
    "odd",
    [
        Settlement("interrupted", usage={"tokens": 5, "step": ODD}),
        Settlement("interrupted", versions={"package": ODD}, crashed=True),
    ],
)
async def test_words_that_are_refused_do_not_change_how_an_attempt_ended(
    ledger: Ledger, database: Database, odd: Settlement
) -> None:
    run = await claim(ledger, f"{await planned(ledger)}.1")
    settlement, settled = await settle(ledger, run, odd)
    assert settled
    assert (settled.verdict, settled.state, settlement.crashed) == ("recorded", "pending", odd.crashed)
    (attempt,) = await rows.attempts(database, run.execution_id)
    assert (attempt.outcome, attempt.usage) == ("interrupted", {"tokens": 5} if odd.usage else None)


async def test_an_end_that_is_refused_is_a_failure_for_good_with_the_reason_and_what_was_spent(
    ledger: Ledger, database: Database
) -> None:
    """A plan of samples whose ids cannot be stored, say."""
    evaluation = await planned(ledger)
    run = await claim(ledger, f"{evaluation}.1")
    odd = Settlement("succeeded", runs=[[SampleRef(id=ODD, epoch=1)]], usage={"tokens": 5, "step": "s"}, cost=0.5)
    _, settled = await settle(ledger, run, odd)
    assert settled
    assert (settled.verdict, settled.state) == ("recorded", "failed")
    execution = await rows.execution(database, run.execution_id)
    assert "The database does not take what the attempt came to" in execution.error["message"]
    (attempt,) = await rows.attempts(database, run.execution_id)
    assert (attempt.usage, attempt.cost) == ({"tokens": 5}, 0.5)


async def test_one_attempts_words_do_not_cost_its_neighbours_their_leases(
    ledger: Ledger, settings: Settings, database: Database
) -> None:
    evaluation = await planned(ledger, 2)
    leases = Leases(ledger, settings)
    said: list[dict[str, Any]] = [{"tokens": 5, "step": ODD}, {"tokens": 6, "step": "fine"}]
    runs = [await claim(ledger, f"{evaluation}.{n}") for n in (1, 2)]
    with pytest.raises(DataRefused):
        await ledger.renew([Held(runs[0].execution_id, 1, said[0])])
    async with leases.hold(runs[0].execution_id, 1) as odd, leases.hold(runs[1].execution_id, 1) as even:
        odd.progress, even.progress = said
        assert await leases._renew_once()
        assert not odd.ended.done()
    found = [(await rows.execution(database, run.execution_id)).progress["tokens"] for run in runs]
    assert found == [5, 6]

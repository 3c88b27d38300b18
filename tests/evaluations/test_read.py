"""What the API shows of evaluations is of one moment."""

from typing import Any
from uuid import uuid4

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.evaluations.read import Reader
from app.ledger import Ledger, Settlement
from app.runner.messages import SampleRef
from app.spec import Spec


async def test_an_execution_that_is_planned_meanwhile_is_counted_whole_or_not_at_all(
    engine: AsyncEngine, database: Database, ledger: Ledger
) -> None:
    """Were results and executions counted by two statements, one that is recorded between them would be of an execution that
    was not there."""
    evaluation = (await ledger.submit(Spec(task="t", model="m"), "me")).evaluation_id
    claim = await ledger.claim(f"{evaluation}.plan", uuid4())
    assert claim
    plan = Settlement("succeeded", runs=[[SampleRef(id=n, epoch=1) for n in (1, 2)], [SampleRef(id=3, epoch=1)]])
    await ledger.settle(claim.execution_id, claim.attempt, plan)
    counted: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def see(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "jsonb_array_length" in statement or "sample_results.error" in statement:
            counted.append(statement)

    view = await Reader(database).evaluation(evaluation)
    assert (view.samples.total, view.samples.pending) == (3, 3)
    assert len(counted) == 1

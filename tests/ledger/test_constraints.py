"""The tables refuse rows that cannot be, whoever writes them."""

import pytest
from sqlalchemy import CheckConstraint, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.tables import metadata
from app.ledger import Ledger
from tests.ledger.factories import claim, planned, scored

IMPOSSIBLE = {
    "evaluations_state": "UPDATE evaluations SET state = 'lost', finished_at = now(), remaining = 0",
    "evaluations_remaining": "UPDATE evaluations SET remaining = -1",
    "evaluations_finished": "UPDATE evaluations SET finished_at = now()",
    "evaluations_ended": "UPDATE evaluations SET state = 'failed', finished_at = now(), remaining = 1",
    "task_executions_kind": "UPDATE task_executions SET kind = 'walk' WHERE kind = 'plan'",
    "task_executions_state": "UPDATE task_executions SET state = 'lost', sweep_at = now(), finished_at = NULL",
    "task_executions_samples": "UPDATE task_executions SET samples = NULL WHERE kind = 'run'",
    "task_executions_leased": "UPDATE task_executions SET lease_expires_at = NULL WHERE state = 'running'",
    "task_executions_claimed": "UPDATE task_executions SET claim_id = NULL WHERE state = 'running'",
    "task_executions_held": "UPDATE task_executions SET worker = NULL WHERE state = 'running'",
    "task_executions_swept": "UPDATE task_executions SET sweep_at = now() WHERE state = 'succeeded'",
    "task_executions_finished": "UPDATE task_executions SET finished_at = now() WHERE state = 'pending'",
    "task_executions_attempted": "UPDATE task_executions SET attempt = 0 WHERE state = 'running'",
    "task_executions_counts": "UPDATE task_executions SET crashes = -1",
    "execution_attempts_outcome": "UPDATE execution_attempts SET outcome = 'lost', ended_at = now()",
    "execution_attempts_ended": "UPDATE execution_attempts SET ended_at = NULL WHERE outcome = 'succeeded'",
    "sample_results_epoch": "UPDATE sample_results SET epoch = 0",
}
ALSO = {
    "task_executions_leased": "UPDATE task_executions SET lease_expires_at = now() WHERE state = 'pending'",
    "task_executions_swept": "UPDATE task_executions SET sweep_at = NULL WHERE state = 'pending'",
    "task_executions_finished": "UPDATE task_executions SET finished_at = NULL WHERE state = 'succeeded'",
    "task_executions_samples": "UPDATE task_executions SET samples = '[]' WHERE kind = 'plan'",
    "task_executions_counts": "UPDATE task_executions SET attempt = -1 WHERE state = 'pending'",
    "execution_attempts_ended": "UPDATE execution_attempts SET ended_at = now() WHERE outcome IS NULL",
}


async def test_an_impossible_row_is_refused(ledger: Ledger, engine: AsyncEngine, subtests: pytest.Subtests) -> None:
    evaluation = await planned(
        ledger, 2
    )  # a plan that succeeded, a run that runs and has a sample, one that is pending
    await claim(ledger, f"{evaluation}.1")
    await ledger.record(f"{evaluation}.1", 1, [scored(1)])
    async with engine.connect() as connection:
        for constraint, update in [*IMPOSSIBLE.items(), *ALSO.items()]:
            with subtests.test(update), pytest.raises(IntegrityError, match=f'check constraint "{constraint}_check"'):
                await connection.execute(text(update))


def test_every_check_of_the_tables_is_tried() -> None:
    constraints = [c for table in metadata.tables.values() for c in table.constraints]
    checks = {str(c.name) for c in constraints if isinstance(c, CheckConstraint)}
    assert {f"{name}_check" for name in IMPOSSIBLE} == checks

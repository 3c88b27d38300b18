"""Reading executions with their attempts, and what an explanation is made from: rows and the clock, in one statement."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, get_args
from uuid import UUID

from sqlalchemy import Row, Select, and_, case, func, select
from sqlalchemy.dialects.postgresql import aggregate_order_by

from app.database.session import Database
from app.database.tables import evaluations, execution_attempts, task_executions
from app.errors import NotFound
from app.evaluations.explain import OVERDUE, Execution, Rules
from app.evaluations.explain_evaluation import Evaluation
from app.evaluations.spend import spend, tokens_of
from app.evaluations.views import AttemptView, EvaluationExplanation, ExecutionView, ExplainedExecution
from app.runner.messages import SLIM_BECAUSE, ErrorClass
from app.spec import Spec

EXPLAINED = 5
"""Executions that an evaluation's explanation goes into, the worst. Ours: a screen."""

_UNTOUCHED = 6
"""The rank of what has not been begun: the least to worry about."""

_e, _a, _v = task_executions.c, execution_attempts.c, evaluations.c


@dataclass(frozen=True)
class History:
    database: Database
    rules: Rules

    async def execution(self, execution_id: str) -> ExecutionView:
        rows = await self.database.run(_executions().where(_e.id == execution_id))
        if not rows:
            raise NotFound(f"There is no execution {execution_id!r}.")
        return _explained(_execution(rows[0], self.rules))

    async def explanation(self, evaluation_id: UUID) -> EvaluationExplanation:
        counted = await self.database.run(_counted(evaluation_id))
        if not counted:
            raise NotFound(f"There is no evaluation {evaluation_id}.")
        spent = (await spend(self.database, [evaluation_id]))[evaluation_id]
        worst = await self.database.run(worst_first(evaluation_id))
        first = counted[0]
        evaluation = Evaluation(
            id=first.id,
            state=first.state,
            now=first.now,
            cancel_requested_at=first.cancel_requested_at,
            stopped_at=first.stopped_at,
            stop_reason=first.stop_reason,
            slim_because=first.slim_because,
            finished_at=first.finished_at,
            error=first.error,
            executions={(row.kind, row.execution_state): row.n for row in counted},
            tokens=spent.tokens,
            rules=self.rules,
            transcripts_expired_at=first.transcripts_expired_at,
            mixed=[mixture["name"] for mixture in first.mixed_versions or () if mixture["flagged"]],
        )
        begun = [row for row in worst if row.rank < _UNTOUCHED]
        return EvaluationExplanation(
            id=evaluation.id,
            state=evaluation.state,
            explanation=evaluation.explain(),
            executions=[_short(_execution(row, self.rules)) for row in begun or worst[:1]],
        )


def _executions() -> Select[Any]:
    """With their attempts, as of one moment of the database's clock."""
    attempt = func.to_jsonb(execution_attempts.table_valued())
    attempts = select(func.jsonb_agg(aggregate_order_by(attempt, _a.attempt))).where(_a.execution_id == _e.id)
    return select(
        task_executions,
        _v.state.label("evaluation_state"),
        _v.cancel_requested_at,
        _v.spec,
        _v.transcripts_expired_at.is_not(None).label("expired"),
        attempts.scalar_subquery().label("attempts"),
        func.clock_timestamp().label("now"),
    ).join(evaluations, _v.id == _e.evaluation_id)


def worst_first(evaluation_id: UUID) -> Select[Any]:
    """What an evaluation waits for, or what failed in it: the first few."""
    now = func.clock_timestamp()
    rank = case(
        (and_(_e.state == "running", _e.lease_expires_at <= now), 0),
        (_e.sweep_at <= now - timedelta(seconds=OVERDUE), 1),
        (_e.state == "failed", 2),
        (and_(_e.state == "pending", _e.attempt > 0), 3),
        (and_(_e.state == "running", _e.attempt > 1), 4),
        (_e.state == "running", 5),
        else_=_UNTOUCHED,
    )
    states = ("failed", "pending", "running")
    found = _executions().add_columns(rank.label("rank"))
    return (
        found.where(_e.evaluation_id == evaluation_id, _e.state.in_(states))
        .order_by(rank, _e.position)
        .limit(EXPLAINED)
    )


def _counted(evaluation_id: UUID) -> Select[Any]:
    """The evaluation, a row for each kind and state of its executions."""
    return (
        select(
            *(
                _v.id,
                _v.state,
                _v.cancel_requested_at,
                _v.stopped_at,
                _v.stop_reason,
                _v.finished_at,
                _v.error,
                _v.transcripts_expired_at,
                _v.mixed_versions,
                _v.results[SLIM_BECAUSE].as_string().label("slim_because"),
            ),
            *(_e.kind, _e.state.label("execution_state"), func.count().label("n")),
            func.clock_timestamp().label("now"),
        )
        .join(task_executions, _e.evaluation_id == _v.id)
        .where(_v.id == evaluation_id)
        .group_by(_v.id, _e.kind, _e.state)
    )


def _execution(row: Row[Any], rules: Rules) -> Execution:
    attempts = [_attempt(attempt, row) for attempt in row.attempts or ()]
    return Execution(
        view=ExecutionView.model_validate({**row._mapping, "attempts": attempts}),
        now=row.now,
        evaluation=row.evaluation_state,
        cancel_requested=row.cancel_requested_at is not None,
        max_failures=_max_failures(row.spec),
        rules=rules,
        expired=row.expired,
    )


def _max_failures(spec: Any) -> int:
    """Of a stored spec, which need not be one that this version takes."""
    stored = spec.get("max_failures") if isinstance(spec, Mapping) else None
    return stored if isinstance(stored, int) else int(Spec.model_fields["max_failures"].default)


def _attempt(attempt: Mapping[str, Any], row: Row[Any]) -> AttemptView:
    """What a running attempt has spent is in its execution's progress as yet; of a lost one only its last progress is
    known."""
    runs = row.state == "running" and attempt["attempt"] == row.attempt
    used = row.progress if runs else attempt["usage"]
    started = datetime.fromisoformat(attempt["started_at"])
    ended = datetime.fromisoformat(attempt["ended_at"]) if attempt["ended_at"] else row.now
    error_class = (attempt["error"] or {}).get("error_class")
    return AttemptView.model_validate(
        {
            **attempt,
            "seconds": (ended - started).total_seconds(),
            "error_class": error_class if error_class in get_args(ErrorClass) else None,
            "tokens": tokens_of(used),
            "model_calls": _number(used, "model_calls"),
            "cost": attempt["cost"] or _number(used, "cost") or None,
        }
    )


def _number(used: Mapping[str, Any] | None, name: str) -> Any:
    value = (used or {}).get(name)
    return value if isinstance(value, int | float) else None


def _explained(execution: Execution) -> ExecutionView:
    return execution.view.model_copy(update={"explanation": execution.explain()})


def _short(execution: Execution) -> ExplainedExecution:
    view = execution.view
    return ExplainedExecution(
        id=view.id,
        kind=view.kind,
        state=view.state,
        attempt=view.attempt,
        samples=view.samples,
        explanation=execution.explain(),
    )

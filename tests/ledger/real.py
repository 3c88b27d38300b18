"""The real ledger behind the same methods as its model, answering in the model's words."""

from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.database.tables import metadata
from app.ledger import (
    Cancelled,
    Claim,
    End,
    Enqueue,
    EvaluationState,
    Held,
    Ledger,
    Plan,
    Renewal,
    Settled,
    Settlement,
    ToReport,
)
from app.runner.messages import Failure, SampleRef, SampleResult, ScoreValue
from app.spec import Spec
from tests.ledger.factories import let_expire, make_due
from tests.ledger.model_state import Answer, Ended, Ending, Look, Rows
from tests.ledger.snapshot import FAN_OUT, LEASE, SWEEP, read

CLEAR = "; ".join(f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables))
"""With few rows much quicker than TRUNCATE."""
SPECS = [Spec(task="proctor/programming", model="mockllm/model", limit=n) for n in (1, 2)]
EVERYTHING = 1000
"""More than is ever due."""


@dataclass
class World:
    """`connection`: asyncpg's, to look on from aside; `run` carries out one call, on the event loop that all connections
    belong to; `did` counts how often each kind of step came to what, over all examples."""

    engine: AsyncEngine
    database: Database
    connection: Any
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    did: Counter[str] = field(default_factory=Counter)


class Real:
    def __init__(self, world: World) -> None:
        self._world = world
        self._names: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        world.did["example"] += 1
        self._granted: dict[str, Claim] = {}
        self._run(world.connection.execute(CLEAR))

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self._world.run(call)

    def _ledger(self, worker: str = "worker-1") -> Ledger:
        return Ledger(self._world.database, lease=LEASE, worker=worker, sweep=SWEEP)

    def _id(self, name: str) -> str:
        evaluation, dot, part = name.partition(".")
        return f"{self._ids[evaluation]}{dot}{part}"

    def _name(self, id: str) -> str:
        evaluation, dot, part = id.partition(".")
        return f"{self._names.get(evaluation, evaluation)}{dot}{part}"

    def submit(self, key: str | None, spec: int) -> tuple[str, bool, bool]:
        answer = self._run(self._ledger().submit(SPECS[spec], "user@example.com", key))
        id = str(answer.evaluation_id)
        name = self._names.setdefault(id, f"E{len(self._names) + 1}")
        self._ids[name] = id
        return name, answer.created, answer.same

    def claim(self, name: str, claim_id: int, worker: str) -> Answer | None:
        claim: Claim | None = self._run(self._ledger(worker).claim(self._id(name), UUID(int=claim_id)))
        if claim is None:
            return None
        self._granted[name] = claim
        return Answer(
            verdict=claim.verdict,
            attempt=claim.attempt,
            crashes=claim.crashes,
            failures=claim.failures,
            cancel=claim.cancel,
            kind=claim.kind,
            samples=tuple(str(sample.id) for sample in claim.samples),
            error=claim.error["message"] if claim.error else None,
            holder=None if claim.granted else claim.holder,
            state=None if claim.granted else claim.state,
        )

    def record(self, name: str, attempt: int, ended: Sequence[Ended]) -> bool:
        held: bool = self._run(self._ledger().record(self._id(name), attempt, _results(ended)))
        return held

    def renew(self, held: Iterable[Held]) -> list[Renewal]:
        answers: list[Renewal] = self._run(
            self._ledger().renew(replace(h, execution_id=self._id(h.execution_id)) for h in held)
        )
        return sorted((replace(a, execution_id=self._name(a.execution_id)) for a in answers), key=astuple)

    def settle(self, name: str, attempt: int, ending: Ending) -> Settled | None:
        settled: Settled | None = self._run(self._ledger().settle(self._id(name), attempt, _settlement(ending)))
        return settled and replace(settled, report=self._named(settled.report))

    def cancel(self, name: str) -> Cancelled:
        cancelled: Cancelled = self._run(self._ledger().cancel(UUID(self._id(name))))
        return replace(cancelled, report=self._named(cancelled.report))

    def retry(self, name: str) -> tuple[EvaluationState, int]:
        answer: tuple[EvaluationState, int] = self._run(self._ledger().retry(UUID(self._id(name))))
        return answer

    def take_due(self) -> set[Enqueue]:
        return {
            replace(t, execution_id=self._name(t.execution_id)) for t in self._run(self._ledger().take_due(EVERYTHING))
        }

    def enqueued(self, tasks: Iterable[Enqueue]) -> None:
        self._run(self._ledger().enqueued([replace(t, execution_id=self._id(t.execution_id)) for t in tasks]))

    def all_due(self) -> None:
        self._run(self._ledger().all_due())

    def let_expire(self, name: str) -> None:
        self._run(let_expire(self._world.database, self._id(name)))

    def make_due(self, name: str) -> None:
        self._run(make_due(self._world.database, self._id(name)))

    def scored(self, name: str) -> set[str]:
        return {sample for sample, _ in self._run(self._ledger().scored(self._granted[name]))}

    def interrupted(self, name: str) -> list[int]:
        attempts: list[int] = self._run(self._ledger().interrupted(self._granted[name]))
        return attempts

    def look(self, name: str) -> Look:
        ledger, evaluation = self._ledger(), UUID(self._id(name))
        plan: Plan = self._run(ledger.plan(evaluation))
        to_report: ToReport = self._run(ledger.to_report(evaluation))
        return Look(
            unfinished=[self._name(id) for id in self._run(ledger.unfinished(evaluation))],
            plan=(plan.state, plan.attempt, plan.error.message if plan.error else None),
            to_report=[(str(t.sample.id), t.log) for t in to_report.transcripts],
            missing=len(to_report.missing),
        )

    def rows(self) -> tuple[Rows, set[str]]:
        """As `snapshot.read` has them."""
        found: tuple[Rows, set[str]] = self._run(read(self._world.connection, self._names))
        return found

    def _named(self, task: Enqueue | None) -> Enqueue | None:
        return task and replace(task, execution_id=self._name(task.execution_id))


def _failure(message: str | None) -> Failure | None:
    return Failure(error_class="evaluation", message=message) if message else None


def _results(ended: Iterable[Ended]) -> list[tuple[SampleResult, str]]:
    return [(_result(one), one.log) for one in ended]


def _result(ended: Ended) -> SampleResult:
    error = _failure("The sample failed." if ended.errored else None)
    return SampleResult(
        sample=SampleRef(id=ended.sample, epoch=1), scores={"match": ScoreValue(value=1)}, error=error, log=ended.log
    )


def _settlement(ending: Ending) -> Settlement:
    runs = [[SampleRef(id=f"{n}.{k}", epoch=1) for k in range(size)] for n, size in enumerate(ending.runs, 1)]
    return Settlement(
        ending.outcome,
        error=_failure(ending.error),
        crashed=ending.crashed,
        max_failures=ending.max_failures,
        samples=_results(ending.samples),
        runs=runs,
        runs_due=FAN_OUT if ending.runs_later else 0,
        usage={"tokens": ending.mark},
        end=End(ending.end, results={"mark": ending.mark}),
    )


@contextmanager
def lost_commit(engine: AsyncEngine) -> Iterator[list[bool]]:
    """The next transaction is committed, but the connection drops before the reply arrives. Yields whether it was."""
    lost: list[bool] = []

    def drop(connection: Connection) -> None:
        if not lost:
            lost.append(True)
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.commit()
            raise ConnectionResetError("The reply was lost.")

    event.listen(engine.sync_engine, "commit", drop)
    try:
        yield lost
    finally:
        event.remove(engine.sync_engine, "commit", drop)

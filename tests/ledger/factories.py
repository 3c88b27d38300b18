"""Evaluations in the states that tests start from, and the ways to bring about what cannot be waited for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import ExceptionContext, event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Claim, End, Ledger, Outcome, Settled, Settlement
from app.runner.messages import Failure, SampleRef, SampleResult, ScoreValue
from app.spec import Spec

Ended = tuple[SampleResult, str]
"""A sample's result with the URL of its log, as `record` and `settle` take it."""

SPEC = Spec(task="proctor/programming", model="mockllm/model")
FAULT = Failure(error_class="evaluation", message="The task raised an error.")
SUCCEEDED = End("succeeded", results={"accuracy": 1})


def scored(sample: int | str = 1, *, epoch: int = 1, log: str = "a.eval", value: float = 1) -> Ended:
    """A sample that came to a score. The samples of run n of `planned` are n, n + 1000, n + 2000 …"""
    ref = SampleRef(id=sample, epoch=epoch)
    return SampleResult(sample=ref, scores={"match": ScoreValue(value=value)}, log=log), f"file:///logs/{log}"


def errored(sample: int | str = 1, *, epoch: int = 1, log: str = "a.eval") -> Ended:
    return SampleResult(sample=SampleRef(id=sample, epoch=epoch), error=FAULT, log=log), f"file:///logs/{log}"


def samples_of(runs: int, samples: int = 1) -> list[list[SampleRef]]:
    return [[SampleRef(id=n + 1000 * k, epoch=1) for k in range(samples)] for n in range(1, runs + 1)]


async def submitted(ledger: Ledger) -> UUID:
    """An evaluation whose plan is pending."""
    return (await ledger.submit(SPEC, "user@example.com")).evaluation_id


async def planned(ledger: Ledger, runs: int = 1, *, samples: int = 1) -> UUID:
    """An evaluation whose runs, `<evaluation>.1` and so on, are pending."""
    evaluation = await submitted(ledger)
    plan = await claim(ledger, f"{evaluation}.plan")
    settled = await settle(ledger, plan, runs=samples_of(runs, samples))
    assert (settled.verdict, settled.runs) == ("recorded", runs)
    return evaluation


async def run_out(ledger: Ledger, evaluation: UUID, *outcomes: Outcome) -> None:
    """Runs 1, 2 … each come to one of `outcomes`."""
    for n, outcome in enumerate(outcomes, 1):
        granted = await claim(ledger, f"{evaluation}.{n}")
        await settle(ledger, granted, outcome, samples=[scored(n)] if outcome == "succeeded" else ())


async def report(ledger: Ledger, evaluation: UUID, end: End = SUCCEEDED, outcome: Outcome = "succeeded") -> Settled:
    """The report is claimed and settled, and with it the evaluation is over."""
    return await settle(ledger, await claim(ledger, f"{evaluation}.report"), outcome, end=end)


async def ended(ledger: Ledger, *outcomes: Outcome, end: End = SUCCEEDED) -> UUID:
    """A terminal evaluation, its runs with these outcomes."""
    evaluation = await planned(ledger, len(outcomes))
    await run_out(ledger, evaluation, *outcomes)
    await report(ledger, evaluation, end)
    return evaluation


async def claim(ledger: Ledger, execution_id: str) -> Claim:
    """A new push's claim, which is granted."""
    claim = await push(ledger, execution_id)
    assert claim.granted, claim
    return claim


async def push(ledger: Ledger, execution_id: str, claim_id: UUID | None = None) -> Claim:
    claim = await ledger.claim(execution_id, claim_id or uuid4())
    assert claim is not None
    return claim


async def settle(
    ledger: Ledger, claim: Claim, outcome: Outcome = "succeeded", *, samples: Sequence[Ended] = (), **more: Any
) -> Settled:
    settlement = Settlement(outcome, samples=samples, **more)
    settled = await ledger.settle(claim.execution_id, claim.attempt, settlement)
    assert settled is not None
    return settled


async def let_expire(database: Database, execution_id: str) -> None:
    """Nobody renewed for long: the lease ended a second ago."""
    past = "UPDATE task_executions SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE id = :id"
    await database.run(text(past), {"id": execution_id})


async def make_due(database: Database, execution_id: str) -> None:
    past = "UPDATE task_executions SET sweep_at = clock_timestamp() - interval '1 s' WHERE id = :id"
    await database.run(text(past), {"id": execution_id})


async def end_days_ago(database: Database, evaluation: UUID, days: float) -> None:
    past = "UPDATE evaluations SET finished_at = clock_timestamp() - make_interval(secs => :seconds) WHERE id = :id"
    await database.run(text(past), {"id": evaluation, "seconds": days * 86_400})


@contextmanager
def lost_reply(engine: AsyncEngine) -> Iterator[list[str]]:
    """The next statement is carried out and committed, but the connection drops before its reply arrives. Yields the
    statements that this happened to."""
    lost: list[str] = []

    def drop(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not lost:
            lost.append(statement)
            raise ConnectionResetError("The reply was lost.")

    event.listen(engine.sync_engine, "after_cursor_execute", drop)
    try:
        yield lost
    finally:
        event.remove(engine.sync_engine, "after_cursor_execute", drop)


@contextmanager
def watched(engine: AsyncEngine) -> Iterator[list[str]]:
    """Yields the errors that the database answers with, those too that are ridden out by trying again: a deadlock is a
    wrong order of locks even where nobody notices."""
    errors: list[str] = []

    def note(context: ExceptionContext) -> None:
        errors.append(str(context.original_exception))

    event.listen(engine.sync_engine, "handle_error", note)
    try:
        yield errors
    finally:
        event.remove(engine.sync_engine, "handle_error", note)

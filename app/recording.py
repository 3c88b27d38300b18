"""Writes that the database may refuse for good: such a refusal costs what was refused, and nothing beside it.

A result that it does not take becomes that sample's error, with the database's reason; its neighbours are recorded. An end
that it does not take is settled as a failure in a plain form, so that the lease is not stranded and no attempt follows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import structlog

from app.errors import DataRefused
from app.ledger import Claim, End, Ledger, Settled, Settlement
from app.runner.messages import Failure, SampleResult
from app.versions import Versions

Recorded = tuple[SampleResult, str]
"""A result with the URL of its log."""
log = structlog.get_logger(__name__)


async def record(
    ledger: Ledger,
    execution_id: str,
    attempt: int,
    sample: Recorded,
    versions: Versions | None = None,
    earlier_versions: list[Versions] | None = None,
) -> tuple[bool, Recorded]:
    """Whether the attempt is still the execution's; and what stands of the sample."""
    try:
        return await ledger.record(execution_id, attempt, [sample], versions, earlier_versions), sample
    except DataRefused as refused:
        error = refused
    result, url = sample
    about = {"sample": str(result.sample.id), "epoch": result.sample.epoch}
    log.error("the database refuses a result: its sample fails", **about, reason=str(error))
    for plain in _plainer(result, _failure("the sample's result", error)):
        result = plain
        try:
            return await ledger.record(execution_id, attempt, [(plain, url)]), (plain, url)
        except DataRefused as refused:
            log.warning("the database refuses a plainer form of it, too", **about, reason=str(refused))
    return True, (result, url)


async def settle(ledger: Ledger, claim: Claim, settlement: Settlement) -> tuple[Settlement, Settled | None]:
    """What was settled in the end, and how."""
    execution_id, attempt = claim.execution_id, claim.attempt
    try:
        return settlement, await ledger.settle(execution_id, attempt, settlement)
    except DataRefused as refused:
        error = refused
    log.error("the database refuses what the attempt came to: part by part", reason=str(error))
    recorded = [(await record(ledger, execution_id, attempt, sample))[1] for sample in settlement.samples]
    failures = [
        stands.error
        for (stands, _), (given, _) in zip(recorded, settlement.samples, strict=True)
        if stands is not given and stands.error
    ]
    kept = replace(settlement, samples=recorded)
    for plain in _plainer_ends(kept, failures, _failure("what the attempt came to", error)):
        settlement = plain
        try:
            return plain, await ledger.settle(execution_id, attempt, plain)
        except DataRefused as refused:
            error = refused
            log.warning("the database refuses a plainer form of it, too", reason=str(refused))
    raise error


def _failure(what: str, refused: DataRefused) -> Failure:
    error_class = "evaluation" if refused.by_content else "infrastructure"
    return Failure.model_validate(
        {"error_class": error_class, "message": f"The database does not take {what}: {refused}", "final": True}
    )


def _plainer(result: SampleResult, failure: Failure) -> Iterator[SampleResult]:
    """As an error: with what it has cost, and without."""
    bare = SampleResult(sample=result.sample, error=failure, log=result.log)
    yield bare.model_copy(update={"usage": result.usage, "cost": result.cost, "duration": result.duration})
    yield bare


def _plainer_ends(settlement: Settlement, failures: list[Failure], failure: Failure) -> Iterator[Settlement]:
    """`failures`: of the samples that were refused. With what stands of the samples; then without
    what only tells more; then as a failure for good that has nothing but its reason and what was spent."""
    rest = settlement
    if failures and settlement.outcome in ("succeeded", "failed"):
        rest = replace(rest, outcome="failed", error=failures[0], max_failures=1)
    spent = numbers(settlement.usage)
    if settlement.samples:
        yield rest
    yield replace(rest, usage=spent, versions=None, earlier_versions=None)
    yield Settlement(
        "failed",
        error=failure,
        usage=spent,
        cost=settlement.cost,
        cause=settlement.cause,
        end=End("failed", error=failure),
    )


def numbers(progress: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of what was spent, the counts: the rest is for people, and may be anybody's words."""
    return progress and {name: value for name, value in progress.items() if isinstance(value, int | float)}

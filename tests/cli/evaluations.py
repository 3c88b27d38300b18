"""Evaluations in the states that the command line shows."""

from typing import Any
from uuid import UUID, uuid4

from app.ledger import End, EvaluationState, Ledger, Outcome, Settlement
from app.runner.messages import Failure, SampleRef, SampleResult, ScoreValue
from app.spec import Spec

FAULT = Failure(error_class="model", message="RateLimitError: slow down [/]\nsecond line \x1b[31mred")
LOG = "file:///logs/merged.eval"


def metric(name: str, value: float) -> dict[str, Any]:
    return {"name": name, "value": value, "params": {}}


RESULTS = {
    "total_samples": 2,
    "completed_samples": 2,
    "scores": [
        {
            "name": "verify",
            "scorer": "verify",
            "reducer": None,
            "scored_samples": 2,
            "unscored_samples": 0,
            "params": {},
            "metrics": {"accuracy": metric("accuracy", 0.5), "stderr": metric("stderr", 0.35355)},
        }
    ],
}


async def submitted(ledger: Ledger, **spec: Any) -> UUID:
    """Its plan is pending."""
    return (
        await ledger.submit(Spec(**{"task": "proctor/programming", "model": "mockllm/model", **spec}), "user")
    ).evaluation_id


async def planned(ledger: Ledger, *samples: int | str, **spec: Any) -> UUID:
    """Its runs, one for each of `samples`, are pending."""
    evaluation = await submitted(ledger, **spec)
    runs = [[SampleRef(id=sample, epoch=1)] for sample in samples]
    await settle(ledger, f"{evaluation}.plan", runs=runs)
    return evaluation


async def ended(
    ledger: Ledger, state: EvaluationState = "succeeded", samples: tuple[int | str, ...] = (1, 2), **spec: Any
) -> UUID:
    evaluation = await planned(ledger, *samples, **spec)
    await end(ledger, evaluation, state, samples)
    return evaluation


async def end(
    ledger: Ledger, evaluation: UUID, state: EvaluationState = "succeeded", samples: tuple[int | str, ...] = (1, 2)
) -> None:
    """All runs come to a score, or to `FAULT` in a failed one; then the report ends the evaluation."""
    failed = state == "failed"
    for number, sample in enumerate(samples, 1):
        outcome: Outcome = "failed" if failed else "succeeded"
        result = errored(sample) if failed else scored(sample)
        await settle(ledger, f"{evaluation}.{number}", outcome, samples=[result], error=FAULT if failed else None)
    over = End(state, RESULTS, {"m": {"total_tokens": 1234}}, FAULT if failed else None, LOG)
    await settle(ledger, f"{evaluation}.report", end=over)


async def settle(ledger: Ledger, execution: str, outcome: Outcome = "succeeded", **settlement: Any) -> None:
    claim = await ledger.claim(execution, uuid4())
    assert claim is not None
    assert claim.granted
    settled = await ledger.settle(execution, claim.attempt, Settlement(outcome, **settlement))
    assert settled is not None
    assert settled.verdict == "recorded"


def scored(sample: int | str) -> tuple[SampleResult, str]:
    result = SampleResult(
        sample=SampleRef(id=sample, epoch=1),
        scores={"verify": ScoreValue(value="C")},
        usage={"m": {"input_tokens": 600, "output_tokens": 17, "total_tokens": 617}},
        duration=72.5,
        log="a.eval",
    )
    return result, "file:///logs/a.eval"


def errored(sample: int | str) -> tuple[SampleResult, str]:
    return SampleResult(sample=SampleRef(id=sample, epoch=1), error=FAULT, log="a.eval"), "file:///logs/a.eval"

"""What the end of a child means for the ledger: from what it said to a `Settlement`. No I/O here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

from app.ledger import Claim, End, Outcome, Settlement
from app.runner.messages import NOT_KEPT, Failure, Planned, Progress, Reported, SampleRef, SampleResult, Started
from app.versions import Mixture, Versions

Stopped = Literal["cancel", "stop", "deadline", "drain", "unreachable"]
"""Why the service itself ended a child: the user's wish, too many errored samples, the push's end, the worker's end, no
renewal for too long."""


@dataclass(slots=True)
class Heard:
    """What a child has said so far: the `versions` that it runs by, and `earlier_versions` those by which the state was made
    that it went on from; how many `checkpoints` its samples have reached (or why none); `whole`: whether the task decides
    which of its samples end; `samples` with the URL of their log, and of how many the artifacts
    have the log; `failure` its own word on how it went, `crash` why it ended
    without one, and `writer_failed` why it had to; `waited` whether a sample of its waited long for a sandbox; and what was
    seen of it: `start_seconds` until it said its first word, and its largest resident set."""

    started: Started | None = None
    versions: Versions = field(default_factory=dict)
    earlier_versions: list[Versions] = field(default_factory=list)
    no_checkpoints: str | None = None
    whole: bool = False
    progress: Progress | None = None
    planned: Planned | None = None
    reported: Reported | None = None
    checkpoints: int = 0
    samples: list[tuple[SampleResult, str]] = field(default_factory=list)
    stored: int = 0
    failure: Failure | None = None
    crash: str | None = None
    writer_failed: str | None = None
    waited: bool = False
    start_seconds: float | None = None
    memory_peak_bytes: int | None = None

    def logs(self) -> list[str]:
        """Names of the logs that hold its samples; mostly one."""
        return list(dict.fromkeys(result.log for result, _ in self.samples))

    def leave_unstored(self) -> None:
        """What the artifacts have no log of cannot be recorded: the row would point at nothing."""
        del self.samples[self.stored :]


def foreseen(claim: Claim) -> Settlement | None:
    """The end of an attempt that need not run at all."""
    if claim.cancel and claim.kind != "report":
        return Settlement("cancelled", error=Failure(error_class="cancelled", message="The evaluation was cancelled."))
    if claim.refused:
        remedy = "Retry it under a version that does, or submit it anew."
        refused = Failure(error_class="evaluation", message=f"{claim.refused} {remedy}", final=True)
        return Settlement("failed", error=refused, end=End("failed", error=refused))
    return None


def given_up(claim: Claim, max_crashes: int) -> Settlement | None:
    """The end of an execution that was lost too often, and of which no attempt has left an outcome."""
    if claim.crashes < max_crashes:
        return None
    last = f" The last time: {claim.error['message']}" if claim.error else ""
    failure = Failure(
        error_class="infrastructure",
        message=f"Its worker or its child process was lost {claim.crashes} times without progress.{last}",
    )
    return Settlement("failed", error=failure, end=End("failed", error=failure))


def stopped(reason: Stopped, heard: Heard, seconds: float) -> Settlement:
    """The service ended the child. What was finished stays. Only a deadline is charged, and only to an attempt that has
    come no further than the one before: the next would not either."""
    match reason:
        case "cancel":
            return _settlement(heard, "cancelled", Failure(error_class="cancelled", message="It was cancelled."))
        case "stop":
            message = "It was stopped: more samples of its evaluation errored than fail_on_error allows."
            return _settlement(heard, "cancelled", Failure(error_class="evaluation", message=message))
        case "deadline":
            message = f"It reached the push's deadline after {seconds:.0f} s."
            if heard.checkpoints or heard.waited or any(result.error is None for result, _ in heard.samples):
                return _settlement(
                    heard, "interrupted", Failure(error_class="infrastructure", message=message), cause=reason
                )
            why = f" ({heard.no_checkpoints})" if heard.no_checkpoints else ""
            message = f"{message} It has no checkpoint to resume from{why}, so starting over would meet it again."
            return _failed(heard, Failure(error_class="limit", message=message, final=True), max_failures=1)
        case "drain":
            message = "The worker was told to stop."
        case "unreachable":
            message = "The database did not answer for too long."
    return _settlement(heard, "interrupted", Failure(error_class="infrastructure", message=message), cause=reason)


def crashed(heard: Heard) -> Settlement:
    """The child ended without a last word: nobody's fault yet, but it counts towards `max_crashes`; not if it was the way to
    tell that failed, which is ours."""
    if heard.writer_failed is not None:
        message = f"The child could not tell what it did, and was ended: {heard.writer_failed}"
        return _settlement(
            heard, "interrupted", Failure(error_class="infrastructure", message=message), cause="messages"
        )
    failure = Failure(error_class="infrastructure", message=heard.crash or "The child process ended without a word.")
    return _settlement(heard, "interrupted", failure, crashed=True, cause="crash")


def without_artifacts(heard: Heard, reason: str, *, away: bool) -> Settlement:
    """The store did not take, or give, what the attempt needs. What it has of it stands. `away`: it takes nothing else
    either, so that it is to blame; what it refuses alone it may refuse for ever, and that counts towards `max_crashes`."""
    heard.leave_unstored()
    what = "The artifact store did not answer for too long" if away else "The artifact store does not take a file"
    failure = Failure(error_class="infrastructure", message=f"{what}: {reason}")
    return _settlement(heard, "interrupted", failure, crashed=not away, cause="artifacts")


def planned(claim: Claim, heard: Heard, *, max_samples: int, runs_due: float) -> Settlement:
    plan = heard.planned
    if heard.failure or plan is None:
        return _come_to_nothing(claim, heard)
    if len(plan.samples) > max_samples:
        message = f"It has {len(plan.samples)} samples × epochs, more than the {max_samples} allowed: use `limit`."
        return _failed(heard, Failure(error_class="limit", message=message, final=True), max_failures=1)
    size = len(plan.samples) if plan.whole else claim.spec.samples_per_execution
    starts = range(0, len(plan.samples), max(size, 1))
    runs = [plan.samples[i : i + size] for i in starts]
    all_digests = list(islice(cycle(plan.digests), len(plan.samples)))  # those of the dataset, for each epoch
    digests = [all_digests[i : i + size] for i in starts] if all_digests else []
    return _settlement(heard, "succeeded", runs=runs, digests=digests, error_limit=plan.error_limit, runs_due=runs_due)


def ran(claim: Claim, heard: Heard, wanted: Iterable[SampleRef] = ()) -> Settlement:
    """Succeeded only if each of the `wanted` samples has its score. Which of its samples a task ends that stops early by
    itself hangs on the scores of all: an attempt that has finished takes the place of what earlier ones came to."""
    errors = [result.error for result, _ in heard.samples if result.error]
    failure = heard.failure or (errors[0] if errors else None) or _lacking(wanted, heard)
    replace = heard.whole and heard.failure is None
    if failure is None:
        return _settlement(heard, "succeeded", replace=replace)
    return _failed(heard, failure, _allowed(claim, failure), replace=replace)


def _lacking(wanted: Iterable[SampleRef], heard: Heard) -> Failure | None:
    """The child itself looks at those of a task that decides which of them end."""
    if heard.whole or not (lacking := unheard(wanted, heard)):
        return None
    message = f"The run ended, but of {len(lacking)} of its samples no result came, such as of {lacking[0].id!r}."
    return Failure(error_class="infrastructure", message=message)


def reported(
    claim: Claim, heard: Heard, missing: Sequence[Failure], log: str | None, differing: Sequence[Mixture] = ()
) -> Settlement:
    """`missing`: why samples have no result at all; the report has counted them as errors. `differing`: what was not the
    same for all that have one."""
    report = heard.reported
    if heard.failure or report is None:
        return _come_to_nothing(claim, heard)
    failure, stop = report.failure, claim.stop_reason
    missing = [one for one in missing if one.message != stop]
    if stop:
        more = f" {failure.message}" if failure else ""
        failure = Failure(error_class="evaluation", message=f"{stop}{more}", final=True)
    if failure and missing:
        failure = failure.model_copy(update={"message": f"{failure.message} {_without_result(missing).message}"})
    mixed_versions = [mixture.model_dump() for mixture in differing] or None
    end = End("failed" if failure else "succeeded", report.results, report.usage, failure, log, mixed_versions)
    return _settlement(heard, "succeeded", end=end)


def errored(claim: Claim, heard: Heard) -> int:
    """Samples of an attempt that goes on whose error is final: it is the last one allowed, or no other could help."""
    last = claim.failures + 1 >= claim.spec.max_failures
    return sum(1 for result, _ in heard.samples if result.error and (last or result.error.final))


def nothing_to_report(missing: Sequence[Failure], plan_error: Failure | None) -> Settlement:
    """The evaluation ends without any result: its plan failed, or found nothing, or no sample came to a result."""
    none = Failure(error_class="evaluation", message="The task listed no samples.")
    failure = plan_error or (_without_result(missing) if missing else none)
    return Settlement("succeeded", end=End("failed", error=failure))


def unheard(wanted: Iterable[SampleRef], heard: Heard) -> list[SampleRef]:
    """Those of `wanted` that have not ended yet."""
    have = {result.sample for result, _ in heard.samples}
    return [sample for sample in wanted if sample not in have]


def _without_result(missing: Sequence[Failure]) -> Failure:
    count = "One sample has" if len(missing) == 1 else f"{len(missing)} samples have"
    return Failure(error_class=missing[0].error_class, message=f"{count} no result. {missing[0].message}")


def _come_to_nothing(claim: Claim, heard: Heard) -> Settlement:
    nothing = Failure(error_class="infrastructure", message=f"The {claim.kind} came to no result.")
    failure = heard.failure or nothing
    return _failed(heard, failure, _allowed(claim, failure))


def _failed(heard: Heard, failure: Failure, max_failures: int, **more: Any) -> Settlement:
    end = End("failed", error=failure)
    return _settlement(heard, "failed", failure, max_failures=max_failures, end=end, **more)


def _allowed(claim: Claim, failure: Failure) -> int:
    return 1 if failure.final else claim.spec.max_failures


def _settlement(heard: Heard, outcome: Outcome, error: Failure | None = None, **more: Any) -> Settlement:
    return Settlement(
        outcome,
        error=error,
        samples=heard.samples,
        usage=usage_of(heard),
        cost=cost_of(heard),
        versions=heard.versions or None,
        earlier_versions=heard.earlier_versions or None,
        **more,
    )


def usage_of(heard: Heard) -> dict[str, Any] | None:
    """What this attempt itself has spent. A sample that was resumed also counts what earlier attempts spent on it."""
    return heard.progress.model_dump(exclude=NOT_KEPT) if heard.progress else None


def cost_of(heard: Heard) -> float | None:
    return (heard.progress.cost or None) if heard.progress else None

"""What must hold whatever went wrong. A pure function over the history: it asks nobody, and changes nothing."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

from tests.drills.chaos.history import Attempt, Execution, History
from tests.drills.chaos.indexed import TERMINAL, Indexed
from tests.drills.chaos.results import (
    results_are_from_who_held_it,
    results_are_right,
    the_merged_log_has_them_all,
    the_sums_are_right,
)
from tests.drills.chaos.traces import nothing_is_left_behind, what_is_spent_is_explained
from tests.drills.chaos.violation import Violation

SAME_MOMENT = 0.25
"""Seconds between two times that one statement takes: it looks at the clock more than once."""


def check(history: History) -> list[Violation]:
    indexed = Indexed(history)
    return [violation for rule in RULES for violation in rule(indexed)]


def what_was_promised_has_ended(h: Indexed) -> Iterator[Violation]:
    for submission in h.history.submissions:
        evaluation = h.evaluations.get(submission.evaluation)
        if evaluation is None:
            yield Violation("lost", submission.evaluation, "it was promised, and is not there")
        elif evaluation.state not in TERMINAL:
            yield Violation(
                "lost", submission.evaluation, f"it has not ended; {evaluation.remaining} executions remain"
            )
    for evaluation in h.history.evaluations:
        if evaluation.id not in h.submissions:
            yield Violation("doubled", evaluation.id, "nobody was promised it")
    for execution in h.history.executions:
        if execution.state not in TERMINAL:
            yield Violation("lost", execution.id, f"it is {execution.state}")


def it_ended_as_it_must(h: Indexed) -> Iterator[Violation]:
    """Failing by the rule of three crashes is allowed: kills come fast here."""
    for submission in h.history.submissions:
        evaluation = h.evaluations.get(submission.evaluation)
        if evaluation is None or evaluation.state not in TERMINAL:
            continue
        if evaluation.cancel_requested_at is not None:
            must = ["cancelled"]
        elif h.given_up(evaluation.id) and not _lenient(h, evaluation.id):
            must = ["failed"]
        else:
            must = [submission.ends]
        if evaluation.cancel_requested_at is not None and submission.cancelled is None:
            yield Violation("failed", evaluation.id, "nobody asked to cancel it")
        if evaluation.state not in must:
            why = (evaluation.error or {}).get("message")
            yield Violation("failed", evaluation.id, f"it {evaluation.state} instead of {must[0]}: {why}")


def workers_live(h: Indexed) -> Iterator[Violation]:
    for worker in h.history.died:
        yield Violation("failed", worker, "the worker ended by itself")


def every_sample_has_one_result(h: Indexed) -> Iterator[Violation]:
    for submission in h.history.submissions:
        planned = h.planned(submission.evaluation)
        for sample, times in Counter(sample for sample, _ in planned).items():
            if times > 1:
                yield Violation("doubled", submission.evaluation, f"sample {sample} is in {times} executions")
        plan = h.executions.get(f"{submission.evaluation}.plan")
        if plan and plan.state == "succeeded" and planned and len(planned) != submission.samples:
            yield Violation("lost", plan.id, f"it planned {len(planned)} samples of {submission.samples}")
        have = Counter((r.sample, r.epoch) for r in h.results_of[submission.evaluation])
        for sample, run in planned:
            if run.state == "succeeded" and not have[sample]:
                yield Violation("lost", run.id, f"it succeeded, and sample {sample} has no result")
        for sample, times in have.items():
            if times > 1 or sample not in {sample for sample, _ in planned}:
                yield Violation("doubled", submission.evaluation, f"sample {sample} has {times} results")


def what_succeeded_did_so_once(h: Indexed) -> Iterator[Violation]:
    for execution in h.history.executions:
        attempts = h.attempts_at[execution.id]
        outcomes = Counter(attempt.outcome for attempt in attempts)
        yield from _told_in_order(execution, attempts)
        evaluation = h.evaluations.get(execution.evaluation)
        overtaken = execution.kind == "report" and evaluation is not None and evaluation.cancel_requested_at is not None
        most = 2 if overtaken else 1  # a report that a cancellation came to late is asked for again
        if not (execution.state == "succeeded") <= outcomes["succeeded"] <= most:
            yield Violation(
                "doubled", execution.id, f"it is {execution.state}, and succeeded {outcomes['succeeded']} times"
            )
        if outcomes["succeeded"] and execution.state != "succeeded":
            yield Violation("doubled", execution.id, f"it is {execution.state}, and an attempt at it succeeded")


def _told_in_order(execution: Execution, attempts: list[Attempt]) -> Iterator[Violation]:
    numbers = [attempt.attempt for attempt in attempts]
    if numbers != list(range(1, execution.attempt + 1)):
        yield Violation(
            "held twice", execution.id, f"its attempts are {numbers}, and the last should be {execution.attempt}"
        )
    for earlier, later in pairwise(attempts):
        if earlier.ended_at is None or later.started_at < earlier.ended_at - SAME_MOMENT:
            yield Violation(
                "held twice", execution.id, f"attempt {later.attempt} began before {earlier.attempt} was over"
            )
    if execution.state in TERMINAL and attempts and attempts[-1].ended_at is None:
        yield Violation("held twice", execution.id, f"it is over, and attempt {numbers[-1]} at it is not")


def the_report_comes_last(h: Indexed) -> Iterator[Violation]:
    for evaluation in h.history.evaluations:
        work = [e for e in h.executions_of[evaluation.id] if e.kind != "report"]
        reported = [a.started_at for a in h.attempts_at[f"{evaluation.id}.report"] if a.outcome == "succeeded"]
        for execution in work:
            if execution.finished_at is not None and reported and reported[-1] < execution.finished_at:
                yield Violation("counts", evaluation.id, f"it was reported before {execution.id} was over")


def only_what_is_over_is_acknowledged(h: Indexed) -> Iterator[Violation]:
    for push in h.history.pushes:
        if push.status is None or not 200 <= push.status < 300:
            continue
        execution = h.executions.get(push.execution)
        over = execution is not None and _over_since(h, execution)
        if execution is None or over is None:
            yield Violation(
                "acknowledged early", push.execution, f"{push.worker} answered {push.status}; it is not over"
            )
        elif over > push.ended:
            early = f"{push.worker} answered {push.status}, {over - push.ended:.3f} s before it was over"
            yield Violation("acknowledged early", push.execution, early)


def _over_since(h: Indexed, execution: Execution) -> float | None:
    """When first. A report can be over more than once, if a cancellation came to late for it."""
    if execution.kind != "report":
        return execution.finished_at
    ends = [a.ended_at for a in h.attempts_at[execution.id] if a.outcome in TERMINAL and a.ended_at is not None]
    return min(ends, default=execution.finished_at)


def _lenient(h: Indexed, evaluation: str) -> bool:
    """Its failed samples do not fail it."""
    return h.submissions[evaluation].ends == "succeeded" and h.submissions[evaluation].errored > 0


RULES: tuple[Callable[[Indexed], Iterator[Violation]], ...] = (
    what_was_promised_has_ended,
    it_ended_as_it_must,
    workers_live,
    every_sample_has_one_result,
    what_succeeded_did_so_once,
    the_report_comes_last,
    only_what_is_over_is_acknowledged,
    results_are_from_who_held_it,
    the_merged_log_has_them_all,
    results_are_right,
    the_sums_are_right,
    what_is_spent_is_explained,
    nothing_is_left_behind,
)

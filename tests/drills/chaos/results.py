"""Rules about results: whose they are, where their transcripts lie, what they say, and that the sums are theirs."""

from collections import defaultdict
from collections.abc import Iterator
from math import isclose
from statistics import mean
from typing import Any

from app.artifacts import TRANSCRIPTS
from tests.drills.chaos.history import Evaluation, Result
from tests.drills.chaos.indexed import Indexed
from tests.drills.chaos.violation import Violation

SCORER = "known"
OUTCOME = "outcome.json"
SAME_MOMENT = 0.25


def score_of(sample: str) -> float:
    """As the drill's tasks score."""
    return int(sample) % 7 / 7


def results_are_from_who_held_it(h: Indexed) -> Iterator[Violation]:
    """The attempt had begun, no later one had, and its transcript is in its own folder; or in that of an earlier attempt
    that had kept its outcome."""
    for result in h.history.results:
        what = f"{result.execution} sample {result.sample} epoch {result.epoch}"
        attempts = h.attempts_at[result.execution]
        mine = next((a for a in attempts if a.attempt == result.attempt), None)
        later = next((a for a in attempts if a.attempt > result.attempt), None)
        if mine is None or result.recorded_at < mine.started_at:
            yield Violation("stale", what, f"attempt {result.attempt} recorded it before it began")
        elif later is not None and later.started_at <= result.recorded_at:
            seconds = result.recorded_at - later.started_at
            yield Violation(
                "stale", what, f"attempt {result.attempt} recorded it {seconds:.3f} s after {later.attempt} began"
            )
        elif mine.ended_at is not None and mine.ended_at + SAME_MOMENT < result.recorded_at:
            yield Violation("stale", what, f"attempt {result.attempt} recorded it after it had ended")
        yield from _transcript(h, result, what)


def _transcript(h: Indexed, result: Result, what: str) -> Iterator[Violation]:
    path = h.path(result.transcript)
    evaluation, execution, attempt, *_ = [*path.removeprefix(f"{TRANSCRIPTS}/").split("/"), "", "", ""]
    if (evaluation, execution) != (result.evaluation, result.execution) or not attempt.isdigit():
        yield Violation("artifact", what, f"its transcript is another's: {path}")
    elif int(attempt) > result.attempt:
        yield Violation("artifact", what, f"attempt {result.attempt} points at what attempt {attempt} has written")
    elif int(attempt) < result.attempt and f"{evaluation}/{execution}/{attempt}/{OUTCOME}" not in h.files:
        yield Violation(
            "artifact", what, f"attempt {result.attempt} points at attempt {attempt}, which kept no outcome"
        )
    logged = h.logged.get((path, result.sample, result.epoch))
    if logged is None:
        there = "does not hold the sample" if path in h.files else "is not there"
        yield Violation("artifact", what, f"its transcript {there}: {path}")
    elif (logged.execution, str(logged.attempt)) != (execution, attempt):
        yield Violation(
            "artifact", what, f"its transcript was written by attempt {logged.attempt} at {logged.execution}"
        )
    elif logged.scores != _values(result) or logged.errored != (result.error is not None):
        yield Violation("artifact", what, f"its transcript says {logged.scores}, the row {_values(result)}")


def the_merged_log_has_them_all(h: Indexed) -> Iterator[Violation]:
    for evaluation in h.history.evaluations:
        path = h.path(evaluation.log or "")
        if evaluation.results is not None and path not in h.files:
            yield Violation("artifact", evaluation.id, f"its log is not there: {path or 'it names none'}")
            continue
        for result in h.results_of[evaluation.id] if evaluation.log else ():
            logged = h.logged.get((path, result.sample, result.epoch))
            if logged is None or logged.scores != _values(result):
                said = "does not have it" if logged is None else f"says {logged.scores}"
                yield Violation("artifact", result.execution, f"sample {result.sample}: the merged log {said}")


def results_are_right(h: Indexed) -> Iterator[Violation]:
    for result in h.history.results:
        if result.error is None and _values(result).get(SCORER) != score_of(result.sample):
            yield Violation("wrong", result.execution, f"sample {result.sample} has the scores {_values(result)}")
    for submission in h.history.submissions:
        evaluation = h.evaluations.get(submission.evaluation)
        whole = evaluation is not None and evaluation.state == submission.ends and not h.given_up(evaluation.id)
        errors = [r for r in h.results_of[submission.evaluation] if r.error is not None]
        if whole and len(errors) != submission.errored:
            told = f"{len(errors)} samples errored, and {submission.errored} were to"
            yield Violation("wrong", submission.evaluation, told)


def the_sums_are_right(h: Indexed) -> Iterator[Violation]:
    for evaluation in h.history.evaluations:
        rows = h.results_of[evaluation.id]
        if evaluation.results is None:
            report = h.executions.get(f"{evaluation.id}.report")
            reported = report is not None and report.state == "succeeded"
            if evaluation.state == "succeeded" or (evaluation.state == "failed" and rows and reported):
                yield Violation("counts", evaluation.id, f"it {evaluation.state} without results")
            continue
        for name, has, should in _sums(evaluation, rows, len(h.planned(evaluation.id))):
            if not isclose(has, should, abs_tol=1e-9):
                yield Violation("counts", evaluation.id, f"{name} is {has}, and the rows give {should}")


def _sums(evaluation: Evaluation, rows: list[Result], planned: int) -> Iterator[tuple[str, float, float]]:
    results: dict[str, Any] = evaluation.results or {}
    scored = [row for row in rows if row.error is None]
    yield "total_samples", results["total_samples"], planned
    yield "completed_samples", results["completed_samples"], len(scored)
    tokens = sum(_tokens(row.usage) for row in rows)
    yield "total_tokens", _tokens(evaluation.usage or {}), tokens
    if scored:
        by_sample: defaultdict[str, list[float]] = defaultdict(list)
        for row in scored:
            by_sample[row.sample].append(_values(row)[SCORER])
        (metrics,) = [score["metrics"] for score in results["scores"] if score["name"] == SCORER]
        yield "the mean", metrics["mean"]["value"], mean(mean(values) for values in by_sample.values())


def _values(result: Result) -> dict[str, Any]:
    return {name: score["value"] for name, score in result.scores.items()}


def _tokens(usage: dict[str, Any]) -> int:
    return sum(int(used["total_tokens"]) for used in usage.values())

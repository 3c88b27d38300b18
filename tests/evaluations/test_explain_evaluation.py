"""What is said of an evaluation as a whole, for every state and situation."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.evaluations.explain import Rules
from app.evaluations.explain_evaluation import Evaluation
from app.evaluations.views import Tokens
from app.ledger import EvaluationState

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = UUID("0f8fad5b-d9cb-469f-a165-70867728950e")
RETRY = f"proctor retry {ID}"
PLANNED = {("plan", "succeeded"): 1}
REPORTED = {**PLANNED, ("report", "succeeded"): 1}


def evaluation(state: EvaluationState, executions: dict[Any, int], **fields: Any) -> Evaluation:
    """Over for 60 s, if it is."""
    given = {
        "cancel_requested_at": None,
        "finished_at": None if state == "running" else NOW - timedelta(seconds=60),
        "error": None,
        "tokens": Tokens(),
    }
    return Evaluation(id=ID, state=state, now=NOW, executions=executions, rules=Rules(), **given | fields)


ASKED = {"cancel_requested_at": NOW - timedelta(seconds=12)}
CASES: dict[str, tuple[Evaluation, list[str]]] = {
    "planned by nobody yet": (
        evaluation("running", {("plan", "pending"): 1}),
        ["It runs: its plan is pending, and lists the samples before anything else can begin."],
    ),
    "being planned": (
        evaluation("running", {("plan", "running"): 1}),
        ["It runs: its plan is running, and lists the samples before anything else can begin."],
    ),
    "its merged log has no transcripts": (
        evaluation("succeeded", REPORTED | {("run", "succeeded"): 1}, slim_because="the disk is full"),
        [
            "It succeeded 60 s ago.",
            "Its merged log has no transcripts: the disk is full. Each sample's own log has them.",
        ],
    ),
    "some runs are open": (
        evaluation(
            "running",
            {**PLANNED, ("run", "succeeded"): 5, ("run", "failed"): 1, ("run", "running"): 1, ("run", "pending"): 5},
            tokens=Tokens(spent=24_680, useful=12_340, wasted=12_340),
        ),
        [
            "It runs: 6 of its 12 runs are over; 1 is running, 5 are pending.",
            "1 run failed so far.",
            "It has spent 24,680 tokens, 12,340 of them wasted by retries.",
        ],
    ),
    "being cancelled": (
        evaluation("running", {**PLANNED, ("run", "cancelled"): 1, ("run", "running"): 1}, **ASKED),
        [
            "It runs: 1 of its 2 runs is over; 1 is running.",
            "Its cancellation was asked for 12 s ago: what runs stops within 15 s, then the report ends it.",
        ],
    ),
    "only the report is missing": (
        evaluation("running", {**PLANNED, ("run", "succeeded"): 1, ("report", "pending"): 1}),
        ["It runs: its 1 run is over, and the report that ends it is pending."],
    ),
    "its plan failed": (
        evaluation("running", {("plan", "failed"): 1, ("report", "running"): 1}),
        ["It runs: it has no runs, and the report that ends it is running."],
    ),
    "nothing could end it": (
        evaluation("running", {**PLANNED, ("run", "succeeded"): 2}),
        ["It runs, but has no execution left that could end it. That must not be: please report it as a bug."],
    ),
    "succeeded": (
        evaluation("succeeded", {**REPORTED, ("run", "succeeded"): 2}, tokens=Tokens(spent=1, useful=1)),
        ["It succeeded 60 s ago.", "It has spent 1 token."],
    ),
    "succeeded although a run failed": (
        evaluation("succeeded", {**REPORTED, ("run", "succeeded"): 1, ("run", "failed"): 1}),
        ["It succeeded 60 s ago.", f"Of its 2 runs, 1 failed. To run those again: {RETRY}"],
    ),
    "failed by its runs": (
        evaluation(
            "failed",
            {**REPORTED, ("run", "failed"): 2, ("run", "cancelled"): 1},
            error={"error_class": "model", "message": "2 samples errored"},
        ),
        [
            "It failed 60 s ago (model): 2 samples errored.",
            f"Of its 3 runs, 2 failed and 1 did not run to the end. To run those again: {RETRY}",
        ],
    ),
    "of mixed versions": (
        evaluation("succeeded", {**REPORTED, ("run", "succeeded"): 2}, mixed=["inspect_ai", "task version"]),
        [
            "It succeeded 60 s ago.",
            f"Its samples were not all made by the same inspect_ai, task version: proctor show {ID}",
        ],
    ),
    "failed long ago": (
        evaluation(
            "failed",
            {**REPORTED, ("run", "failed"): 2},
            transcripts_expired_at=NOW - timedelta(days=3),
        ),
        [
            "It failed 60 s ago.",
            "Its transcripts were deleted 3 days ago, so it cannot be retried: submit its spec anew to run it again.",
        ],
    ),
    "failed by its plan": (
        evaluation("failed", {("plan", "failed"): 1, ("report", "succeeded"): 1}),
        ["It failed 60 s ago.", f"To plan it again: {RETRY}"],
    ),
    "failed by its report": (
        evaluation("failed", {**PLANNED, ("run", "succeeded"): 1, ("report", "failed"): 1}),
        ["It failed 60 s ago.", f"To report it again: {RETRY}"],
    ),
    "cancelled": (
        evaluation("cancelled", {**REPORTED, ("run", "succeeded"): 1, ("run", "cancelled"): 3}, **ASKED),
        ["It was cancelled 60 s ago.", f"Of its 4 runs, 3 did not run to the end. To run those again: {RETRY}"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_is_explained_in_every_situation(case: str) -> None:
    situation, sentences = CASES[case]
    assert situation.explain() == sentences

"""What is said of an execution, for every state and situation. The clock stands still: all times are from `NOW`."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.evaluations.explain import Execution, Rules
from app.evaluations.views import AttemptView, ExecutionView
from app.ledger import EvaluationState, SweepTimes
from app.settings import load

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ID = UUID("0f8fad5b-d9cb-469f-a165-70867728950e")
LOST = {"error_class": "infrastructure", "message": "The lease of host:99 ran out: the worker or its child was lost."}
FAULT = {"error_class": "model", "message": "RateLimitError:\n slow   down"}
RETRY = f"proctor retry {ID}"


def at(seconds: float) -> datetime:
    """So many seconds after now; before it, if negative."""
    return NOW + timedelta(seconds=seconds)


def attempt(number: int = 1, outcome: str | None = None, *, ended: float = -100, **fields: Any) -> AttemptView:
    """It lasted 312 s; without an outcome it goes on."""
    began = at(ended - 312) if outcome else at(-312)
    given = {
        "attempt": number,
        "worker": "host:99",
        "revision": "",
        "started_at": began,
        "ended_at": at(ended) if outcome else None,
        "seconds": 312,
        "outcome": outcome,
        "error": {"interrupted": LOST, "failed": FAULT}.get(outcome or ""),
    }
    return AttemptView.model_validate(given | fields)


def execution(
    state: str = "pending",
    *attempts: AttemptView,
    evaluation: EvaluationState = "running",
    cancel: bool = False,
    rules: Rules | None = None,
    **fields: Any,
) -> Execution:
    """As the ledger would have it: a pending one was enqueued, a running one was renewed 23 s ago."""
    over = state in ("succeeded", "failed", "cancelled")
    given = {
        "id": f"{ID}.7",
        "evaluation_id": ID,
        "kind": "run",
        "state": state,
        "samples": [{"id": 7, "epoch": 1}],
        "attempt": len(attempts),
        "failures": 0,
        "crashes": 0,
        "worker": "host:123" if state == "running" else None,
        "lease_expires_at": at(97) if state == "running" else None,
        "enqueues": 1,
        "sweep_at": None if over else at(217 if state == "running" else 86_000),
        "error": attempts[-1].error if attempts else None,
        "created_at": at(-1000),
        "finished_at": at(-60) if over else None,
        "attempts": list(attempts),
    }
    view = ExecutionView.model_validate(given | fields)
    return Execution(view, NOW, evaluation, cancel_requested=cancel, max_failures=2, rules=rules or Rules())


def released(*attempts: AttemptView, **fields: Any) -> Execution:
    """Given back 100 s ago by its last attempt."""
    return execution("pending", *attempts, **{"sweep_at": at(500), **fields})


CASES: dict[str, tuple[Execution, list[str]]] = {
    "never enqueued": (
        execution(enqueues=0, sweep_at=at(-0.2)),
        [
            "It waits: no attempt has begun.",
            "No Cloud Task has been made for it yet.",
            "It is due for the sweeper, which looks every minute and makes it a Cloud Task.",
        ],
    ),
    "its Cloud Task may not have been made": (
        execution(sweep_at=at(97)),
        [
            "It waits: no attempt has begun.",
            "It is not known whether its Cloud Task (number 1) exists.",
            "The sweeper looks at it next in 97 s.",
        ],
    ),
    "enqueued": (
        execution(enqueues=2),
        [
            "It waits: no attempt has begun.",
            "The queue has its Cloud Task (number 2) and is to deliver it.",
            "The sweeper looks at it next in 23 h 53 min.",
        ],
    ),
    "nobody sweeps": (
        execution(sweep_at=at(-312)),
        [
            "It waits: no attempt has begun.",
            "It is not known whether its Cloud Task (number 1) exists.",
            "The sweeper should have looked at it 312 s ago: see that POST /tasks/sweep is called every minute and succeeds.",
        ],
    ),
    "pending and to be cancelled": (
        execution(cancel=True),
        [
            "It waits: no attempt has begun.",
            "The queue has its Cloud Task (number 1) and is to deliver it.",
            "The evaluation is being cancelled: the next push ends it without running it.",
            "The sweeper looks at it next in 23 h 53 min.",
        ],
    ),
    "interrupted": (
        released(attempt(1, "interrupted", tokens=12_340), crashes=1),
        [
            "It waits for attempt 2.",
            "The queue is to deliver its Cloud Task again.",
            "The sweeper looks at it next in 500 s.",
            "Its worker or child was lost once without progress; at 3 it fails.",
            "Attempt 1 was interrupted after 312 s: The lease of host:99 ran out: the worker or its child was lost. It had"
            " spent 12,340 tokens.",
        ],
    ),
    "failed with tries left": (
        released(attempt(1, "failed"), failures=1),
        [
            "It waits for attempt 2.",
            "The queue is to deliver its Cloud Task again.",
            "The sweeper looks at it next in 500 s.",
            "It has failed once; at 2 it fails for good.",
            "Attempt 1 failed after 312 s (model): RateLimitError: slow down.",
        ],
    ),
    "given back, and enqueued anew by the sweeper": (
        execution("pending", attempt(1, "interrupted", ended=-900), enqueues=2),
        [
            "It waits for attempt 2.",
            "The queue has its Cloud Task (number 2) and is to deliver it.",
            "The sweeper looks at it next in 23 h 53 min.",
            "Attempt 1 was interrupted after 312 s: The lease of host:99 ran out: the worker or its child was lost.",
        ],
    ),
    "given back by a request that runs its evaluation itself": (
        released(attempt(1, "interrupted"), enqueues=0),
        [
            "It waits for attempt 2.",
            "No Cloud Task has been made for it yet.",
            "The sweeper looks at it next in 500 s.",
            "Attempt 1 was interrupted after 312 s: The lease of host:99 ran out: the worker or its child was lost.",
        ],
    ),
    "armed again by a retry of the evaluation": (
        execution("pending", attempt(1, "failed", ended=-900), error=None, sweep_at=at(-1)),
        [
            "It is to run again, after 1 attempt.",
            "It is not known whether its Cloud Task (number 1) exists.",
            "It is due for the sweeper, which looks every minute and makes it a Cloud Task.",
            "Attempt 1 failed after 312 s (model): RateLimitError: slow down.",
        ],
    ),
    "running": (
        execution("running", attempt(1, "interrupted", tokens=12_340), attempt(2), crashes=1),
        [
            "It runs: worker host:123 (attempt 2) holds it; its lease lasts 97 s more and is renewed every 15 s.",
            "Attempt 2 has lasted 312 s.",
            "The sweeper looks at it next in 217 s.",
            "Its worker or child was lost once without progress; at 3 it fails.",
            "Attempt 1 was interrupted after 312 s: The lease of host:99 ran out: the worker or its child was lost. It had"
            " spent 12,340 tokens.",
        ],
    ),
    "running, with progress": (
        execution("running", attempt(1, tokens=3456, model_calls=1), progress={"step": "tool bash\n"}),
        [
            "It runs: worker host:123 (attempt 1) holds it; its lease lasts 97 s more and is renewed every 15 s.",
            "Attempt 1 has lasted 312 s: 1 model call, 3,456 tokens; its last step: tool bash.",
            "The sweeper looks at it next in 217 s.",
        ],
    ),
    "running and to be cancelled": (
        execution("running", attempt(1), cancel=True),
        [
            "It runs: worker host:123 (attempt 1) holds it; its lease lasts 97 s more and is renewed every 15 s.",
            "Attempt 1 has lasted 312 s.",
            "The evaluation is being cancelled: the worker learns of it within 15 s, and stops it.",
            "The sweeper looks at it next in 217 s.",
        ],
    ),
    "its lease has run out": (
        execution("running", attempt(1), lease_expires_at=at(-35), sweep_at=at(85)),
        [
            "Worker host:123 (attempt 1) holds it, but its lease ran out 35 s ago: the worker is lost, or cut off from the"
            " database.",
            "Attempt 1 has lasted 312 s.",
            "The next push takes it over as attempt 2; until then host:123 may still renew its lease.",
            "The sweeper looks at it next in 85 s.",
        ],
    ),
    "its lease has run out for the third time": (
        execution("running", attempt(1), crashes=2, lease_expires_at=at(-300), sweep_at=at(-180)),
        [
            "Worker host:123 (attempt 1) holds it, but its lease ran out 300 s ago: the worker is lost, or cut off from the"
            " database.",
            "Attempt 1 has lasted 312 s.",
            "The next push takes it over as attempt 2; until then host:123 may still renew its lease.",
            "That would be crash 3 of 3: it fails then, without running.",
            "The sweeper should have looked at it 180 s ago: see that POST /tasks/sweep is called every minute and succeeds.",
            "Its worker or child was lost 2 times without progress; at 3 it fails.",
        ],
    ),
    "its lease has run out, and it is to be cancelled": (
        execution("running", attempt(1), crashes=2, lease_expires_at=at(-35), sweep_at=at(85), cancel=True),
        [
            "Worker host:123 (attempt 1) holds it, but its lease ran out 35 s ago: the worker is lost, or cut off from the"
            " database.",
            "Attempt 1 has lasted 312 s.",
            "The next push takes it over as attempt 2; until then host:123 may still renew its lease.",
            "The evaluation is being cancelled: whoever takes it over ends it without running it.",
            "The sweeper looks at it next in 85 s.",
            "Its worker or child was lost 2 times without progress; at 3 it fails.",
        ],
    ),
    "the report of a cancelled evaluation": (
        execution(kind="report", samples=None, cancel=True),
        [
            "It waits: no attempt has begun.",
            "The queue has its Cloud Task (number 1) and is to deliver it.",
            "The evaluation is being cancelled; this report ends it.",
            "The sweeper looks at it next in 23 h 53 min.",
        ],
    ),
    "succeeded": (
        execution("succeeded", attempt(1, "interrupted"), attempt(2, "succeeded"), cancel=True),
        [
            "It succeeded 60 s ago, in attempt 2.",
            "Attempt 1 was interrupted after 312 s: The lease of host:99 ran out: the worker or its child was lost.",
        ],
    ),
    "failed while its evaluation goes on": (
        execution("failed", attempt(1, "failed", tokens=5), attempt(2, "failed"), failures=2),
        [
            "It failed 60 s ago, in attempt 2 (model): RateLimitError: slow down.",
            "Attempt 1 failed after 312 s (model): RateLimitError: slow down. It had spent 5 tokens.",
            f"To run it again once the evaluation is over: {RETRY}",
        ],
    ),
    "failed in an evaluation that is over": (
        execution("failed", attempt(1, "failed"), evaluation="failed"),
        ["It failed 60 s ago, in attempt 1 (model): RateLimitError: slow down.", f"To run it again: {RETRY}"],
    ),
    "failed for good at once": (
        execution("failed", attempt(1, "failed", error={**FAULT, "final": True}), evaluation="failed"),
        [
            "It failed 60 s ago, in attempt 1 (model): RateLimitError: slow down.",
            "It was not tried again, because the same would happen: remove the cause first.",
            f"To run it again: {RETRY}",
        ],
    ),
    "cancelled while it ran": (
        execution("cancelled", attempt(1, "cancelled"), evaluation="cancelled", cancel=True),
        ["It was cancelled 60 s ago, in attempt 1.", f"To run it again: {RETRY}"],
    ),
    "cancelled before it ran": (
        execution("cancelled", evaluation="cancelled", cancel=True),
        ["It was cancelled 60 s ago, before any attempt.", f"To run it again: {RETRY}"],
    ),
    "cancelled while it waited for another attempt": (
        execution("cancelled", attempt(1, "interrupted"), evaluation="cancelled", cancel=True),
        [
            "It was cancelled 60 s ago, after 1 attempt.",
            "Attempt 1 was interrupted after 312 s: The lease of host:99 ran out: the worker or its child was lost.",
            f"To run it again: {RETRY}",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_execution_is_explained_in_every_situation(case: str) -> None:
    situation, sentences = CASES[case]
    assert situation.explain() == sentences


def test_the_service_s_own_settings_are_what_is_told() -> None:
    settings = load(
        database_url="postgresql://u:p@h/d",
        renew_interval=2,
        max_crashes=5,
        sweep_after=3,
        sweep_after_release=40,
        sweep_after_enqueue=50,
    )
    rules = Rules.of(settings)
    assert rules == Rules(2, 5, SweepTimes(3, 40, 50))
    assert "renewed every 2.0 s" in execution("running", attempt(1), rules=rules).explain()[0]
    back = execution("pending", attempt(1, "interrupted", ended=-10), sweep_at=at(30), crashes=4, rules=rules)
    assert back.explain()[1:4] == [
        "The queue is to deliver its Cloud Task again.",
        "The sweeper looks at it next in 30 s.",
        "Its worker or child was lost 4 times without progress; at 5 it fails.",
    ]
    assert "The queue has its Cloud Task" in execution(sweep_at=at(4), rules=rules).explain()[1]
    assert "It is not known" in execution(sweep_at=at(2), rules=rules).explain()[1]


def test_of_many_attempts_the_latest_are_told_one_by_one() -> None:
    many = [attempt(n, "failed" if n == 2 else "interrupted", ended=n - 100) for n in range(1, 9)]
    told = released(*many).explain()
    assert "Before: 3 attempts (2 interrupted, 1 failed)." in told
    assert [line.split()[1] for line in told if line.startswith("Attempt ")] == ["4", "5", "6", "7", "8"]


def test_an_error_of_any_length_and_form_is_one_line_that_ends() -> None:
    for message, said in {"x" * 400: f"{'x' * 299}…", "why?": "why?", "a\n\nb": "a b.", "": "."}.items():
        told = execution("failed", attempt(1, "failed", error={"message": message})).explain()[0]
        assert told.endswith(said)
        assert "\n" not in told
    nothing = execution("failed", attempt(1, "failed"), error=None).explain()[0]
    assert nothing == "It failed 60 s ago, in attempt 1."


def test_an_attempt_that_the_history_lacks_is_not_missed() -> None:
    bare = replace(
        execution("running", attempt(1)), view=execution("running", attempt(1)).view.model_copy(update={"attempts": []})
    )
    assert bare.explain()[0].startswith("It runs: worker host:123 (attempt 1)")

"""What a drill has to say: the goals, and for each kind of fault what it cost."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from tests.drills.chaos.faults import KINDS, OUTAGE, OUTAGE_SHARE
from tests.drills.chaos.history import Attempt, Call, Fault, History
from tests.drills.chaos.indexed import Indexed
from tests.drills.chaos.violation import Violation
from tests.report import Goal, Report, Value, machine

WORKED_OFF = 60.0
"""Seconds in which some of the open evaluations end, on a busy machine too."""

ALL = "all"
_LOST: tuple[str, ...] = ("lost",)
_DOUBLED: tuple[str, ...] = ("doubled", "held twice")
_OF_ITSELF = "none of these"
"""Interrupted for another reason than a fault: by a child that kills itself, by the deadline of a push."""


def report(history: History, violations: Sequence[Violation]) -> Report:
    h = Indexed(history)
    scale = machine() | {
        "seed": history.notes.get("seed"),
        "seconds of faults": round(history.faults_ended - history.began, 1),
        "seconds until all had ended": round(history.ended - history.faults_ended, 1),
    }
    return Report("chaos", _rows(h), _goals(h, violations), scale)


def _goals(h: Indexed, violations: Sequence[Violation]) -> list[Goal]:
    rules: Counter[str] = Counter(violation.rule for violation in violations)
    evaluations, samples = len(h.history.submissions), len(h.history.results)
    lost, doubled = (sum(rules.pop(rule, 0) for rule in of) for of in (_LOST, _DOUBLED))
    failed = rules.pop("failed", 0)
    given_up = sum(h.given_up(s.evaluation) for s in h.history.submissions)
    others = "; ".join(f"{n} {rule}" for rule, n in sorted(rules.items())) or "0"
    return [
        Goal("evaluations and samples lost", f"0 of {evaluations} and {samples}", lost, lost == 0),
        Goal("recorded, reported or held twice", "0", doubled, doubled == 0),
        Goal(f"failed by us, but for the {given_up} lost three times without progress", "0", failed, failed == 0),
        Goal("other violations", "0", others, not rules),
        _goal_of_the_load(h.history),
    ]


def _goal_of_the_load(history: History) -> Goal:
    """Faults that hit nothing find nothing. An outage stops the client too, and what it leaves open takes a while."""
    while_faults_came = sorted(s.submitted for s in history.submissions if s.submitted < history.faults_ended)
    moments = [history.began, *while_faults_came, history.faults_ended]
    longest = max(after - before for before, after in pairwise(moments))
    most = WORKED_OFF + 2 * OUTAGE_SHARE * (history.faults_ended - history.began)
    return Goal("longest time without a submission, s", f"below {most:.0f}", round(longest, 1), longest < most)


def _rows(h: Indexed) -> list[dict[str, Value]]:
    """By kind of fault, and in all. An attempt that was interrupted counts for the fault that came last before its end."""
    lost = [(attempt, _cause(h, attempt)) for attempt in h.history.attempts if attempt.outcome == "interrupted"]
    kinds = Counter(fault.kind for fault in h.history.faults)
    rows = [_row(h, kind, kinds[kind], [one for one in lost if one[1] and one[1].kind == kind]) for kind in KINDS]
    rows.append(_row(h, _OF_ITSELF, None, [one for one in lost if one[1] is None]))
    return [*rows, _row(h, ALL, sum(kinds.values()), lost)]


def _row(h: Indexed, kind: str, times: int | None, lost: list[tuple[Attempt, Fault | None]]) -> dict[str, Value]:
    """`of it due`: the queue would have delivered it, but for others that were due before."""
    resumed = [(attempt, fault, again) for attempt, fault in lost if (again := _next(h, attempt))]
    pauses = [again.started_at - _stopped(attempt, fault) for attempt, fault, again in resumed]
    waits = [again.started_at - again.due_at for _, _, again in resumed if again.due_at is not None]
    wasted = [_wasted(h, attempt) for attempt, _ in lost if _converses(h, attempt)]
    return {
        "fault": kind,
        "times": times,
        "attempts lost": len(lost),
        "resumed after p50 s": median(pauses) if pauses else None,
        "resumed after max s": max(pauses, default=None),
        "of it due p50 s": median(waits) if waits else None,
        "of them agents": len(wasted),
        "tokens wasted each": sum(wasted) / len(wasted) if wasted else None,
    }


_ENDS = {
    "was told to stop": ("worker drained", "clock wrong by an hour"),
    "forkserver died": ("forkserver killed",),
    "killed by SIGKILL": ("child killed", "forkserver killed"),
    "did not answer for too long": (OUTAGE, "worker cut off"),
    "met an unexpected": ("store failing",),
    "push's deadline": (),
}
"""What an interrupted attempt says of its end, and the faults that end one so. A lease that ran out tells nothing."""


def _cause(h: Indexed, attempt: Attempt) -> Fault | None:
    """Of the faults that can have ended it, the last; one that befell its worker rather than one that befell all."""
    said = str((attempt.error or {}).get("message"))
    kinds = next((kinds for words, kinds in _ENDS.items() if words in said), KINDS)
    possible = [f for f in h.history.faults if f.kind in kinds and _can_have_ended(f, attempt)]
    return max(possible, key=lambda f: (f.worker is not None or bool(f.held), f.kind == OUTAGE, f.at), default=None)


def _can_have_ended(fault: Fault, attempt: Attempt) -> bool:
    if attempt.ended_at is None or fault.at > attempt.ended_at or fault.until < attempt.started_at:
        return False
    if fault.held:
        return (attempt.execution, attempt.attempt) in fault.held
    return fault.worker in (None, attempt.worker) and not fault.kind.startswith("delivered")


def _next(h: Indexed, attempt: Attempt) -> Attempt | None:
    """The one that went on where this one, which has ended, could not."""
    later = (a for a in h.attempts_at[attempt.execution] if a.attempt == attempt.attempt + 1)
    return next(later, None) if attempt.ended_at is not None else None


def _stopped(attempt: Attempt, fault: Fault | None) -> float:
    """When it did nothing more: at the fault, else at its end, as recorded."""
    return max(fault.at, attempt.started_at) if fault else (attempt.ended_at or attempt.started_at)


def _converses(h: Indexed, attempt: Attempt) -> bool:
    return any(_calls(h, attempt))


def _wasted(h: Indexed, attempt: Attempt) -> int:
    """Tokens of the turns that were asked for again in a later attempt."""
    wasted = 0
    for calls in _calls(h, attempt):
        mine = [c for c in calls if _attempt_of(h, attempt.execution, c) == attempt.attempt]
        again = {c.turns for c in calls if _attempt_of(h, attempt.execution, c) > attempt.attempt}
        wasted += sum(c.tokens for c in mine if c.answered is not None and c.turns in again)
    return wasted


def _calls(h: Indexed, attempt: Attempt) -> list[list[Call]]:
    """Of the execution's conversations, if it has any."""
    execution = h.executions[attempt.execution]
    submission = h.submissions.get(execution.evaluation)
    if submission is None or submission.turns is None:
        return []
    return [h.calls_in[f"{submission.tag}/{sample}"] for sample, _ in execution.samples]


def _attempt_of(h: Indexed, execution: str, call: Call) -> int:
    return max((a.attempt for a in h.attempts_at[execution] if a.started_at <= call.at), default=0)

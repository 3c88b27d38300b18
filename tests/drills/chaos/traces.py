"""Rules about what is left outside the database: calls to the model provider, and files in the store."""

import re
from collections import Counter
from collections.abc import Iterator

from tests.drills.chaos.history import Call, Execution, Fault, File
from tests.drills.chaos.indexed import TERMINAL, Indexed
from tests.drills.chaos.violation import Violation

SPENDING_ENDS = 20.0
"""Seconds after the end of an execution in which an attempt that was cut off may still spend: it is stopped when it has gone
without a renewal for `renew_patience` (10 s in the drill), on a busy machine some seconds later."""

TIDYING = 5.0
"""Seconds that deleting takes at most, after an end."""

_CHECKPOINT = re.compile(r"^(?P<evaluation>[^/]+)/(?P<execution>[^/]+)/\d+/(checkpoint/.+|checkpoint\.json)$")
_STOPS_TIDYING = ("worker killed", "worker drained", "clock wrong by an hour", "worker cut off")


def what_is_spent_is_explained(h: Indexed) -> Iterator[Violation]:
    """No attempt takes a turn twice: so no turn is asked for more often than there were attempts."""
    for submission in h.history.submissions:
        if submission.turns is None:
            continue
        for (sample, epoch), run in h.planned(submission.evaluation):
            calls = h.calls_in[f"{submission.tag}/{sample}"]
            scored = any(
                (r.sample, r.epoch) == (sample, epoch) and r.error is None for r in h.results_of[submission.evaluation]
            )
            yield from _of_one(run, f"{run.id} sample {sample}", calls, len(h.attempts_at[run.id]))
            if scored and {c.turns for c in calls} != set(range(submission.turns + 1)):
                yield Violation(
                    "spent", run.id, f"sample {sample} has a score, and not all of its turns were asked for"
                )


def _of_one(run: Execution, what: str, calls: list[Call], attempts: int) -> Iterator[Violation]:
    for turn, times in Counter(call.turns for call in calls).items():
        if times > attempts:
            yield Violation("spent", what, f"turn {turn} was asked for {times} times in {attempts} attempts")
    late = [call for call in calls if run.finished_at is not None and call.at > run.finished_at + SPENDING_ENDS]
    if late:
        assert run.finished_at
        after = late[-1].at - run.finished_at
        yield Violation("spent", what, f"the last of {len(late)} calls came {after:.1f} s after its end")


def nothing_is_left_behind(h: Indexed) -> Iterator[Violation]:
    """Of what has ended no checkpoint is kept: unless whoever was to delete it was stopped just then, or it was written
    later, by an attempt that did not know yet."""
    for file in h.history.files:
        if (found := _CHECKPOINT.match(file.path)) and (evaluation := h.evaluations.get(found["evaluation"])):
            execution = h.executions.get(found["execution"])
            if evaluation.state in TERMINAL and not _excused(h, file, evaluation.finished_at or 0, execution):
                yield Violation("left behind", evaluation.id, f"it has ended, and {file.path} is there")


def _excused(h: Indexed, file: File, ended: float, execution: Execution | None) -> bool:
    if file.modified > ended:
        return True
    report = h.attempts_at[f"{file.path.split('/')[0]}.report"]
    worker = report[-1].worker if report else None
    return any(_stopped_tidying(fault, worker, ended) for fault in h.history.faults)


def _stopped_tidying(fault: Fault, worker: str | None, ended: float) -> bool:
    if fault.at > ended + TIDYING or fault.until < ended:
        return False
    return fault.kind == "store failing" or (fault.kind in _STOPS_TIDYING and fault.worker == worker)

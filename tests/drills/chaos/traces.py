"""Rules about what is left outside the database: calls to the model provider, and files in the store."""

import re
from collections import Counter
from collections.abc import Iterator

from tests.drills.chaos.history import Attempt, Call, Execution, File, Result, Sample, Submission
from tests.drills.chaos.indexed import TERMINAL, Indexed
from tests.drills.chaos.violation import Violation

SPENDING_ENDS = 20.0
"""Seconds after the end of an execution in which an attempt that was cut off may still spend: it is stopped when it has gone
without a renewal for `renew_patience` (10 s in the drill), on a busy machine some seconds later."""

UNSAVED = 3
"""Turns that an interruption may cost where each is saved: the one under way, and those whose state was on its way to the
store."""

_CHECKPOINT = re.compile(r"^(?P<evaluation>[^/]+)/(?P<execution>[^/]+)/\d+/(checkpoint/.+|checkpoint\.json)$")


def what_is_spent_is_explained(h: Indexed) -> Iterator[Violation]:
    for submission in h.history.submissions:
        if submission.turns is not None:
            for sample, run in h.planned(submission.evaluation):
                yield from _of_one(h, submission, sample, run)


def _of_one(h: Indexed, submission: Submission, sample: Sample, run: Execution) -> Iterator[Violation]:
    what, calls, attempts = (
        f"{run.id} sample {sample}",
        h.calls_in[f"{submission.tag}/{sample[0]}"],
        h.attempts_at[run.id],
    )
    results = [r for r in h.results_of[submission.evaluation] if (r.sample, r.epoch) == sample and r.error is None]
    for turn, times in Counter(call.turns for call in calls).items():
        if times > len(attempts):  # no attempt takes a turn twice
            yield Violation("spent", what, f"turn {turn} was asked for {times} times in {len(attempts)} attempts")
    late = [
        call.at - run.finished_at for call in calls if run.finished_at and call.at > run.finished_at + SPENDING_ENDS
    ]
    if late:
        yield Violation("spent", what, f"{len(late)} calls came after its end, the last {late[-1]:.1f} s")
    again = len(calls) - len({call.turns for call in calls})
    if submission.saved and again > UNSAVED * (len(attempts) - 1) and not _unsaved(h, attempts, results):
        yield Violation("spent", what, f"{again} calls were made again after {len(attempts) - 1} interruptions")
    for result in results:
        yield from _paid(what, result, calls, submission)


def _unsaved(h: Indexed, attempts: list[Attempt], results: list[Result]) -> bool:
    """Whether there is a reason why more than a turn or two was lost: an attempt that nobody could stop went on beside the
    next; nothing could be saved, or not be sent to the store."""
    beside = any("ran out" in str((a.error or {}).get("message")) for a in attempts)
    no_restic = any("restic" in (r.note or "") for r in results)
    failing = [f for f in h.history.faults if f.kind == "store failing"]
    began, ended = attempts[0].started_at, attempts[-1].ended_at or h.history.ended
    return beside or no_restic or any(f.at < ended and f.until > began for f in failing)


def _paid(what: str, result: Result, calls: list[Call], submission: Submission) -> Iterator[Violation]:
    """A sample's usage is that of the turns that it is made of, whichever attempts took them."""
    tokens = {call.turns: call.tokens for call in calls}
    if set(tokens) != set(range(submission.turns or 0)) | {submission.turns}:
        yield Violation("spent", what, "it has a score, and not all of its turns were asked for")
    told = sum(int(used["total_tokens"]) for model, used in result.usage.items() if model.endswith("/agent"))
    if told != sum(tokens.values()):
        yield Violation("counts", what, f"its usage is {told} tokens, and its turns took {sum(tokens.values())}")


def nothing_is_left_behind(h: Indexed) -> Iterator[Violation]:
    """Of what has ended no checkpoint is kept: the report deletes them before it ends. Unless the store failed meanwhile,
    or a file was written later, by an attempt that did not know yet."""
    for file in h.history.files:
        found = _CHECKPOINT.match(file.path)
        evaluation = h.evaluations.get(found["evaluation"]) if found else None
        if evaluation and evaluation.state in TERMINAL and not _excused(h, file, evaluation.finished_at or 0):
            yield Violation("left behind", evaluation.id, f"it has ended, and {file.path} is there")


def _excused(h: Indexed, file: File, ended: float) -> bool:
    report = h.attempts_at[f"{file.path.split('/')[0]}.report"]
    began = report[-1].started_at if report else ended
    failing = (fault for fault in h.history.faults if fault.kind == "store failing")
    return file.modified > began or any(fault.at <= ended and fault.until >= began for fault in failing)

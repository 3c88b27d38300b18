"""Why an execution is where it is, in words: who holds it, how long its lease lasts, when the sweeper
looks next, what its attempts died of, what its user can do. No I/O here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from app.evaluations.sentences import because, many, one_line, span, times
from app.evaluations.views import AttemptView, ExecutionView
from app.ledger import EvaluationState, SweepTimes
from app.settings import Settings

SHOWN_ATTEMPTS = 5
"""Attempts that are told one by one, the latest; GET /executions/{id} has all."""

OVERDUE = 90.0
"""Seconds after `sweep_at` from which on nobody seems to sweep: one and a half rounds of a minute. Ours."""

_SAME_MOMENT = 1.0
"""Seconds between two readings of the clock in one statement, at most. Ours: they are microseconds apart."""


@dataclass(frozen=True)
class Rules:
    """The service's settings that an explanation names, in seconds."""

    renew_interval: float = 15
    max_crashes: int = 3
    sweep: SweepTimes = field(default_factory=SweepTimes)

    @classmethod
    def of(cls, settings: Settings) -> "Rules":
        sweep = SweepTimes(settings.sweep_after, settings.sweep_after_release, settings.sweep_after_enqueue)
        return cls(settings.renew_interval, settings.max_crashes, sweep)


@dataclass(frozen=True)
class Execution:
    """An execution as of `now` (the database's clock, read with the rows), with what its evaluation says of it."""

    view: ExecutionView
    now: datetime
    evaluation: EvaluationState
    cancel_requested: bool
    max_failures: int
    rules: Rules
    expired: bool = False
    """Its evaluation's transcripts are no longer kept, so there is no retry."""

    def explain(self) -> list[str]:
        if self.view.state == "pending":
            where = self._pending()
        elif self.view.state == "running":
            where = self._running()
        else:
            where = self._over()
        return [*where, *self._cancelling(), *self._sweeper(), *self._charges(), *self._history(), *self._remedy()]

    # Where it is ------------------------------------------------------------------------------------------------------

    def _pending(self) -> Iterator[str]:
        view = self.view
        if view.attempt == 0:
            yield "It waits: no attempt has begun."
        elif view.error is None:  # an attempt that gives it back leaves its reason
            yield f"It is to run again, after {many(view.attempt, 'attempt')}."
        else:
            yield f"It waits for attempt {view.attempt + 1}."
        if view.enqueues == 0:
            yield "No Cloud Task has been made for it yet."
        elif self._released():
            yield "The queue is to deliver its Cloud Task again."
        elif self._sweep_in > self.rules.sweep.uncertain:
            yield f"The queue has its Cloud Task (number {view.enqueues}) and is to deliver it."
        else:
            yield f"It is not known whether its Cloud Task (number {view.enqueues}) exists."

    def _running(self) -> Iterator[str]:
        view, left = self.view, self._lease_left
        if left > 0:
            renewed = f"renewed every {span(self.rules.renew_interval)}"
            yield (
                f"It runs: worker {view.worker} (attempt {view.attempt}) holds it; its lease lasts {span(left)} more and is"
                f" {renewed}."
            )
            yield from self._progress()
        else:
            yield (
                f"Worker {view.worker} (attempt {view.attempt}) holds it, but its lease ran out {span(-left)} ago: the"
                " worker is lost, or cut off from the database."
            )
            yield from self._progress()
            yield (
                f"The next push takes it over as attempt {view.attempt + 1}; until then {view.worker} may still renew its"
                " lease."
            )
            if view.crashes + 1 >= self.rules.max_crashes and not self._stops:
                yield f"That would be crash {view.crashes + 1} of {self.rules.max_crashes}: it fails then, without running."

    def _progress(self) -> Iterator[str]:
        """Of the attempt that runs, as its worker told it last."""
        attempt, progress = self._last, self.view.progress or {}
        if attempt is None:
            return
        spent = [
            *([many(attempt.model_calls, "model call")] if attempt.model_calls else ()),
            *([many(attempt.tokens, "token")] if attempt.tokens else ()),
        ]
        step = f"; its last step: {one_line(progress['step'], 80)}" if progress.get("step") else ""
        so_far = f": {', '.join(spent)}" if spent else ""
        yield f"Attempt {attempt.attempt} has lasted {span(attempt.seconds)}{so_far}{step}."

    def _over(self) -> Iterator[str]:
        view = self.view
        ago = span(self._since(view.finished_at))
        last = self._last
        mine = last is not None and last.outcome == view.state
        when = f"in attempt {view.attempt}" if mine else f"after {many(view.attempt, 'attempt')}"
        if view.state == "succeeded":
            yield f"It succeeded {ago} ago, {when}."
        elif view.state == "cancelled":
            stopped = (view.error or {}).get("error_class") == "evaluation"  # by the evaluation's policy, not by a user
            why = because(view.error) if stopped else "."
            yield f"It was cancelled {ago} ago, {when if view.attempt else 'before any attempt'}{why}"
        else:
            yield f"It failed {ago} ago, {when}{because(view.error)}"

    def _cancelling(self) -> Iterator[str]:
        view = self.view
        if not self.cancel_requested or self.evaluation != "running":
            return
        if view.kind == "report":
            if view.state in ("pending", "running"):
                yield "The evaluation is being cancelled; this report ends it."
        elif view.state == "pending":
            yield "The evaluation is being cancelled: the next push ends it without running it."
        elif view.state == "running" and self._lease_left > 0:
            interval = span(self.rules.renew_interval)
            yield f"The evaluation is being cancelled: the worker learns of it within {interval}, and stops it."
        elif view.state == "running":
            yield "The evaluation is being cancelled: whoever takes it over ends it without running it."

    # What comes next, and what went before ----------------------------------------------------------------------------

    def _sweeper(self) -> Iterator[str]:
        if self.view.sweep_at is None:
            return
        left = self._sweep_in
        if left > 0:
            yield f"The sweeper looks at it next in {span(left)}."
        elif left > -OVERDUE:
            yield "It is due for the sweeper, which looks every minute and makes it a Cloud Task."
        else:
            yield (
                f"The sweeper should have looked at it {span(-left)} ago: see that POST /tasks/sweep is called every minute"
                " and succeeds."
            )

    def _charges(self) -> Iterator[str]:
        view = self.view
        if view.state not in ("pending", "running"):
            return
        if view.crashes:
            lost = f"Its worker or child was lost {times(view.crashes)} without progress"
            yield f"{lost}; at {self.rules.max_crashes} it fails."
        if view.failures:
            yield f"It has failed {times(view.failures)}; at {self.max_failures} it fails for good."

    def _history(self) -> Iterator[str]:
        """The attempts that ended, but for the one that brought the execution's own end."""
        ended = [a for a in self.view.attempts if a.outcome and not self._is_the_end(a)]
        earlier = ended[:-SHOWN_ATTEMPTS]
        if earlier:
            outcomes = Counter(a.outcome for a in earlier)
            yield f"Before: {many(len(earlier), 'attempt')} ({', '.join(f'{n} {o}' for o, n in outcomes.items())})."
        for attempt in ended[-SHOWN_ATTEMPTS:]:
            yield _ended(attempt)

    def _remedy(self) -> Iterator[str]:
        view = self.view
        if view.state not in ("failed", "cancelled") or self.expired:
            return
        if (view.error or {}).get("final"):
            yield "It was not tried again, because the same would happen: remove the cause first."
        command = f"proctor retry {view.evaluation_id}"
        if self.evaluation == "running":
            yield f"To run it again once the evaluation is over: {command}"
        else:
            yield f"To run it again: {command}"

    # What the rows say ------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> AttemptView | None:
        return self.view.attempts[-1] if self.view.attempts else None

    @property
    def _lease_left(self) -> float:
        return -self._since(self.view.lease_expires_at)

    @property
    def _sweep_in(self) -> float:
        return -self._since(self.view.sweep_at)

    @property
    def _stops(self) -> bool:
        """It is cancelled before anything else."""
        return self.cancel_requested and self.view.kind != "report"

    def _since(self, moment: datetime | None) -> float:
        """Seconds; negative for what is to come."""
        return (self.now - moment).total_seconds() if moment else 0.0

    def _released(self) -> bool:
        """Nothing but its last attempt's end has set `sweep_at`: its Cloud Task is the one that was answered 409."""
        last, sweep_at = self._last, self.view.sweep_at
        if last is None or last.ended_at is None or sweep_at is None:
            return False
        after = (sweep_at - last.ended_at).total_seconds()
        return abs(after - self.rules.sweep.released) <= _SAME_MOMENT

    def _is_the_end(self, attempt: AttemptView) -> bool:
        return attempt is self._last and attempt.outcome == self.view.state


def _ended(attempt: AttemptView) -> str:
    how = {"interrupted": "was interrupted", "cancelled": "was cancelled"}.get(attempt.outcome or "", attempt.outcome)
    spent = f" It had spent {many(attempt.tokens, 'token')}." if attempt.tokens else ""
    fault = attempt.error if attempt.outcome == "failed" else {**(attempt.error or {}), "error_class": None}
    return f"Attempt {attempt.attempt} {how} after {span(attempt.seconds)}{because(fault)}{spent}"

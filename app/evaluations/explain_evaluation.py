"""Where an evaluation is and what it waits for, in words. No I/O here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from app.evaluations.explain import Rules
from app.evaluations.sentences import because, many, span
from app.evaluations.views import Tokens
from app.ledger import EvaluationState, Kind, State

_OPEN: tuple[State, ...] = ("running", "pending")
_AGAIN: tuple[tuple[State, str], ...] = (("failed", "failed"), ("cancelled", "did not run to the end"))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as of `now` (the database's clock, read with the rows), with how many of its executions of each kind
    are in which state."""

    id: UUID
    state: EvaluationState
    now: datetime
    cancel_requested_at: datetime | None
    finished_at: datetime | None
    error: dict[str, Any] | None
    executions: Mapping[tuple[Kind, State], int]
    tokens: Tokens
    rules: Rules
    transcripts_expired_at: datetime | None = None
    stopped_at: datetime | None = None
    stop_reason: str | None = None
    mixed: Sequence[str] = ()
    """What was not the same for all its samples, and may change what results mean."""

    slim_because: str | None = None
    """Why its merged log has no transcripts."""

    def explain(self) -> list[str]:
        if self.state == "running":
            return [self._waits_for(), *self._cancelling(), *self._stopping(), *self._failed_so_far(), *self._spent()]
        return [self._ended(), *self._mixed(), *self._slim(), *self._spent(), *self._remedy()]

    def _waits_for(self) -> str:
        runs = self._runs
        if plan := self._open("plan"):
            return f"It runs: its plan is {plan[0][0]}, and lists the samples before anything else can begin."
        if left := self._open("run"):
            done = runs - sum(n for _, n in left)
            states = ", ".join(f"{n} {_are(n)} {state}" for state, n in left)
            return f"It runs: {done} of its {many(runs, 'run')} {_are(done)} over; {states}."
        if report := self._open("report"):
            over = f"its {many(runs, 'run')} {_are(runs)} over" if runs else "it has no runs"
            return f"It runs: {over}, and the report that ends it is {report[0][0]}."
        return "It runs, but has no execution left that could end it. That must not be: please report it as a bug."

    def _cancelling(self) -> Iterator[str]:
        if self.cancel_requested_at:
            asked = span((self.now - self.cancel_requested_at).total_seconds())
            interval = span(self.rules.renew_interval)
            yield f"Its cancellation was asked for {asked} ago: what runs stops within {interval}, then the report ends it."

    def _stopping(self) -> Iterator[str]:
        if self.stopped_at and self.stop_reason:
            ago, interval = span((self.now - self.stopped_at).total_seconds()), span(self.rules.renew_interval)
            yield f"{self.stop_reason} That was {ago} ago: what runs stops within {interval}, then the report ends it."

    def _failed_so_far(self) -> Iterator[str]:
        if failed := self._count("run", "failed"):
            yield f"{many(failed, 'run')} failed so far."

    def _ended(self) -> str:
        ago = span((self.now - self.finished_at).total_seconds()) if self.finished_at else "some time"
        if self.state == "succeeded":
            return f"It succeeded {ago} ago."
        if self.state == "cancelled":
            return f"It was cancelled {ago} ago."
        return f"It failed {ago} ago{because(self.error)}"

    def _spent(self) -> Iterator[str]:
        if self.tokens.spent:
            wasted = f", {self.tokens.wasted:,} of them wasted by retries" if self.tokens.wasted else ""
            yield f"It has spent {many(self.tokens.spent, 'token')}{wasted}."

    def _mixed(self) -> Iterator[str]:
        if self.mixed:
            yield f"Its samples were not all made by the same {', '.join(self.mixed)}: proctor show {self.id}"

    def _slim(self) -> Iterator[str]:
        if self.slim_because:
            yield f"Its merged log has no transcripts: {self.slim_because}. Each sample's own log has them."

    def _remedy(self) -> Iterator[str]:
        """What a retry would do. It goes for the runs; if none is to run again, for the report; without any, the plan."""
        if self.transcripts_expired_at:
            gone = span((self.now - self.transcripts_expired_at).total_seconds())
            yield f"Its transcripts were deleted {gone} ago, so it cannot be retried: submit its spec anew to run it again."
            return
        parts = [f"{n} {verb}" for state, verb in _AGAIN if (n := self._count("run", state))]
        runs = self._runs
        command = f"proctor retry {self.id}"
        if parts:
            yield f"Of its {many(runs, 'run')}, {' and '.join(parts)}. To run those again: {command}"
        elif self.state != "succeeded" or not runs:
            yield f"To {'report' if runs else 'plan'} it again: {command}"

    @property
    def _runs(self) -> int:
        return sum(n for (kind, _), n in self.executions.items() if kind == "run")

    def _count(self, kind: Kind, state: State) -> int:
        return self.executions.get((kind, state), 0)

    def _open(self, kind: Kind) -> Sequence[tuple[State, int]]:
        return [(state, n) for state in _OPEN if (n := self._count(kind, state))]


def _are(n: int) -> str:
    return "is" if n == 1 else "are"

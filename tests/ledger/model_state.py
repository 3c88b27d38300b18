"""What the ledger's model is made of: evaluations, executions, attempts, and what may be asked of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from app.ledger import Enqueue, EvaluationState, Kind, Outcome, State

Sweep = Literal["due", "fan-out", "uncertain", "released", "enqueued", "leased"]
"""Why the sweeper looks at an execution when it does. `fan-out`: a plan asked for its runs to be left alone for a time."""

Rows = dict[tuple[Any, ...], dict[str, Any]]
"""Rows by table and key, with what of them is foretold."""


@dataclass(frozen=True)
class Ended:
    """A sample that ended; `log` is like no other's, so that it tells which result was kept."""

    sample: str
    errored: bool
    log: str


@dataclass(frozen=True)
class Ending:
    """What an attempt comes to. `runs`: how many samples each run has that a plan fans out to."""

    outcome: Outcome
    crashed: bool = False
    max_failures: int = 1
    samples: tuple[Ended, ...] = ()
    runs: tuple[int, ...] = ()
    runs_later: bool = False
    end: EvaluationState = "succeeded"
    mark: int = 0
    """Tells this ending's error, usage and results from any other's."""

    def __repr__(self) -> str:
        """What is not as usual."""
        said = [f"{f.name}={value!r}" for f in fields(self)[1:] if (value := getattr(self, f.name)) != f.default]
        return f"Ending({', '.join([repr(self.outcome), *said])})"

    @property
    def error(self) -> str | None:
        return None if self.outcome == "succeeded" else f"fault {self.mark}"


@dataclass(frozen=True)
class Answer:
    """To a push. `holder` matters where it is held, `state` where it is not granted."""

    verdict: str
    attempt: int
    crashes: int
    failures: int
    cancel: bool
    kind: Kind
    samples: tuple[str, ...]
    error: str | None
    holder: str | None
    state: State | None


@dataclass(frozen=True)
class Look:
    """What others ask of an evaluation: its executions that are not terminal, how its plan went, and for the report the
    samples with their logs, and how many have none."""

    unfinished: list[str]
    plan: tuple[State, int, str | None]
    to_report: list[tuple[str, str]]
    missing: int


@dataclass
class Attempt:
    worker: str
    claim_id: int
    outcome: Outcome | None = None
    usage: int | None = None


@dataclass
class Execution:
    """`lease`: whether it has run out; None: there is none. `tokens`: the progress of the attempt that runs."""

    id: str
    kind: Kind
    samples: tuple[str, ...] = ()
    sweep: Sweep | None = "uncertain"
    enqueues: int = 0
    state: State = "pending"
    failures: int = 0
    crashes: int = 0
    lease: Literal["held", "over"] | None = None
    tokens: int | None = None
    error: str | None = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def attempt(self) -> int:
        return len(self.attempts)

    @property
    def terminal(self) -> bool:
        return self.state not in ("pending", "running")

    def is_held_by(self, attempt: int) -> bool:
        return self.state == "running" and self.attempt == attempt

    def begin(self, worker: str, claim_id: int) -> None:
        self.attempts.append(Attempt(worker, claim_id))
        self.state, self.lease, self.sweep, self.tokens = "running", "held", "leased", None

    def end(self, state: State, sweep: Sweep | None) -> None:
        self.state, self.lease, self.sweep = state, None, sweep

    def arm(self, sweep: Sweep) -> None:
        self.end("pending", sweep)
        self.failures = self.crashes = 0
        self.error = None


@dataclass
class Evaluation:
    name: str
    spec: int
    state: EvaluationState = "running"
    cancel: bool = False
    results: int | None = None
    executions: dict[str, Execution] = field(default_factory=dict)
    samples: dict[str, tuple[str, int, Ended]] = field(default_factory=dict)
    """By sample: execution, attempt and what is kept."""

    @property
    def runs(self) -> list[Execution]:
        return [e for e in self.executions.values() if e.kind == "run"]

    @property
    def remaining(self) -> int:
        return sum(not e.terminal and e.kind != "report" for e in self.executions.values())

    def in_order(self) -> list[Execution]:
        """The report last; a report may be older than the runs of a plan that was tried again."""
        return sorted(self.executions.values(), key=lambda e: e.kind == "report")

    def add(self, part: str, kind: Kind, **more: Any) -> None:
        id = f"{self.name}.{part}"
        self.executions[id] = Execution(id, kind, **more)

    def report_if_last(self) -> Enqueue | None:
        """Whoever leaves nothing to be done arms the report."""
        if self.remaining:
            return None
        id = f"{self.name}.report"
        if id not in self.executions:
            self.add("report", "report")
        report = self.executions[id]
        report.arm("uncertain")
        report.enqueues += 1
        return Enqueue(id, report.enqueues)

    def keep(self, execution: Execution, attempt: int, ended: Iterable[Ended]) -> bool:
        """A score stays; an error stays until a later attempt. Whether that is news: an error in an error's place is none."""
        news = False
        for new in ended:
            kept = self.samples.get(new.sample)
            if kept is None or (kept[2].errored and kept[1] < attempt):
                self.samples[new.sample] = (execution.id, attempt, new)
                news = news or kept is None or not new.errored
        return news


_AS_THEY_ARE = ("kind", "samples", "state", "attempt", "failures", "crashes", "enqueues", "sweep", "lease", "error")


def rows_of(v: Evaluation) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    yield (
        ("evaluation", v.name),
        {"state": v.state, "remaining": v.remaining, "cancel": v.cancel, "results": v.results},
    )
    for e in v.executions.values():
        running = e.state == "running"
        yield (
            ("execution", e.id),
            {
                **{name: getattr(e, name) for name in _AS_THEY_ARE},
                "worker": e.attempts[-1].worker if running else None,
                "claim_id": e.attempts[-1].claim_id if running else None,
                "tokens": e.tokens if running else None,
            },
        )
        for n, a in enumerate(e.attempts, 1):
            found = {"worker": a.worker, "claim_id": a.claim_id, "outcome": a.outcome, "usage": a.usage}
            yield ("attempt", e.id, n), found
    for sample, (execution, attempt, ended) in v.samples.items():
        kept = {"execution": execution, "attempt": attempt, "errored": ended.errored, "log": ended.log}
        yield ("sample", v.name, sample), kept

"""What happened, as everybody wrote it down: the client, the database, the store, the front, the model provider.

Plain values, so that the checker needs nothing else, and a history can be kept as JSON. Every time is in seconds since the
epoch by the machine's one clock: the drill's, and the database's, which runs on the same machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

Kind = Literal["plan", "run", "report"]
Sample = tuple[str, int]
"""Its id as text, and its epoch."""


@dataclass(frozen=True)
class Submission:
    """What the client asked for and was promised (202). `ends`: what it must come to if nobody cancels it. `errored`: how
    many of its `samples` end with an error, by the task's own doing. `turns`: of an agent, until it submits; `saved`: its
    state, after each of them."""

    evaluation: str
    kind: str
    tag: str
    samples: int
    submitted: float
    ends: Literal["succeeded", "failed"] = "succeeded"
    errored: int = 0
    turns: int | None = None
    saved: bool = False
    cancelled: float | None = None
    """When the client first asked for it."""


@dataclass(frozen=True)
class Evaluation:
    id: str
    state: str
    remaining: int
    created_at: float
    finished_at: float | None
    cancel_requested_at: float | None
    results: dict[str, Any] | None
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    log: str | None


@dataclass(frozen=True)
class Execution:
    id: str
    evaluation: str
    kind: Kind
    state: str
    attempt: int
    failures: int
    crashes: int
    created_at: float
    finished_at: float | None
    samples: tuple[Sample, ...] = ()
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Attempt:
    execution: str
    attempt: int
    worker: str
    started_at: float
    ended_at: float | None
    outcome: str | None
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    due_at: float | None = None
    """When the queue meant to deliver the push that it began with."""


@dataclass(frozen=True)
class Result:
    evaluation: str
    sample: str
    epoch: int
    execution: str
    attempt: int
    scores: dict[str, Any]
    """By scorer: {"value": …}."""
    usage: dict[str, Any]
    error: dict[str, Any] | None
    transcript: str
    recorded_at: float
    note: str | None = None


@dataclass(frozen=True)
class Push:
    """One delivery as the front saw it. `status`: None if it had no whole answer to pass on."""

    execution: str
    worker: str
    began: float
    ended: float
    status: int | None


@dataclass(frozen=True)
class Call:
    """One request to the model provider; `answered` None: never."""

    conversation: str
    kind: str
    turns: int
    tokens: int
    at: float
    answered: float | None
    status: int | None


@dataclass(frozen=True)
class Fault:
    """`worker`, `execution`: whom it befell, if one. `held`: (execution, attempt) that were lost with it, or could be."""

    kind: str
    at: float
    until: float
    worker: str | None = None
    held: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class File:
    """In the store. `path` is relative to its root: evaluation/execution/attempt/…"""

    path: str
    modified: float


@dataclass(frozen=True)
class Logged:
    """A sample as a log has it; `log` is the log's path, as in `File`. `execution`, `attempt`: who wrote it, in its own
    words."""

    log: str
    sample: str
    epoch: int
    scores: dict[str, Any]
    errored: bool
    execution: str | None = None
    attempt: int | None = None


@dataclass(frozen=True)
class History:
    """`root`: URL of the store."""

    root: str
    began: float
    faults_ended: float
    ended: float
    submissions: Sequence[Submission] = ()
    evaluations: Sequence[Evaluation] = ()
    executions: Sequence[Execution] = ()
    attempts: Sequence[Attempt] = ()
    results: Sequence[Result] = ()
    pushes: Sequence[Push] = ()
    calls: Sequence[Call] = ()
    faults: Sequence[Fault] = ()
    files: Sequence[File] = ()
    logged: Sequence[Logged] = ()
    died: Sequence[str] = ()
    """Workers that ended by themselves."""
    notes: dict[str, Any] = field(default_factory=dict)
    """The seed and whatever else may help a reader."""

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_FORM.dump_json(self, indent=1))


def load(file: Path) -> History:
    return _FORM.validate_json(file.read_bytes())


_FORM = TypeAdapter(History)

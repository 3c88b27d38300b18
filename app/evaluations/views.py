"""What the API shows of evaluations, samples and executions: the form of its answers."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.ledger import EvaluationState, Kind, Outcome, State
from app.runner.messages import ErrorClass
from app.versions import Mixture


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class SampleCounts(_View):
    """Samples × epochs by what became of them. All are 0 until the plan has listed them."""

    total: int = 0
    pending: int = 0
    running: int = 0
    succeeded: int = Field(default=0, description="Have their scores.")
    failed: int = Field(default=0, description="Errored, or never came to a result.")
    cancelled: int = 0


class Tokens(_View):
    """What an evaluation has cost in tokens. What is left of `spent` is in attempts whose samples may still come to a
    result."""

    spent: int = Field(default=0, description="By all attempts so far, those that are still running among them.")
    useful: int = Field(default=0, description="Behind the results that stand.")
    wasted: int = Field(default=0, description="By attempts that had to be made again: what retries cost.")


class EvaluationView(_View):
    id: UUID
    state: EvaluationState
    created_by: str
    idempotency_key: str | None = None
    spec: dict[str, Any]
    samples: SampleCounts
    cancel_requested: bool
    stop_reason: str | None = Field(
        default=None, description="Why no further sample starts: more have errored than `fail_on_error` allows."
    )
    results: dict[str, Any] | None = Field(
        default=None,
        description="Inspect's `EvalResults`: metrics by scorer. `log_without_transcripts`: why the merged log has none.",
    )
    tokens: Tokens
    usage: dict[str, Any] | None = Field(default=None, description="Tokens by model, once it is over.")
    cost: float | None = Field(default=None, description="US dollars, as far as prices are known.")
    error: dict[str, Any] | None = None
    log: str | None = Field(default=None, description="URL of the merged Inspect log.")
    versions: dict[str, str] | None = Field(default=None, description="Packages that decide what a result means.")
    mixed_versions: list[Mixture] = Field(
        default_factory=list,
        description="What was not the same for all samples that have a result. None: they are alike.",
    )
    notes: list[str] = Field(default_factory=list, description="What to know of a submission, in its answer only.")
    transcripts_deleted_at: datetime | None = Field(
        default=None, description="Its logs were deleted then, being older than is kept; what is shown here stays."
    )
    created_at: datetime
    finished_at: datetime | None = None


class EvaluationPage(_View):
    evaluations: list[EvaluationView]
    next: str | None = Field(default=None, description="`cursor` of the next page; none: this is the last.")


class SampleView(_View):
    id: int | str
    epoch: int
    state: State
    scores: dict[str, Any] = Field(
        default_factory=dict,
        description="Of each scorer: `value`, `answer` and `explanation`. Of what is longer than 2,000 characters, only the"
        " beginning, with `…` where something is left out; `cut` then names which of the three. The transcript has them"
        " whole.",
    )
    usage: dict[str, Any] = Field(default_factory=dict)
    cost: float | None = None
    limit: str | None = None
    error: dict[str, Any] | None = None
    duration: float | None = Field(default=None, description="Seconds.")
    transcript: str | None = Field(default=None, description="URL of the Inspect log that has the sample whole.")
    note: str | None = Field(default=None, description="Whether the sample was resumed, or begun again and why.")
    execution: str
    attempt: int | None = None


class SamplePage(_View):
    samples: list[SampleView]
    next: str | None = Field(default=None, description="`cursor` of the next page; none: this is the last.")


class AttemptView(_View):
    attempt: int
    worker: str
    revision: str
    push: dict[str, str] | None = Field(default=None, description="The queue's headers: information, not an identity.")
    started_at: datetime
    ended_at: datetime | None = None
    seconds: float = Field(description="How long it lasted, or has lasted so far.")
    outcome: Outcome | None = None
    error: dict[str, Any] | None = None
    error_class: ErrorClass | None = Field(default=None, description="Whose fault its end was.")
    usage: dict[str, Any] | None = None
    tokens: int | None = Field(default=None, description="Spent by this attempt itself; of a running one, so far.")
    model_calls: int | None = None
    cost: float | None = Field(default=None, description="US dollars, as far as prices are known.")
    versions: dict[str, str] | None = Field(
        default=None, description="By which it was made: packages, the task's own version, the container's image."
    )
    earlier_versions: list[dict[str, str]] | None = Field(
        default=None, description="Those by which the state was made that it went on from, if it did."
    )


class ExecutionView(_View):
    id: str
    evaluation_id: UUID
    kind: Kind
    state: State
    samples: list[dict[str, Any]] | None = None
    attempt: int
    failures: int = Field(description="Failures charged to the evaluation.")
    crashes: int = Field(description="Workers or children lost since the last progress.")
    worker: str | None = None
    lease_expires_at: datetime | None = None
    progress: dict[str, Any] | None = None
    enqueues: int = Field(description="Cloud Tasks made for it so far.")
    sweep_at: datetime | None = Field(default=None, description="When the sweeper looks at it next.")
    error: dict[str, Any] | None = None
    created_at: datetime
    finished_at: datetime | None = None
    attempts: list[AttemptView]
    explanation: list[str] = Field(default_factory=list, description="Why it is where it is, in sentences.")


class ExplainedExecution(_View):
    id: str
    kind: Kind
    state: State
    attempt: int
    samples: list[dict[str, Any]] | None = None
    explanation: list[str]


class EvaluationExplanation(_View):
    id: UUID
    state: EvaluationState
    explanation: list[str] = Field(description="Where it is and what it waits for, in sentences.")
    executions: list[ExplainedExecution] = Field(
        description="Those that it waits for or that failed, worst first: the first few."
    )

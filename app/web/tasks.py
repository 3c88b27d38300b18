"""What the queue calls, and a person debugging by curl."""

import time
from typing import Annotated, Self
from uuid import UUID

import structlog
from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.errors import Again, InvalidRequest, NotFound
from app.evaluations.read import EvaluationView, SampleView
from app.execution import Push
from app.ledger import State
from app.queue import enqueue_due
from app.spec import PRINTABLE, Spec
from app.tracing import HEADER, about
from app.web.evaluations import IdempotencyKey
from app.web.problems import responses
from app.web.state import Caller, ServicesDep

router = APIRouter(prefix="/tasks", tags=["tasks"])

PREFIX = "x-cloudtasks-"


class ExecuteRequest(BaseModel):
    """An execution by its id, as the queue sends it; or a spec, to be run in this very request."""

    model_config = ConfigDict(extra="forbid")

    execution_id: str | None = Field(default=None, min_length=1, max_length=200, pattern=PRINTABLE)
    evaluation: Spec | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.execution_id is None) == (self.evaluation is None):
            raise ValueError("give either execution_id or evaluation")
        return self


class ExecutionAnswer(BaseModel):
    """`state` is what the ledger recorded, now or before."""

    execution_id: str
    evaluation_id: UUID | None = None
    state: State | None = None
    attempt: int | None = None
    message: str


class InlineAnswer(BaseModel):
    evaluation: EvaluationView
    samples: list[SampleView]


class SweepAnswer(BaseModel):
    enqueued: int = Field(description="Cloud Tasks created for executions that were due.")
    transcripts_deleted: int = Field(description="Evaluations whose logs are gone now, being older than is kept.")
    checkpoints_deleted: int = Field(description="Evaluations of which no checkpoint is left behind any more.")


@router.post("/execute", responses=responses(400, 404, 409, 413, 422, 503))
async def execute(
    body: ExecuteRequest,
    request: Request,
    services: ServicesDep,
    caller: Caller,
    idempotency_key: IdempotencyKey = None,
    x_cloudtasks_taskname: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> ExecutionAnswer | InlineAnswer:
    """2xx only when the execution is terminal (or does not exist, and the queue asks): everything else is delivered
    again. 409 says: again, whoever comes next takes over, resumes, or finds it done."""
    if body.evaluation is not None:
        return await _inline(body.evaluation, services, caller, idempotency_key)
    assert body.execution_id is not None
    # for as long as the request lasts: also what goes wrong unexpectedly is told with it
    structlog.contextvars.bind_contextvars(**about(body.execution_id))
    headers = {name: value for name, value in request.headers.items() if name.startswith(PREFIX)}
    push = Push(body.execution_id, headers or None, traceparent=request.headers.get(HEADER), began=time.monotonic())
    answer = await services.executor.execute(push)
    shown = ExecutionAnswer(
        execution_id=answer.execution_id,
        evaluation_id=answer.evaluation_id,
        state=answer.state,
        attempt=answer.attempt,
        message=answer.message,
    )
    match answer.kind:
        case "terminal":
            return shown
        case "unknown" if x_cloudtasks_taskname:  # rows are committed before they are enqueued: it is gone, not late
            return shown
        case "unknown":
            raise NotFound(f"There is no execution {answer.execution_id!r}.")
        case "again":
            raise Again(answer.message)


async def _inline(spec: Spec, services: ServicesDep, caller: str, key: str | None) -> InlineAnswer:
    if key is None:
        raise InvalidRequest("Idempotency-Key: is required with an evaluation, so that sending it again is harmless.")
    evaluation_id = await services.inline.run(spec, caller, key)
    view = await services.reader.evaluation(evaluation_id)
    page = await services.reader.samples(evaluation_id, limit=services.settings.max_samples_inline)
    return InlineAnswer(evaluation=view, samples=page.samples)


@router.post("/sweep", responses=responses(503))
async def sweep(services: ServicesDep) -> SweepAnswer:
    """Enqueues what is due: rows that never got their Cloud Task, leases that ran out, Cloud Tasks that are gone. Then, for
    a few seconds, deletes what is older than is kept. To be called every minute; many at once do no harm."""
    executor, figures = services.executor, services.queue_figures
    if figures.wanted:  # only now is it asked how long things have been waiting: nothing polls
        figures.swept(*await executor.ledger.waiting())
    enqueued = await enqueue_due(executor.ledger, executor.queue)
    swept = await services.retention.sweep()
    return SweepAnswer(enqueued=enqueued, transcripts_deleted=swept.transcripts, checkpoints_deleted=swept.checkpoints)

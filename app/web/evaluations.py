"""Evaluations for their users."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import BaseModel, Field, StringConstraints

from app.evaluations.explain import Rules
from app.evaluations.submit import MAX_KEY
from app.evaluations.views import EvaluationExplanation, EvaluationPage, EvaluationView, ExecutionView, SamplePage
from app.ledger import EvaluationState
from app.spec import PRINTABLE, Spec
from app.web.problems import responses
from app.web.state import Caller, ServicesDep

router = APIRouter(tags=["evaluations"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_KEY,
        pattern=r"^[^\x00-\x1f\x7f-\xa0\xad]+$",  # what is not printable of a header's character set
        description=f"Up to {MAX_KEY} printable characters. The same key with the same spec gives the same evaluation"
        " again, so that a request whose answer was lost can be sent again.",
    ),
]

TagQuery = Annotated[str, StringConstraints(max_length=201, pattern=PRINTABLE)]
Cursor = Annotated[
    str | None, Query(description="`next` of the page before.", max_length=500, pattern=r"^[A-Za-z0-9_-]+$")
]
ExecutionId = Annotated[str, Path(min_length=1, max_length=200, pattern=PRINTABLE)]


class CancelView(BaseModel):
    id: UUID
    state: EvaluationState
    cancelled: int = Field(description="Executions that ended at once; running ones stop within a renewal (15 s).")


class RetryView(BaseModel):
    id: UUID
    state: EvaluationState
    executions: int = Field(description="Executions that run again.")


@router.post("/evaluations", status_code=202, responses=responses(400, 409, 413, 422, 503))
async def submit(
    spec: Spec, services: ServicesDep, caller: Caller, response: Response, idempotency_key: IdempotencyKey = None
) -> EvaluationView:
    """Submits an evaluation. It runs whether or not anybody waits for it."""
    submitted = await services.submissions.submit(spec, caller, idempotency_key)
    response.headers["Location"] = f"/evaluations/{submitted.evaluation_id}"
    view = await services.reader.evaluation(submitted.evaluation_id)
    return view.model_copy(update={"notes": await services.submissions.billing.notes(spec)})


@router.get("/evaluations", responses=responses(422, 503))
async def list_evaluations(
    services: ServicesDep,
    state: EvaluationState | None = None,
    tag: Annotated[
        list[TagQuery] | None, Query(description="`key=value`; may be given again: all must fit.", max_length=20)
    ] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> EvaluationPage:
    """Newest first."""
    return await services.reader.evaluations(state=state, tags=tag or (), cursor=cursor, limit=limit)


@router.get("/evaluations/{evaluation_id}", responses=responses(404, 422, 503))
async def get_evaluation(evaluation_id: UUID, services: ServicesDep) -> EvaluationView:
    return await services.reader.evaluation(evaluation_id)


@router.get("/evaluations/{evaluation_id}/samples", responses=responses(404, 422, 503))
async def list_samples(
    evaluation_id: UUID,
    services: ServicesDep,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> SamplePage:
    """All planned samples in the dataset's order, epoch by epoch, whatever became of them."""
    return await services.reader.samples(evaluation_id, cursor=cursor, limit=limit)


@router.get("/evaluations/{evaluation_id}/explanation", responses=responses(404, 422, 503))
async def explain_evaluation(evaluation_id: UUID, services: ServicesDep) -> EvaluationExplanation:
    """Why it is where it is, in sentences; and why the executions are that it waits for, or that failed."""
    return await services.reader.explanation(evaluation_id, Rules.of(services.settings))


@router.post("/evaluations/{evaluation_id}/cancel", status_code=202, responses=responses(404, 422, 503))
async def cancel(evaluation_id: UUID, services: ServicesDep) -> CancelView:
    """What is finished stays. Harmless on an evaluation that is over, and when sent again."""
    cancelled = await services.submissions.cancel(evaluation_id)
    return CancelView(id=evaluation_id, state=cancelled.state, cancelled=cancelled.executions)


@router.post("/evaluations/{evaluation_id}/retry", status_code=202, responses=responses(404, 409, 422, 503))
async def retry(evaluation_id: UUID, services: ServicesDep) -> RetryView:
    """Runs again what failed or was cancelled in an evaluation that is over; samples that have a score keep it."""
    armed = await services.submissions.retry(evaluation_id)
    return RetryView(id=evaluation_id, state="running", executions=armed)


@router.get("/executions/{execution_id}", responses=responses(404, 422, 503))
async def get_execution(execution_id: ExecutionId, services: ServicesDep) -> ExecutionView:
    """One unit of queue work, with every attempt at it; and in sentences, why it is where it is."""
    return await services.reader.execution(execution_id, Rules.of(services.settings))

"""Submitting, cancelling and retrying: a ledger transition, then the Cloud Task it calls for.

The row is the outbox: if the Cloud Task cannot be made now, the sweeper makes up for it, and the caller need not know.
"""

from dataclasses import dataclass, field
from uuid import UUID

import structlog
from opentelemetry.trace import Tracer

from app.errors import Conflict, InvalidRequest, NotFound
from app.evaluations.allowed import Allowed
from app.evaluations.billing import Billing
from app.ledger import Cancelled, Enqueue, Ledger, Submitted
from app.queue import Queue, enqueue, enqueue_due
from app.spec import Spec
from app.tracing import NO_TRACER, begin, tell, to_text

MAX_KEY = 200
"""Characters of an idempotency key. Ours: a UUID has 36, a path with a date some 100."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Submissions:
    ledger: Ledger
    queue: Queue
    allowed: Allowed = field(default_factory=Allowed)
    billing: Billing = field(default_factory=Billing)
    tracer: Tracer = NO_TRACER

    async def submit(self, spec: Spec, caller: str, idempotency_key: str | None = None) -> Submitted:
        """The same key and spec give the same evaluation again; the same key and another spec are refused."""
        with begin(self.tracer, "submit") as span:
            submitted = await self.register(spec, caller, idempotency_key)
            tell(span, evaluation=submitted.evaluation_id, created=submitted.created)
            if submitted.created:
                await enqueue(
                    self.ledger, self.queue, [Enqueue(f"{submitted.evaluation_id}.plan", 1, to_text(), spec.queue)]
                )
        return submitted

    async def register(self, spec: Spec, caller: str, idempotency_key: str | None) -> Submitted:
        """The rows only; nobody enqueues them for two minutes."""
        if idempotency_key is not None and not (0 < len(idempotency_key) <= MAX_KEY and idempotency_key.isprintable()):
            raise InvalidRequest(f"Idempotency-Key: must have 1 to {MAX_KEY} printable characters.")
        self.allowed.check(spec)
        if idempotency_key is not None and self.allowed.secrets.occur_in(idempotency_key):
            raise InvalidRequest("Idempotency-Key: it is stored, so it must not hold a key of the service.")
        await self.billing.check(spec)
        submitted = await self.ledger.submit(spec, caller, idempotency_key, to_text())
        if not submitted.same:
            raise Conflict(
                f"Idempotency-Key {idempotency_key!r} already stands for another spec, that of evaluation"
                f" {submitted.evaluation_id}. Send the same spec, or another key."
            )
        log.info("evaluation submitted", evaluation=str(submitted.evaluation_id), created=submitted.created)
        return submitted

    async def cancel(self, evaluation_id: UUID) -> Cancelled:
        cancelled = await self.ledger.cancel(evaluation_id)
        if cancelled is None:
            raise NotFound(f"There is no evaluation {evaluation_id}.")
        log.info("cancellation requested", evaluation=str(evaluation_id), cancelled=cancelled.executions)
        if cancelled.report:
            await enqueue(self.ledger, self.queue, [cancelled.report])
        return cancelled

    async def retry(self, evaluation_id: UUID) -> int:
        """How many executions are pending again."""
        result = await self.ledger.retry(evaluation_id)
        if result is None:
            raise NotFound(f"There is no evaluation {evaluation_id}.")
        state, armed = result
        if state == "running":
            raise Conflict(f"Evaluation {evaluation_id} is still running: cancel it, or wait until it has ended.")
        if state == "expired":
            raise Conflict(
                f"The transcripts of evaluation {evaluation_id} were deleted, being older than is kept, so it could not be"
                " reported again. Its results stand; to run it again, submit its spec anew."
            )
        if state == "tidied":
            raise Conflict(
                f"What is left over of evaluation {evaluation_id} is just being deleted: try again in a minute."
            )
        if not armed:
            raise Conflict(f"Evaluation {evaluation_id} {state}, and none of its samples failed: nothing to retry.")
        log.info("evaluation retried", evaluation=str(evaluation_id), executions=armed)
        await enqueue_due(self.ledger, self.queue)
        return armed

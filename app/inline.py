"""A whole evaluation in one request, for a person debugging by curl.

It takes the same way as any other: rows in the ledger, claims, children, settles. Only the pushes are made here instead of
by the queue; if the request dies, the sweeper enqueues what is left.
"""

import asyncio
import time
from dataclasses import dataclass
from uuid import UUID, uuid4

from opentelemetry.trace import Span

from app.errors import Conflict, InvalidRequest
from app.evaluations.read import Reader
from app.evaluations.submit import Submissions
from app.execution import Executor, Push
from app.runner.messages import Done, Job, Planned
from app.runner.supervisor import Crashed
from app.spec import Spec
from app.tracing import begin, tell, to_text

RUNS_DUE = 600
"""Seconds after which the sweeper may enqueue runs that this request left behind. Ours: as after a release."""

AT_ONCE = 4
"""Samples that one request runs at the same time. Ours: a quarter of what a worker takes."""


@dataclass(frozen=True)
class Inline:
    executor: Executor
    submissions: Submissions
    reader: Reader

    async def run(self, spec: Spec, caller: str, key: str) -> UUID:
        """The evaluation, at its end. A spec that cannot run, or has too many samples, is refused and leaves no trace."""
        with begin(self.executor.tracer, "submit") as span:
            return await self._run(spec, caller, key, span)

    async def _run(self, spec: Spec, caller: str, key: str, span: Span) -> UUID:
        began = time.monotonic()
        self.submissions.allowed.check(spec)  # before its code is loaded
        if await self.reader.by_key(caller, key) is None:
            await self._check(spec)
        evaluation = (await self.submissions.register(spec, caller, key)).evaluation_id
        tell(span, evaluation=evaluation)
        limit = asyncio.Semaphore(AT_ONCE)
        while unfinished := await self.executor.ledger.unfinished(evaluation):
            pushes = [self._push(evaluation, execution_id, began, limit) for execution_id in unfinished]
            # all are heard out before the first error is told: what they have claimed, they also settle
            for outcome in await asyncio.gather(*pushes, return_exceptions=True):
                if outcome is not None:
                    raise outcome
        return evaluation

    async def _push(self, evaluation: UUID, execution_id: str, began: float, limit: asyncio.Semaphore) -> None:
        async with limit:
            push = Push(execution_id, alone=True, runs_due=RUNS_DUE, traceparent=to_text(), began=began)
            answer = await self.executor.execute(push)
        if answer.kind == "again" and answer.state != "pending":
            raise Conflict(f"{answer.message} See GET /evaluations/{evaluation}.")

    async def _check(self, spec: Spec) -> None:
        """Plans without the ledger: a mistake in the spec is answered at once."""
        name = f"check-{uuid4()}"
        async with self.executor.scratch.folder(name) as folder:
            job = Job(
                kind="plan",
                evaluation_id=name,
                execution_id=name,
                attempt=1,
                spec=spec,
                directory=str(folder),
                containment=await self.executor.contained.here(),
            )
            samples = 0
            async with self.executor.supervisor.run(job) as child:
                async for message in child:
                    match message:
                        case Planned():
                            samples = len(message.samples)
                        case Done(failure=failure) if failure:
                            raise InvalidRequest(failure.message)
                        case Crashed():
                            raise InvalidRequest(f"Planning it crashed: {message}")
        most = self.executor.settings.max_samples_inline
        if samples > most:
            raise InvalidRequest(
                f"It has {samples} samples × epochs; one request runs at most {most}. Set `limit`, or send it to"
                " POST /evaluations, which has no such bound."
            )

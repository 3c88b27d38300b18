"""One push, from the claim to the answer: the story that everything else serves.

The service holds no database connection while the child runs: results are recorded as samples end, leases are renewed by
one statement for the whole worker, and the end is settled in one statement that may be sent as often as it takes.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import structlog

from app.artifacts import Artifacts
from app.errors import DatabaseUnavailable
from app.leases import Lease, Leases
from app.ledger import Claim, Ledger, Settled, Settlement, State
from app.outcomes import Heard, Stopped, crashed, foreseen, nothing_to_report, planned, ran, reported, stopped, unheard
from app.queue import Queue, enqueue, enqueue_due
from app.runner.messages import (
    ENDED,
    LOGS,
    Checkpointed,
    Done,
    Failure,
    Job,
    Message,
    Planned,
    Progress,
    Reported,
    SampleEnded,
    SampleResult,
    Started,
)
from app.runner.supervisor import Child, Crashed, Supervisor
from app.settings import Settings

PLAN_LOG = "plan.eval"

_Why = Stopped | Literal["lost"]
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Push:
    """One delivery of an execution. `headers`: the queue's, for the history; `began`: when it arrived (monotonic seconds);
    `alone`: whoever pushes also pushes what comes next, so it is not enqueued; `runs_due`: seconds until the sweeper may
    enqueue what a plan fans out to, should they fail to."""

    execution_id: str
    headers: dict[str, str] | None = None
    alone: bool = False
    runs_due: float = 0
    began: float = field(default_factory=time.monotonic)
    claim_id: UUID = field(default_factory=uuid4)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the push came to. `terminal`: the queue may forget it; `again`: it must deliver again; `unknown`: there is no
    such execution. `state` is the execution's, as recorded."""

    kind: Literal["terminal", "again", "unknown"]
    execution_id: str
    message: str
    state: State | None = None
    attempt: int | None = None
    evaluation_id: UUID | None = None


@dataclass(frozen=True)
class Executor:
    """What a worker needs to execute pushes."""

    ledger: Ledger
    queue: Queue
    artifacts: Artifacts
    supervisor: Supervisor
    leases: Leases
    settings: Settings

    async def execute(self, push: Push) -> Answer:
        """Claims, runs, settles, enqueues what comes next, and answers. Raises only what is nobody's outcome:
        `DatabaseUnavailable`, and mistakes of ours."""
        claim = await self.ledger.claim(push.execution_id, push.claim_id, push.headers)
        if claim is None:
            return Answer("unknown", push.execution_id, "There is no such execution.")
        if not claim.granted:
            return _refused(claim)
        with structlog.contextvars.bound_contextvars(
            evaluation=str(claim.evaluation_id), execution=claim.execution_id, attempt=claim.attempt
        ):
            return await self._act(claim, push)

    async def _act(self, claim: Claim, push: Push) -> Answer:
        async with self.leases.hold(claim.execution_id, claim.attempt) as lease:
            settlement = foreseen(claim, self.settings.max_crashes) or await self._try(claim, push, lease)
            if settlement is None:
                return _again(claim, "Another attempt holds it now.")
            settled = await self.ledger.settle(claim.execution_id, claim.attempt, settlement)
        if settled is None or settled.verdict == "stale":
            return _again(claim, "Another attempt holds it now; nothing of this one was recorded.")
        _tell(claim, settlement, settled, push)
        if not push.alone:
            await self._enqueue_next(settled)
        return _settled(claim, settlement, settled)

    async def _try(self, claim: Claim, push: Push, lease: Lease) -> Settlement | None:
        """A mistake of ours must not hold the execution until its lease ends, nor come back for ever."""
        try:
            return await self._attempt(claim, push, lease)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            log.exception("the attempt failed unexpectedly")
            return crashed(Heard(crash=f"The worker met an unexpected {type(error).__name__}: {error}"))

    async def _attempt(self, claim: Claim, push: Push, lease: Lease) -> Settlement | None:
        """None: the lease was lost, and with it the right to say anything."""
        async with self._scratch(claim) as directory:
            job = await self._prepare(claim, directory)
            if isinstance(job, Settlement):
                return job
            heard = Heard()
            async with self.supervisor.run(job) as child:
                why = await self._listen(child, lease, push, _Ear(self, job, lease, heard))
            if why == "lost":
                return None
            if why is None and heard.crash is None:
                return await self._conclude(claim, job, heard, push)
            for name in heard.logs():
                await self.ship(job, ENDED, name)
            return stopped(why, heard, time.monotonic() - push.began) if why else crashed(heard)

    async def _prepare(self, claim: Claim, directory: Path) -> Job | Settlement:
        """The child's work; or the end at once, if there is none to do."""
        job = Job(
            kind=claim.kind,
            evaluation_id=str(claim.evaluation_id),
            execution_id=claim.execution_id,
            attempt=claim.attempt,
            spec=claim.spec,
            directory=str(directory),
            merged_log_limit_bytes=self.settings.merged_log_limit,
        )
        if claim.kind == "run":
            scored = await self.ledger.scored(claim)
            left = tuple(s for s in claim.samples if (str(s.id), s.epoch) not in scored)
            return job.model_copy(update={"samples": left}) if left else Settlement("succeeded")
        if claim.kind == "report":
            plan = await self.ledger.plan(claim.evaluation_id)
            to_report = await self.ledger.to_report(claim.evaluation_id)
            if plan.state != "succeeded" or not to_report.transcripts:
                return nothing_to_report(to_report.missing, plan.error)
            plan_log = self.artifacts.url(job.evaluation_id, f"{job.evaluation_id}.plan", plan.attempt, PLAN_LOG)
            return job.model_copy(update={"plan_log": plan_log, "transcripts": to_report.transcripts})
        return job

    async def _listen(self, child: Child, lease: Lease, push: Push, ear: "_Ear") -> "_Why | None":
        """Hears the child out (None), or says why it must be stopped."""
        left = self.settings.dispatch_deadline - self.settings.deadline_margin - (time.monotonic() - push.began)
        hearing = asyncio.create_task(ear.hear(child))
        try:
            either: set[asyncio.Future[Any]] = {hearing, lease.ended}
            done, _ = await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _quietly(hearing)
            return "drain"
        if hearing in done:
            hearing.result()
            return None
        await _quietly(hearing)
        if not done:
            return "deadline"
        why = lease.ended.result()
        if why == "lost":
            child.kill()  # what it does from here on could not be recorded
        return why

    async def _conclude(self, claim: Claim, job: Job, heard: Heard, push: Push) -> Settlement:
        """Ships what the end refers to, then says what the child's words come to."""
        if claim.kind == "run":
            for name in heard.logs():
                await self.ship(job, LOGS, name)
            return ran(claim, heard)
        if claim.kind == "plan":
            if heard.planned:
                await self.ship(job, LOGS, heard.planned.log, PLAN_LOG)
            return planned(claim, heard, max_samples=self.settings.max_samples, runs_due=push.runs_due)
        missing = (await self.ledger.to_report(claim.evaluation_id)).missing
        merged = await self.ship(job, LOGS, heard.reported.log) if heard.reported else None
        return reported(claim, heard, missing, merged)

    def url(self, job: Job, name: str) -> str:
        return self.artifacts.url(job.evaluation_id, job.execution_id, job.attempt, name)

    async def ship(self, job: Job, folder: str, name: str, as_name: str | None = None) -> str:
        """Copies a log of the attempt to the artifacts; returns its URL there."""
        url = self.url(job, as_name or name)
        await self.artifacts.ship(Path(job.directory, folder, name), url)
        return url

    async def _enqueue_next(self, settled: Settled) -> None:
        if settled.report:
            await enqueue(self.ledger, self.queue, [settled.report])
        if settled.runs:
            await enqueue_due(self.ledger, self.queue)

    @asynccontextmanager
    async def _scratch(self, claim: Claim) -> AsyncIterator[Path]:
        """The attempt's own local folder; on Cloud Run it is memory, so it goes with the attempt."""
        directory = (self.settings.scratch / claim.execution_id / str(claim.attempt)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            yield directory
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            with suppress(OSError):  # another attempt's folder is beside it
                directory.parent.rmdir()


class _Ear:
    """Takes in what a child says, and records samples on the way. The last sample's record is the settle's."""

    def __init__(self, executor: Executor, job: Job, lease: Lease, heard: Heard) -> None:
        self._executor = executor
        self._job = job
        self._lease = lease
        self._heard = heard

    async def hear(self, child: Child) -> None:
        async for message in child:
            await self._take(message)

    async def _take(self, message: Message | Crashed) -> None:
        heard = self._heard
        match message:
            case Started():
                heard.started = message
            case Progress():
                heard.progress = message
                self._lease.progress = message.model_dump(exclude={"type"})
            case Planned():
                heard.planned = message
            case SampleEnded(result=result):
                await self._record(result)
            case Reported():
                heard.reported = message
            case Done(failure=failure):
                heard.failure = failure
            case Crashed():
                heard.crash = str(message)
            case Checkpointed():
                pass

    async def _record(self, result: SampleResult) -> None:
        """The log goes before the row: what the ledger points at is there."""
        job, executor = self._job, self._executor
        self._heard.samples.append((result, executor.url(job, result.log)))
        if unheard(job.samples, self._heard):
            await executor.ship(job, ENDED, result.log)
            if not await executor.ledger.record(job.execution_id, job.attempt, self._heard.samples[-1:]):
                self._lease.end("lost")


async def _quietly(task: asyncio.Task[None]) -> None:
    """Ends a task whose result nobody wants any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()):
        log.warning("listening to the child ended with an error", error=str(error))


def _refused(claim: Claim) -> Answer:
    if claim.verdict == "over":
        message = f"It is over: {claim.state}." + (f" {claim.error['message']}" if claim.error else "")
        return Answer("terminal", claim.execution_id, message, claim.state, claim.attempt, claim.evaluation_id)
    return _again(claim, f"{claim.holder} holds it (attempt {claim.attempt}), for {claim.lease_left or 0:.0f} s more.")


def _again(claim: Claim, message: str) -> Answer:
    return Answer("again", claim.execution_id, message, "running", claim.attempt, claim.evaluation_id)


def _settled(claim: Claim, settlement: Settlement, settled: Settled) -> Answer:
    message = settlement.error.message if settlement.error else f"It {settled.state}."
    kind: Literal["terminal", "again"] = "again" if settled.state == "pending" else "terminal"
    return Answer(kind, claim.execution_id, message, settled.state, claim.attempt, claim.evaluation_id)


def _tell(claim: Claim, settlement: Settlement, settled: Settled, push: Push) -> None:
    """One line for each attempt, with its figures."""
    error: Failure | None = settlement.error
    log.info(
        "attempt ended",
        kind=claim.kind,
        outcome=settlement.outcome,
        state=settled.state,
        seconds=round(time.monotonic() - push.began, 3),
        samples=len(settlement.samples),
        cost=settlement.cost,
        error=error.message if error else None,
        error_class=error.error_class if error else None,
    )

"""One push, from the claim to the answer: the story that everything else serves.

The service holds no database connection while the child runs: results are recorded as samples end, leases are renewed by
one statement for the whole worker, and the end is settled in one statement that may be sent as often as it takes.
"""

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import anyio
import structlog
from opentelemetry.trace import Tracer, get_current_span

from app.artifacts import Artifacts
from app.containment import Contained
from app.errors import DatabaseUnavailable
from app.hearing import Ear
from app.leases import Lease, Leases
from app.ledger import Claim, Ledger, Settled, Settlement, State
from app.metrics import RunnerFigures
from app.outcomes import (
    Heard,
    Stopped,
    cost_of,
    crashed,
    errored,
    foreseen,
    given_up,
    nothing_to_report,
    planned,
    ran,
    reported,
    stopped,
    usage_of,
    without_artifacts,
)
from app.queue import Queue, enqueue, enqueue_due
from app.recording import settle
from app.redaction import Secrets
from app.runner.messages import ENDED, LOGS, Failure, Job
from app.runner.supervisor import Child, Supervisor
from app.saved import Saved, Shipping
from app.scratch import Scratch
from app.settings import Settings
from app.store import StoreUnavailable
from app.tracing import NO_TRACER, about, begin, failed, span, tell
from app.versions import IMAGE, mixed

PLAN_LOG, EARLIER_PLAN_LOG = "plan.header", "plan.eval"
"""The merged log begins with it, so to a reader of logs they would be two of one evaluation. Earlier versions of Proctor gave
it a name that is a log's."""

RETRY_COUNT, ETA = "x-cloudtasks-taskretrycount", "x-cloudtasks-tasketa"

LOST = Settlement("interrupted", cause="lease lost")
"""What an attempt came to that has lost the right to say so."""

DEADLINE_PAUSE = 0.5
"""Share of the deadline's margin in which a child may finish its turn; the rest is for ending, shipping and settling."""

DRAIN_SHIPPING = 3.0
"""Seconds for the logs of samples that ended, of the same 10: with none to spare the lease would be lost as well."""

DRAIN_PAUSE, DRAIN_GRACE = 2.0, 2.5
"""Seconds for a child to finish its turn, and then to end. Ours: of the 10 s that Cloud Run gives; the rest is for shipping
and settling."""

AT_ONCE = 0.5
"""Share of a push's time within which another attempt may begin in the same push. Ours: it needs as long as the first."""

_Why = Stopped | Literal["lost"]
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Push:
    """One delivery of an execution. `headers`: the queue's, for the history; `began`: when it arrived (monotonic seconds);
    `alone`: whoever pushes also pushes what comes next, so it is not enqueued; `runs_due`: seconds until the sweeper may
    enqueue what a plan fans out to, should they fail to; `traceparent`: of the evaluation's trace."""

    execution_id: str
    headers: dict[str, str] | None = None
    alone: bool = False
    runs_due: float = 0
    traceparent: str | None = None
    began: float = field(default_factory=time.monotonic)
    claim_id: UUID = field(default_factory=uuid4)

    @property
    def retry_count(self) -> int | None:
        """How often the queue has delivered the Cloud Task before; None: it is not the queue's, or does not say."""
        count = (self.headers or {}).get(RETRY_COUNT, "")
        return int(count) if count.isdecimal() else None

    @property
    def queue_seconds(self) -> float | None:
        """From when the queue meant to deliver it until it arrived, as far as two clocks agree; None: it does not say."""
        try:
            due = float((self.headers or {})[ETA])
        except (KeyError, ValueError):
            return None
        arrived = time.time() - (time.monotonic() - self.began)
        return round(arrived - due, 3)


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
    at_once: bool = False
    """The next attempt need not wait for the queue."""


@dataclass(frozen=True)
class Executor:
    """What a worker needs to execute pushes."""

    ledger: Ledger
    queue: Queue
    artifacts: Artifacts
    saved: Saved
    scratch: Scratch
    supervisor: Supervisor
    contained: Contained
    leases: Leases
    settings: Settings
    tracer: Tracer = NO_TRACER
    figures: RunnerFigures = field(default_factory=RunnerFigures)
    secrets: Secrets = field(default_factory=Secrets)
    """Taken out of what the ledger is told; of a child's words the supervisor has taken them."""

    async def execute(self, push: Push) -> Answer:
        """Claims, runs, settles, enqueues what comes next, and answers. Raises only what is nobody's outcome:
        `DatabaseUnavailable`, and mistakes of ours."""
        fields = about(push.execution_id)
        with (
            structlog.contextvars.bound_contextvars(**fields),
            begin(self.tracer, "push", push.traceparent, **fields, retry_count=push.retry_count) as span,
        ):
            answer = await self._execute(push)
            while answer.at_once and self._has_time(push):
                push = replace(push, claim_id=uuid4())
                answer = await self._execute(push)
            tell(span, answer=answer.kind, state=answer.state)
            return answer

    def _has_time(self, push: Push) -> bool:
        """For another attempt at what failed by the task's own fault, for which there is nothing to wait for."""
        gone = time.monotonic() - push.began
        return gone <= self.settings.dispatch_deadline * AT_ONCE and not self.leases.draining

    async def _execute(self, push: Push) -> Answer:
        if self.leases.draining:
            return Answer("again", push.execution_id, "This worker is about to end: another will take it.")
        with self.leases.claiming(), span("claim") as claiming:
            claim = await self.ledger.claim(push.execution_id, push.claim_id, push.headers)
            if claim is not None:
                tell(claiming, verdict=claim.verdict, attempt=claim.attempt)
        if claim is None:
            if (
                push.headers
            ):  # the queue's: rows are committed before they are enqueued, so it is gone, and should not be
                log.error("there is no such execution", execution=push.execution_id)
            return Answer("unknown", push.execution_id, "There is no such execution.")
        if not claim.granted:
            await self._supersede(claim)  # whoever ended it may not have come to that
            return _refused(claim)
        with structlog.contextvars.bound_contextvars(attempt=claim.attempt):
            tell(get_current_span(), attempt=claim.attempt, kind=claim.kind)
            try:
                answer = await self._act(claim, push)
            except DatabaseUnavailable as error:
                log.warning("the attempt could not be settled: another will take over", reason=str(error))
                raise
            await self._supersede(claim)
            return answer

    async def _act(self, claim: Claim, push: Push) -> Answer:
        image = self.settings.image
        cancellable, heard = claim.kind != "report", Heard(versions={IMAGE: image} if image else {})
        async with self.leases.hold(claim.execution_id, claim.attempt, cancellable=cancellable) as lease:
            settlement = foreseen(claim) or await self._try(claim, push, lease, heard)
            if settlement is None:
                await self._tell_spent(claim, heard)
                _tell(claim, LOST, None, push, heard)
                return _again(claim, "Another attempt holds it now.")
            if claim.kind == "report" and settlement.outcome != "interrupted" and not lease.lost:
                # what others could not delete: now, for once the evaluation is over a retry may be writing more
                await self.saved.discard(str(claim.evaluation_id))
            lease.settling = True
            with span("settle", outcome=settlement.outcome) as settling:
                settlement, settled = await settle(self.ledger, claim, settlement)
                tell(settling, verdict=settled.verdict if settled else None)
        _tell(claim, settlement, settled, push, heard)
        if settled is None or settled.verdict == "stale":
            await self._tell_spent(claim, heard)
            return _again(claim, "Another attempt holds it now; nothing of this one was recorded.")
        try:
            if claim.kind == "run" and settled.state == "failed":
                await self._stop_if_exceeded(claim)
            if not push.alone:
                await self._enqueue_next(settled)
        except DatabaseUnavailable as error:  # it is recorded all the same, and what comes next is due in the ledger
            log.warning("settled, but the database is away: what comes next waits for the sweeper", reason=str(error))
        if claim.kind == "run" and settlement.outcome != "interrupted":  # nobody resumes from what has ended
            await self.saved.discard(str(claim.evaluation_id), claim.execution_id, through=claim.attempt)
        return _settled(claim, settlement, settled)

    async def _tell_spent(self, claim: Claim, heard: Heard) -> None:
        """Nothing of this attempt is recorded, and yet it has spent."""
        if (usage := usage_of(heard)) is None:
            return
        try:
            await self.ledger.spent(claim.execution_id, claim.attempt, usage, cost_of(heard))
        except DatabaseUnavailable as error:
            log.warning("what a lost attempt has spent could not be told", reason=str(error), usage=usage)

    async def _try(self, claim: Claim, push: Push, lease: Lease, heard: Heard) -> Settlement | None:
        """A mistake of ours must not hold the execution until its lease ends, nor come back for ever."""
        try:
            return await self._attempt(claim, push, lease, heard)
        except DatabaseUnavailable:
            raise
        except StoreUnavailable as error:
            log.warning("the artifact store does not answer: the attempt is given back", reason=str(error))
            away = heard.started is None or not await self._store_answers(claim)
            return without_artifacts(heard, self.secrets.redact(str(error)), away=away)
        except Exception as error:
            log.exception("the attempt failed unexpectedly")
            reason = self.secrets.redact(str(error))
            heard.leave_unstored()
            heard.crash = f"The worker met an unexpected {type(error).__name__}: {reason}"
            return given_up(claim, self.settings.max_crashes) or crashed(heard)

    async def _store_answers(self, claim: Claim) -> bool:
        try:
            await self.artifacts.probe(self.artifacts.url(str(claim.evaluation_id), claim.execution_id, claim.attempt))
        except OSError:
            return False
        return True

    async def _attempt(self, claim: Claim, push: Push, lease: Lease, heard: Heard) -> Settlement | None:
        """None: the lease was lost, and with it the right to say anything."""
        async with self.scratch.folder(claim.execution_id, claim.attempt) as directory:
            with span("prepare"):
                ready = await lease.unless_ended(lambda: self._ready(claim, directory, heard))
            if ready is None:
                reason = lease.ended.result()
                return None if reason == "lost" else stopped(reason, heard, time.monotonic() - push.began)
            job, last = ready
            if isinstance(job, Settlement):
                return job
            shipping = Shipping(self.artifacts, job, heard, lambda: self._further(claim))
            ear = Ear(
                self.ledger,
                self.artifacts,
                job,
                lease,
                shipping,
                last,
                figures=self.figures,
                heard=heard,
                on_error=lambda: self._stop_early(claim, lease, heard),
            )
            with span("run", kind=claim.kind, resumes=job.resumes) as running:
                async with shipping, self.supervisor.run(job) as child:
                    why = await self._listen(child, lease, push, ear)
                heard.memory_peak_bytes = child.peak_bytes
                tell(running, stopped=why, memory_peak_bytes=child.peak_bytes)
            if why == "lost":
                return None
            if why is None and ear.heard.crash is None:
                settlement = await self._conclude(claim, job, ear.heard, push)
                await self.saved.keep(job, settlement)
                return settlement
            await self._ship_ended(job, heard, DRAIN_SHIPPING if why == "drain" else None)
            return stopped(why, ear.heard, time.monotonic() - push.began) if why else crashed(ear.heard)

    async def _ready(self, claim: Claim, directory: Path, heard: Heard) -> tuple[Job | Settlement, int | None]:
        """What there is to do, when a child can be had for it; and which attempt was the last to be interrupted."""
        interrupted = await self.ledger.interrupted(claim)
        job = await self._prepare(claim, directory, interrupted)
        if isinstance(job, Job):
            if job.resumes is not None:
                heard.earlier_versions = await self.saved.made_by(job, job.resumes)
            await self.supervisor.warm()
        return job, interrupted[0] if interrupted else None

    async def _prepare(self, claim: Claim, directory: Path, interrupted: list[int]) -> Job | Settlement:
        """The child's work; or the end at once, if there is none to do."""
        job = Job(
            kind=claim.kind,
            evaluation_id=str(claim.evaluation_id),
            execution_id=claim.execution_id,
            attempt=claim.attempt,
            spec=claim.spec,
            directory=str(directory),
            containment=await self.contained.here(),
            prices=self.settings.model_prices,
        )
        left = await self.saved.left_by(job, interrupted)
        if left.outcome is not None and left.outcome_of is not None:
            log.info("recording what an earlier attempt came to", outcome=left.outcome.outcome, of=left.outcome_of)
            if claim.kind == "plan" and left.outcome.runs:
                await self.saved.take_over(job, left.outcome_of, await self._plan_log(claim, left.outcome_of))
            return left.outcome
        if given_up_now := given_up(claim, self.settings.max_crashes):
            return given_up_now
        if interrupted:  # before anything is spent again on what may not be kept
            await self.artifacts.probe(self.artifacts.url(job.evaluation_id, job.execution_id, job.attempt))
        match claim.kind:
            case "run":
                return await self._prepare_run(claim, job, left.resumable)
            case "report":
                return await self._prepare_report(claim, job)
            case "plan":
                return job

    async def _prepare_run(self, claim: Claim, job: Job, resumable: int | None) -> Job | Settlement:
        scored = await self.ledger.scored(claim)
        done = tuple(s for s in claim.samples if (str(s.id), s.epoch) in scored)
        if len(done) == len(claim.samples):
            return Settlement("succeeded")
        if claim.stop_reason:  # nothing further starts; but what an earlier attempt came to has been recorded
            return Settlement("cancelled", error=Failure(error_class="evaluation", message=claim.stop_reason))
        if resumable is not None:
            await self.saved.fetch(job, resumable)
        return job.model_copy(
            update={"samples": claim.samples, "digests": claim.digests, "scored": done, "resumes": resumable}
        )

    async def _prepare_report(self, claim: Claim, job: Job) -> Job | Settlement:
        plan = await self.ledger.plan(claim.evaluation_id)
        to_report = await self.ledger.to_report(claim.evaluation_id)
        if plan.state != "succeeded" or not to_report.transcripts:
            return nothing_to_report(to_report.missing, plan.error)
        name = await self._plan_log(claim, plan.attempt)
        plan_log = self.artifacts.url(job.evaluation_id, f"{job.evaluation_id}.plan", plan.attempt, name)
        update = {"plan_log": plan_log, "transcripts": to_report.transcripts, "artifacts": self.settings.artifacts}
        return job.model_copy(update=update)

    async def _plan_log(self, claim: Claim, attempt: int) -> str:
        """Its name in the folder of an attempt at the plan."""
        evaluation = str(claim.evaluation_id)
        names = await self.artifacts.names(self.artifacts.url(evaluation, f"{evaluation}.plan", attempt))
        return EARLIER_PLAN_LOG if EARLIER_PLAN_LOG in names else PLAN_LOG

    async def _listen(self, child: Child, lease: Lease, push: Push, ear: Ear) -> "_Why | None":
        """Hears the child out (None), or says why it must be stopped."""
        hearing = asyncio.create_task(ear.hear(child))
        try:
            why = await self._until_stopped(child, hearing, lease, push, ear)
        except asyncio.CancelledError:
            why = "drain"
        if hearing.done():
            hearing.result()
            return None
        await _quietly(hearing)
        if why == "lost":
            child.kill()  # what it does from here on could not be recorded
        if why == "drain":
            child.grace = DRAIN_GRACE
        return why

    async def _until_stopped(
        self, child: Child, hearing: asyncio.Task[None], lease: Lease, push: Push, ear: Ear
    ) -> "_Why | None":
        """Returns when the child has ended, or must end: after the turn it is in, if there is time."""
        margin = self.settings.deadline_margin
        left = self.settings.dispatch_deadline - margin - (time.monotonic() - push.began)
        if not await _any({hearing, lease.ended}, left):
            child.wind_down()
            await _any({hearing, ear.paused, lease.ended}, margin * DEADLINE_PAUSE)
            return lease.ended.result() if lease.ended.done() else "deadline"
        if not lease.ended.done():
            return None
        why = lease.ended.result()
        if why == "drain":
            child.wind_down()
            await _any({hearing, ear.paused}, DRAIN_PAUSE)
        return why

    async def _conclude(self, claim: Claim, job: Job, heard: Heard, push: Push) -> Settlement:
        """Ships what the end refers to, then says what the child's words come to."""
        if claim.kind == "run":
            for name in heard.logs():
                await self.ship(job, LOGS, name)
            return ran(claim, heard, [sample for sample in job.samples if sample not in job.scored])
        if claim.kind == "plan":
            if heard.planned:
                await self.ship(job, LOGS, heard.planned.log, PLAN_LOG)
            return planned(claim, heard, max_samples=self.settings.max_samples, runs_due=push.runs_due)
        missing = (await self.ledger.to_report(claim.evaluation_id)).missing
        folder = (job.evaluation_id, job.execution_id, job.attempt)
        merged = (
            self.artifacts.url(*folder, heard.reported.log) if heard.reported else None
        )  # its child has put it there
        differing = mixed(await self.ledger.versions(claim.evaluation_id))
        if any(mixture.flagged for mixture in differing):
            log.warning("results of mixed versions", differing={m.name: m.samples for m in differing})
        return reported(claim, heard, missing, merged, differing)

    async def ship(self, job: Job, folder: str, name: str, as_name: str | None = None) -> str:
        """Copies a log of the attempt to the artifacts; returns its URL there."""
        store = self.artifacts.transcripts if job.kind == "run" else self.artifacts
        url = store.url(job.evaluation_id, job.execution_id, job.attempt, as_name or name)
        await self.artifacts.ship(Path(job.directory, folder, name), url)
        return url

    async def _ship_ended(self, job: Job, heard: Heard, seconds: float | None) -> None:
        """The log of what ended before the attempt had to. What cannot be shipped, in the time there is, did not end."""
        shipped = False
        with anyio.move_on_after(seconds):
            try:
                for name in heard.logs():
                    await self.ship(job, ENDED, name)
                shipped = True
            except StoreUnavailable as error:
                log.warning("the logs of samples that ended could not be shipped", reason=str(error))
        if not shipped:
            heard.leave_unstored()

    async def _further(self, claim: Claim) -> None:
        """A checkpoint is progress: crashes before it do not count any more."""
        if claim.crashes:
            await self.ledger.record(claim.execution_id, claim.attempt, [])

    async def _stop_early(self, claim: Claim, lease: Lease, heard: Heard) -> None:
        """While the attempt goes on: its own further samples shall not start either."""
        if (so_far := errored(claim, heard)) and await self._stop_if_exceeded(claim, so_far):
            lease.end("stop")

    async def _stop_if_exceeded(self, claim: Claim, so_far: int = 0) -> bool:
        """Whether the evaluation is stopped now. What the database cannot be told, the next error or the report makes up
        for."""
        try:
            stop = await self.ledger.stop_if_exceeded(claim.evaluation_id, claim.execution_id, claim.attempt, so_far)
        except DatabaseUnavailable as error:
            log.warning("it could not be seen whether too many samples errored", reason=str(error))
            return False
        if stop is None:
            return False
        if stop.executions:
            log.warning("evaluation stopped", reason=stop.reason, executions=stop.executions)
        if stop.report:
            await enqueue(self.ledger, self.queue, [stop.report])
        return True

    async def _supersede(self, claim: Claim) -> None:
        """An evaluation's folder has one log that counts, however many reports there were: those before, and those of
        attempts that could not record theirs, are deleted. For whoever comes last to do."""
        if claim.kind != "report":
            return
        try:
            counted = await self.ledger.counted_log(claim.evaluation_id)
        except DatabaseUnavailable as error:
            log.warning("it could not be seen which merged log counts", reason=str(error))
            return
        if counted:
            of = str(claim.evaluation_id), claim.execution_id
            await self.saved.supersede(*of, counted=counted, through=claim.attempt)

    async def _enqueue_next(self, settled: Settled) -> None:
        if settled.report:
            await enqueue(self.ledger, self.queue, [settled.report])
        if settled.runs:
            await enqueue_due(self.ledger, self.queue)


async def _any(futures: set["asyncio.Future[Any]"], seconds: float) -> bool:
    """Whether one of them is done within the time."""
    done, _ = await asyncio.wait(futures, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


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
    own_fault = settlement.error is not None and settlement.error.error_class == "evaluation"
    at_once = kind == "again" and settlement.outcome == "failed" and own_fault
    return Answer(kind, claim.execution_id, message, settled.state, claim.attempt, claim.evaluation_id, at_once)


def _tell(claim: Claim, settlement: Settlement, settled: Settled | None, push: Push, heard: Heard) -> None:
    """One line for each attempt, with its figures: what it spent itself, and what the service saw of its child. `verdict`:
    the ledger's; `retry`: how often the queue had delivered this Cloud Task before; `queue_seconds`: since it should have."""
    error, spent = settlement.error, heard.progress
    push_span = get_current_span()
    tell(push_span, outcome=settlement.outcome)
    if error:
        failed(push_span, error.error_class)
    log.info(
        "attempt ended",
        kind=claim.kind,
        outcome=settlement.outcome,
        verdict=settled.verdict if settled else None,
        state=settled.state if settled else None,
        queue_seconds=push.queue_seconds,
        seconds=round(time.monotonic() - push.began, 3),
        samples=len(settlement.samples),
        model_calls=spent.model_calls if spent else 0,
        tokens=spent.tokens if spent else 0,
        cost=settlement.cost,
        start_seconds=round(heard.start_seconds, 3) if heard.start_seconds is not None else None,
        memory_peak_bytes=heard.memory_peak_bytes,
        failures=claim.failures,
        crashes=claim.crashes,
        retry=push.retry_count,
        cause=settlement.cause,
        error_class=error.error_class if error else None,
        error=_of_ours(error) if error else None,
    )


def _of_ours(error: Failure) -> str | None:
    """The first line of an error in our own words, which has no traceback. Others' words stay out of the log: what a task,
    its agent or a model's provider raises may quote the prompt. The ledger has them."""
    ours = error.traceback is None and error.error_class in ("infrastructure", "cancelled", "limit")
    return error.message.splitlines()[0] if ours else None

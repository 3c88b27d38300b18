"""Takes in what a child says, and acts on it while the child goes on: results are recorded, checkpoints shipped."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from app.artifacts import Artifacts
from app.errors import DatabaseUnavailable
from app.leases import Lease
from app.ledger import Ledger
from app.metrics import RunnerFigures
from app.outcomes import Heard, unheard
from app.recording import record
from app.runner.messages import (
    ENDED,
    NOT_KEPT,
    Checkpointed,
    Done,
    Job,
    Message,
    Packed,
    Paused,
    Planned,
    Prepared,
    Progress,
    Reported,
    SampleEnded,
    SampleResult,
    Spent,
    Started,
    Waiting,
    WriterFailed,
)
from app.runner.supervisor import Child, Crashed
from app.saved import Shipping
from app.tracing import event
from app.versions import TASK_VERSION

log = structlog.get_logger(__name__)


class Ear:
    """One child's. `interrupted`: the newest earlier attempt that was, if there is one; `image`: the container's, if known;
    `heard` is filled as it speaks; `on_error` is awaited when a sample's error has been recorded."""

    def __init__(
        self,
        ledger: Ledger,
        artifacts: Artifacts,
        job: Job,
        lease: Lease,
        shipping: Shipping,
        interrupted: int | None,
        *,
        figures: RunnerFigures,
        heard: Heard,
        on_error: Callable[[], Awaitable[None]],
    ) -> None:
        self.heard = heard
        self.paused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the child, told to wind down, has saved the state of all its samples."""
        self._ledger = ledger
        self._artifacts = artifacts
        self._job = job
        self._lease = lease
        self._shipping = shipping
        self._interrupted = interrupted
        self._figures = figures
        self._on_error = on_error
        self._wanted = [sample for sample in job.samples if sample not in job.scored]

    async def hear(self, child: Child) -> None:
        """Returns when it has said its last word."""
        async for message in child:
            self._count(message, child)
            await self._take(message)

    def _count(self, message: Message | Crashed, child: Child) -> None:
        """For the metrics, and as events of the child's span."""
        since = time.monotonic() - child.began
        kind = self._job.kind
        match message:
            case Started():
                self.heard.start_seconds = since
                self._figures.started(since, "started", kind)
                event("started")
            case Prepared():
                self._figures.started(since, "first sample", kind)
                event("first sample")
            case Progress(providers=now):
                before = self.heard.progress.providers if self.heard.progress else {}
                for provider, spent in now.items():
                    known = before.get(provider, Spent())
                    if spent != known:
                        self._figures.spent(provider, spent.tokens - known.tokens, spent.cost - known.cost)
            case Checkpointed(number=number):
                event("checkpoint", number=number)
            case SampleEnded(result=result):
                error_class = result.error.error_class if result.error else None
                event("sample ended", sample=result.sample.id, epoch=result.sample.epoch, error_class=error_class)

    async def _take(self, message: Message | Crashed) -> None:
        heard = self.heard
        match message:
            case Started():
                heard.started = message
                heard.versions |= message.versions
            case Prepared(no_checkpoints=why):
                heard.no_checkpoints = why
                heard.whole = message.whole
                self._note_task_version(message.task_version)
                self._tell_of_resumption()
            case Progress():
                heard.progress = message
                self._lease.progress = message.model_dump(exclude=NOT_KEPT)
            case Planned():
                heard.planned = message
                self._note_task_version(message.task_version)
            case Checkpointed():
                heard.checkpoints += 1
                self._shipping.due()
            case Waiting():
                heard.waited = True
            case Packed():
                heard.checkpoints += 1
                await self._shipping.came_further()
            case Paused():
                if not self.paused.done():
                    self.paused.set_result(None)
            case SampleEnded(result=result):
                await self._record(result)
            case Reported():
                heard.reported = message
            case Done(failure=failure):
                heard.failure = failure
            case WriterFailed(reason=reason):
                heard.writer_failed = reason
            case Crashed():
                heard.crash = str(message)

    def _note_task_version(self, version: str | None) -> None:
        if version is not None:
            self.heard.versions[TASK_VERSION] = version

    async def _record(self, result: SampleResult) -> None:
        """The log goes before the row: what the ledger points at is there. The last sample's record is the settle's."""
        job = self._job
        if result.sample in job.scored and not self.heard.whole:
            return  # it stands already; the log of an earlier attempt has it too
        result = result.model_copy(update={"note": self._note()})
        url = self._artifacts.transcripts.url(job.evaluation_id, job.execution_id, job.attempt, result.log)
        self.heard.samples.append((result, url))
        if not unheard(self._wanted, self.heard):
            return
        await self._artifacts.ship(Path(job.directory, ENDED, result.log), url)
        self.heard.stored = len(self.heard.samples)
        self._shipping.due()
        try:
            versions = self.heard.versions or None, self.heard.earlier_versions or None
            attempt = job.execution_id, job.attempt
            held, self.heard.samples[-1] = await record(self._ledger, *attempt, self.heard.samples[-1], *versions)
        except DatabaseUnavailable as error:  # the settle has it too
            log.warning(
                "sample not recorded yet", sample=result.sample.id, epoch=result.sample.epoch, reason=str(error)
            )
        else:
            if not held:
                self._lease.end("lost")
            elif result.error:
                await self._on_error()

    def _note(self) -> str | None:
        """What to know of a sample that an earlier attempt may have begun."""
        job = self._job
        if self._interrupted is None:
            return None
        if job.resumes is not None:
            return f"Attempt {job.attempt} went on from the checkpoint of attempt {job.resumes}."
        why = self.heard.no_checkpoints or "it had reached no checkpoint, or its agent makes none"
        return f"Attempt {self._interrupted} was interrupted; attempt {job.attempt} began again: {why}."

    def _tell_of_resumption(self) -> None:
        if self._interrupted is not None:
            log.info("resuming" if self._job.resumes else "starting over", note=self._note())

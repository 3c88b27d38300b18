"""The leases of one worker, renewed by one statement for all of them.

An idle worker makes no statements: the renewals run only while something is held. A renewal that fails is tried again
every 2 s and does not end the work at once, because during a failover nobody else can claim either; after
``renew_patience`` seconds it does.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import replace
from typing import Any, Literal, TypeVar

import structlog

from app.errors import DatabaseUnavailable, DataRefused
from app.ledger import Held, Ledger, Renewal
from app.recording import numbers
from app.settings import Settings
from app.tracing import about

RETRY_EVERY = 2.0
"""Seconds between two tries of a renewal that failed. DESIGN's number, ours."""

T = TypeVar("T")
Reason = Literal["lost", "cancel", "stop", "unreachable", "drain"]
log = structlog.get_logger(__name__)


class Lease:
    """One attempt's right to act. `ended` resolves to why it must stop: `lost` (another attempt holds it), `cancel` (the
    user wishes so), `stop` (too many of the evaluation's samples errored), `unreachable` (no renewal for too long) or
    `drain` (the worker is to end)."""

    def __init__(self, execution_id: str, attempt: int, *, cancellable: bool = True) -> None:
        self.cancellable = cancellable
        self.execution_id = execution_id
        self.attempt = attempt
        self.progress: dict[str, Any] | None = None
        self.settling = False
        """Its end is being recorded: a renewal that crosses it finds nothing to renew, and that means nothing."""
        self.ended: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self._renewed = time.monotonic()

    def held(self) -> Held:
        return Held(self.execution_id, self.attempt, self.progress)

    def end(self, reason: Reason) -> None:
        if not self.ended.done():
            log.warning("attempt must stop", **about(self.execution_id, self.attempt), reason=reason)
            self.ended.set_result(reason)

    async def unless_ended(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """What the work comes to, or None: the lease ended before, and the work was given up. For what may take long (an
        object store, a cold forkserver): a worker that is to end has only seconds to give back what it holds."""
        if self.ended.done():
            return None
        working = asyncio.create_task(work())
        try:
            either: set[asyncio.Future[Any]] = {working, self.ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gave_up = working.cancel()  # False: it is done
            await asyncio.wait({working})
            came_to_nothing = working.cancelled() or working.exception() is not None
        return None if gave_up and came_to_nothing else working.result()

    def learn(self, renewal: Renewal) -> None:
        self._renewed = time.monotonic()
        if self.settling:
            return
        if renewal.lost:
            self.end("lost")
        elif renewal.cancel and self.cancellable:
            self.end("cancel")
        elif renewal.stopped and self.cancellable:
            self.end("stop")

    @property
    def lost(self) -> bool:
        return self.ended.done() and self.ended.result() == "lost"

    @property
    def age(self) -> float:
        """Seconds since the last renewal, or since the claim."""
        return time.monotonic() - self._renewed


class Leases:
    """All that this worker holds."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger = ledger
        self._interval = settings.renew_interval
        self._patience = settings.renew_patience
        self._leases: dict[tuple[str, int], Lease] = {}
        self._claiming = 0
        self._renewing: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._emptied.set()
        self.draining = False
        """The worker is to end: nothing may be claimed any more."""

    def __len__(self) -> int:
        return len(self._leases)

    @asynccontextmanager
    async def hold(self, execution_id: str, attempt: int, *, cancellable: bool = True) -> AsyncIterator[Lease]:
        """Renews the lease for as long as the block lasts. Not `cancellable`: a report, which a cancelled evaluation ends
        with too."""
        lease = Lease(execution_id, attempt, cancellable=cancellable)
        if self.draining:
            lease.end("drain")
        self._leases[execution_id, attempt] = lease
        self._emptied.clear()
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(
                self._renew_all(),
                name="renew leases",
                context=Context(),  # of no push: the log of one must not name another's evaluation
            )
        try:
            yield lease
        finally:
            del self._leases[execution_id, attempt]
            self._tell_if_empty()

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """While a claim is under way: it may come to a lease, which a drain must wait for too."""
        self._claiming += 1
        self._emptied.clear()
        try:
            yield
        finally:
            self._claiming -= 1
            self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if not self._leases and not self._claiming:
            self._emptied.set()

    async def drain(self) -> None:
        """Ends everything that is held; returns when it has been given back."""
        self.draining = True
        for lease in tuple(self._leases.values()):
            lease.end("drain")
        while self._leases or self._claiming:  # what was claimed is held at once
            await self._emptied.wait()

    async def _renew_all(self) -> None:
        """Ends by itself when nothing is held; a renewal under way is never cancelled, which would cost a connection."""
        wait = self._interval
        while self._leases:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._emptied.wait()
            if self._leases:
                wait = self._interval if await self._renew_once() else min(RETRY_EVERY, self._interval)

    async def _renew_once(self) -> bool:
        try:
            renewals = await self._renew_with_progress()
        except Exception as error:  # whatever it was, the work goes on until the patience ends
            for lease in tuple(self._leases.values()):
                fields = about(lease.execution_id, lease.attempt)
                log.warning("renewal failed", **fields, reason=str(error), unexpected=_unexpected(error))
                if lease.age > self._patience:
                    lease.end("unreachable")
            return False
        for renewal in renewals:
            mine = self._leases.get((renewal.execution_id, renewal.attempt))
            if mine is not None:  # else it was settled while the renewal was under way
                mine.learn(renewal)
        return True

    async def _renew_with_progress(self) -> list[Renewal]:
        """Or with the counts in it only, if the database does not take one's words: that must not cost the others' leases."""
        try:
            return await self._ledger.renew([lease.held() for lease in self._leases.values()], patience=0)
        except DataRefused as error:
            log.warning("the database refuses what an attempt says of its progress", reason=str(error))
        counts = [replace(lease.held(), progress=numbers(lease.progress)) for lease in self._leases.values()]
        return await self._ledger.renew(counts, patience=0)


def _unexpected(error: Exception) -> bool:
    return not isinstance(error, DatabaseUnavailable)

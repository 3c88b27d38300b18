"""One queue at work: which task is pushed when, and what becomes of it afterwards."""

import heapq
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import anyio
from google.cloud import tasks_v2

from app.local.push import Answer, Push, Pusher
from app.local.queue_names import Tombstones
from app.local.queue_pacing import Pace, backoff
from app.local.queue_rules import Message

Start: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
"""Runs a coroutine beside everything else, until it ends or the emulator does."""


class Signal:
    """Wakes everyone who waits, and nobody later: check a condition, then wait, with no `await` in between."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = anyio.Event()

    async def wait(self) -> None:
        await self._event.wait()


@dataclass(eq=False, slots=True)
class QueuedTask:
    """A task that is not finished. `message` is its BASIC view: the body is kept apart, as views mostly leave it out.

    `ticket`: its one valid place in the schedule; 0 while it has none. `executions`: answers other than 5xx.
    `previous_status`: of the last push that ended, None before.
    """

    message: Message
    body: bytes
    ticket: int = 0
    executions: int = 0
    previous_status: int | None = None

    @property
    def name(self) -> str:
        return str(self.message.name)

    def full(self) -> Message:
        full = deepcopy(self.message)
        full.http_request.body = self.body
        full.view = tasks_v2.Task.View.FULL
        return full


@dataclass(frozen=True, slots=True)
class PushRecord:
    """One push that ended, for people and tests. `number`: 0 for a task's first. `status`: as in `Answer`."""

    task: str
    number: int
    status: int
    began: datetime
    ended: datetime


class TaskQueue:
    """A queue, its tasks and their schedule. `run()` pushes until the queue is deleted; nothing happens on a timer
    unless a task is due at it.

    A push that has begun ends by itself, whatever is done to its task or queue; it is just not tried again.
    """

    def __init__(
        self,
        message: Message,
        *,
        pusher: Pusher,
        start: Start,
        used_names: Tombstones,
        changed: Signal,
        record: Callable[[PushRecord], None],
    ) -> None:
        self.message = message
        self.tasks: dict[str, QueuedTask] = {}
        self.running = 0
        self.deleted = False
        self._schedule: list[tuple[float, int, QueuedTask]] = []
        self._tickets = itertools.count(1)
        self._pace = Pace(message.rate_limits.max_dispatches_per_second, time.monotonic())
        self._wake = Signal()
        self._pusher, self._start, self._used_names = pusher, start, used_names
        self._changed, self._record = changed, record

    def add(self, message: Message) -> QueuedTask:
        task = QueuedTask(message, message.http_request.body)
        message.http_request.body = b""
        message.view = tasks_v2.Task.View.BASIC
        self.tasks[task.name] = task
        self._plan(task)
        return task

    def remove(self, task: QueuedTask) -> None:
        """Finished or deleted: either way its name stays used for a while."""
        del self.tasks[task.name]
        task.ticket = 0
        self._used_names.bury(task.name)
        self._notify()

    def force(self, task: QueuedTask) -> None:
        """Push now: whatever the limits, the schedule and the queue's state say, and even beside a push under way."""
        task.message.schedule_time.FromDatetime(datetime.now(UTC))
        self._begin(task)

    def purge(self) -> None:
        for task in list(self.tasks.values()):
            self.remove(task)
        self.message.purge_time.FromDatetime(datetime.now(UTC))

    def set_state(self, state: int) -> None:
        self.message.state = state
        self._notify()

    def reconfigure(self, message: Message) -> None:
        self.message = message
        self._pace.change(message.rate_limits.max_dispatches_per_second, time.monotonic())
        self._notify()

    def delete(self) -> None:
        self.purge()
        self.deleted = True
        self._notify()

    async def run(self) -> None:
        while not self.deleted:
            delay = self._push_what_is_due()
            with anyio.move_on_after(delay):
                await self._wake.wait()

    def _push_what_is_due(self) -> float | None:
        """Seconds until there may be more to push; None: not before something happens."""
        for due, task in self._next():
            late = time.time() - due
            if late < 0:
                return -late
            if delay := self._pace.delay(time.monotonic()):
                return delay
            self._pace.take()
            self._begin(task)
        return None

    def _next(self) -> Iterator[tuple[float, QueuedTask]]:
        """What comes first in the schedule, again and again, as long as the queue may push at all."""
        running = tasks_v2.Queue.State.RUNNING
        most = self.message.rate_limits.max_concurrent_dispatches
        while self._schedule and self.message.state == running and self.running < most:
            due, ticket, task = self._schedule[0]
            if ticket == task.ticket:
                yield due, task
            else:
                heapq.heappop(self._schedule)

    def _plan(self, task: QueuedTask) -> None:
        if len(self._schedule) > 2 * len(self.tasks) + 100:
            self._drop_stale_places()
        task.ticket = next(self._tickets)
        heapq.heappush(self._schedule, (task.message.schedule_time.ToMicroseconds() / 1e6, task.ticket, task))
        self._notify()

    def _drop_stale_places(self) -> None:
        """Of tasks deleted long before they were due."""
        self._schedule = [place for place in self._schedule if place[1] == place[2].ticket]
        heapq.heapify(self._schedule)

    def _begin(self, task: QueuedTask) -> None:
        """All bookkeeping happens here, so that the task shows the push before its target does."""
        task.ticket = 0
        message = task.message
        push = Push(deepcopy(message), task.body, message.dispatch_count, task.executions, task.previous_status)
        began = datetime.now(UTC)
        message.dispatch_count += 1
        message.ClearField("last_attempt")
        message.last_attempt.schedule_time.CopyFrom(message.schedule_time)
        message.last_attempt.dispatch_time.FromDatetime(began)
        if not message.HasField("first_attempt"):
            message.first_attempt.dispatch_time.FromDatetime(began)
        self.running += 1
        self._start(self._push(task, push, began))

    async def _push(self, task: QueuedTask, push: Push, began: datetime) -> None:
        answer = await self._pusher.push(push)
        ended = datetime.now(UTC)
        self.running -= 1
        self._pace.heard(answer.status if answer.received else 0, not answer.acknowledged, time.monotonic())
        _note(task, push, answer, ended)
        self._record(PushRecord(task.name, push.number, answer.status, began, ended))
        if self.tasks.get(task.name) is task:
            self._settle(task, push, answer, ended)
        self._notify()

    def _settle(self, task: QueuedTask, push: Push, answer: Answer, ended: datetime) -> None:
        retry = task.message.retry_config if task.message.HasField("retry_config") else self.message.retry_config
        if answer.acknowledged or spent(task.message, retry, ended):
            self.remove(task)
            return
        delay = backoff(
            push.number + 1,
            retry.min_backoff.ToTimedelta().total_seconds(),
            retry.max_backoff.ToTimedelta().total_seconds(),
            retry.max_doublings,
        )
        task.message.schedule_time.FromDatetime(ended + max(timedelta(seconds=delay), answer.retry_after))
        self._plan(task)

    def _notify(self) -> None:
        self._wake.notify()
        self._changed.notify()


def spent(task: Message, retry: Message, now: datetime) -> bool:
    """A failed task is given up, that is deleted, once every limit that is set is reached: attempts (-1: not set) and
    the time since its first attempt (0: not set)."""
    duration = retry.max_retry_duration.ToTimedelta()
    limits: list[bool] = []
    if retry.max_attempts != -1:
        limits.append(task.dispatch_count >= retry.max_attempts)
    if duration:
        limits.append(now - task.first_attempt.dispatch_time.ToDatetime(UTC) >= duration)
    return bool(limits) and all(limits)


def _note(task: QueuedTask, push: Push, answer: Answer, ended: datetime) -> None:
    message = task.message
    message.response_count += answer.received
    task.executions += answer.executed
    task.previous_status = answer.status
    if push.number == message.dispatch_count - 1:  # else a forced push began meanwhile, and that is the last attempt
        message.last_attempt.response_time.FromDatetime(ended)
        message.last_attempt.response_status.code = answer.code
        message.last_attempt.response_status.message = answer.message

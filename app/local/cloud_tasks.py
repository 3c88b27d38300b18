"""Cloud Tasks on this machine: the real gRPC API, so that unmodified google-cloud-tasks clients work against it, and
real HTTP pushes with the real service's headers, retries, limits and signed ID tokens.

Emulated as documented or as others recorded the real service: names and how long they stay used, schedules, the token
bucket, concurrency, back-off, attempts and their end (the task is deleted), deadlines, headers, the slowing of a queue.

Not emulated: App Engine targets, queue-level HTTP targets, OAuth tokens, filters, batches, IAM (all refused, so that
nothing is silently different); quotas, the slow ramp-up of an idle queue, the 31 days after which a task is dropped.
Changes to a queue take effect at once, where the real service takes up to a minute.

State is in memory and ends with the process: Proctor's sweeper creates again what was lost.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import anyio
import grpc
import grpc.aio

from app.local.cloud_tasks_api import CloudTasksApi, handlers
from app.local.dispatcher import PushRecord, Signal, Start, TaskQueue
from app.local.oidc import CERTS_PATH, Issuer, publish
from app.local.push import Pusher
from app.local.queue_names import Tombstones
from app.local.queue_rules import Message

TASK_TOMBSTONE = timedelta(hours=24)
"""How long a finished or deleted task's name is refused: "up to 24 hours" (Google's documentation)."""

QUEUE_TOMBSTONE = timedelta(days=3)
"""How long a deleted queue's name is refused: "up to 3 days" (Google's documentation)."""

DISPATCH_DEADLINE = timedelta(minutes=10)
"""Of tasks that name none (Google's documentation)."""

KEPT_RECORDS = 10_000

_GRACE_SECONDS = 0.5
"""For calls under way when the emulator ends."""

_SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),  # or a second emulator would silently share the port
    ("grpc.server.max_pending_requests", 100_000),  # of calls; gRPC's own 1,000 cancels some of a large burst
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
]


class CloudTasksEmulator:
    """An async context manager; `endpoint` and `certs_url` are known once it is entered.

    `port` (gRPC) and `oidc_port` (certificates): 0 takes a free one. `default_dispatch_deadline` may be shorter than
    the 15 s that a task may ask for. `issuer`: to share one key among several emulators.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        oidc_port: int = 0,
        tombstone: timedelta = TASK_TOMBSTONE,
        queue_tombstone: timedelta = QUEUE_TOMBSTONE,
        default_dispatch_deadline: timedelta = DISPATCH_DEADLINE,
        issuer: Issuer | None = None,
    ) -> None:
        self.endpoint = ""
        self.certs_url = ""
        self.records: deque[PushRecord] = deque(maxlen=KEPT_RECORDS)
        self._host, self._port, self._oidc_port = host, port, oidc_port
        self._tombstone, self._queue_tombstone = tombstone, queue_tombstone
        self._default_dispatch_deadline = default_dispatch_deadline
        self._issuer = issuer or Issuer()
        self._recorded = 0
        self._changed = Signal()
        self._queues: list[TaskQueue] = []
        self._running: AbstractAsyncContextManager[None] | None = None

    async def __aenter__(self) -> Self:
        self._running = self._run()
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._running is not None
        return await self._running.__aexit__(kind, error, traceback)

    def id_token(self, email: str, audience: str) -> str:
        """As Google's token service gives it to who may act as `email`: Cloud Scheduler, a person's gcloud."""
        return self._issuer.id_token(email, audience)

    async def wait_idle(self) -> None:
        """Until no queue has a task left and no push is under way. A task that is scheduled for later, or held by a
        paused queue, is left."""
        while any(queue.tasks or queue.running for queue in self._queues):
            await self._changed.wait()

    async def wait_for_records(self, count: int) -> None:
        """Until so many pushes have ended since the start (at most `KEPT_RECORDS` of them are kept in `records`)."""
        while self._recorded < count:
            await self._changed.wait()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        async with (
            publish(self._issuer.documents(), self._host, self._oidc_port) as base_url,
            Pusher(self._issuer) as pusher,
            _background() as start,
        ):
            server = self._server(pusher, start)
            await server.start()
            self.certs_url = base_url + CERTS_PATH
            try:
                yield
            finally:
                with anyio.CancelScope(shield=True):
                    await server.stop(grace=_GRACE_SECONDS)

    def _server(self, pusher: Pusher, start: Start) -> grpc.aio.Server:
        used_task_names = Tombstones(self._tombstone)

        def open_queue(message: Message) -> TaskQueue:
            queue = TaskQueue(
                message,
                pusher=pusher,
                start=start,
                used_names=used_task_names,
                changed=self._changed,
                record=self._record,
            )
            self._queues = [known for known in self._queues if known.running or not known.deleted] + [queue]
            start(queue.run())
            return queue

        api = CloudTasksApi(
            open_queue,
            used_queue_names=Tombstones(self._queue_tombstone),
            used_task_names=used_task_names,
            default_dispatch_deadline=self._default_dispatch_deadline,
        )
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        server.add_generic_rpc_handlers((handlers(api),))
        port = server.add_insecure_port(f"{self._host}:{self._port}")
        self.endpoint = f"{self._host}:{port}"
        return server

    def _record(self, record: PushRecord) -> None:
        self._recorded += 1
        self.records.append(record)


@asynccontextmanager
async def _background() -> AsyncIterator[Start]:
    """Starts coroutines and cancels those that are left at the end. Not a task group, which would wrap whatever the
    caller's block raises."""
    running: set[asyncio.Task[None]] = set()

    def start(coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        running.add(task)
        task.add_done_callback(running.discard)

    try:
        yield start
    finally:
        for task in running:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*running, return_exceptions=True)


async def serve(
    emulator: CloudTasksEmulator, ready: Callable[[CloudTasksEmulator], None] = lambda _emulator: None
) -> None:
    """Run until cancelled; `ready` is called once the addresses are known."""
    async with emulator:
        ready(emulator)
        await anyio.sleep_forever()

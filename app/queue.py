"""Cloud Tasks: one named task for each time an execution is to be pushed.

A task's name is a hash, the execution and the enqueue's number, so creating it twice is the same as once; the hash comes
first because the service is slow with names that rise. `ALREADY_EXISTS` proves only that the name was used: its task may
have been purged since, and the sweeper has the last word.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import grpc
import structlog
from google.api_core import exceptions
from google.api_core.exceptions import AlreadyExists, GoogleAPICallError, RetryError
from google.api_core.retry import AsyncRetry, if_exception_type
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport
from google.protobuf.duration_pb2 import Duration

from app.database.session import refuse_held_session
from app.errors import SettingsError
from app.ledger import Enqueue, Ledger
from app.settings import Settings
from app.tracing import about, headers, span

BATCH = 500
"""Executions taken as due at a time: at some hundred creations a second, well within the two minutes they are ours."""

RPC_TIMEOUT = 10
"""Seconds for one call; the client's own default is 20."""

_TRANSIENT = if_exception_type(
    exceptions.ServiceUnavailable,
    exceptions.DeadlineExceeded,
    exceptions.InternalServerError,
    exceptions.ResourceExhausted,
    exceptions.Aborted,
)
log = structlog.get_logger(__name__)


class Queue:
    """The queue that pushes to this service, through the real client."""

    def __init__(self, client: tasks_v2.CloudTasksAsyncClient, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._limit = anyio.CapacityLimiter(settings.queue_concurrency)
        self._retry = AsyncRetry(
            predicate=_TRANSIENT, initial=0.1, maximum=5, multiplier=2, timeout=settings.queue_patience
        )

    async def create(self, task: Enqueue) -> None:
        """Raises what the service answers, except that a name in use is as good as created."""
        refuse_held_session(f"create a Cloud Task for {task.execution_id}")
        request = tasks_v2.CreateTaskRequest(parent=self._settings.queue_called(task.queue), task=self._task(task))
        async with self._limit:
            try:
                await self._client.create_task(request, retry=self._retry, timeout=RPC_TIMEOUT)
            except AlreadyExists:
                log.debug("Cloud Task exists already", **about(task.execution_id), number=task.number)

    def _task(self, task: Enqueue) -> tasks_v2.Task:
        settings = self._settings
        request = tasks_v2.HttpRequest(
            url=f"{settings.service_url}/tasks/execute",
            http_method=tasks_v2.HttpMethod.POST,
            headers={"Content-Type": "application/json", **headers(task.traceparent)},
            body=json.dumps({"execution_id": task.execution_id}).encode(),
        )
        if settings.queue_service_account:
            request.oidc_token = tasks_v2.OidcToken(
                service_account_email=settings.queue_service_account,
                audience=settings.queue_audience or settings.service_url,
            )
        return tasks_v2.Task(
            name=f"{settings.queue_called(task.queue)}/tasks/{task_id(task)}",
            http_request=request,
            dispatch_deadline=Duration(seconds=int(settings.dispatch_deadline)),
        )


def task_id(task: Enqueue) -> str:
    """Letters, digits, `-` and `_` only: what a task's name may have."""
    name = f"{task.execution_id}-{task.number}".replace(".", "_")
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{name}"


@asynccontextmanager
async def open_queue(settings: Settings) -> AsyncIterator[Queue]:
    """The queue, or at `queue_endpoint` the emulator that stands for it."""
    if settings.queue_endpoint:
        channel = grpc.aio.insecure_channel(settings.queue_endpoint)
        client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
    else:
        try:
            client = tasks_v2.CloudTasksAsyncClient()
        except DefaultCredentialsError as error:
            raise SettingsError(
                "There are no Google credentials for the queue: run `gcloud auth application-default login`, or set"
                " PROCTOR_QUEUE_ENDPOINT to a Cloud Tasks emulator's host:port."
            ) from error
    try:
        yield Queue(client, settings)
    finally:
        with anyio.CancelScope(shield=True):
            await client.transport.close()  # type: ignore[no-untyped-call]  # the client library's


async def enqueue(ledger: Ledger, queue: Queue, tasks: Sequence[Enqueue]) -> int:
    """Creates these Cloud Tasks, many at once, and tells the ledger which exist; returns how many. What could not be
    created stays due in two minutes: the ledger's row is the outbox."""
    created: list[Enqueue] = []

    async def create(task: Enqueue) -> None:
        try:
            await queue.create(task)
        except (GoogleAPICallError, RetryError) as error:
            log.warning("Cloud Task not created", **about(task.execution_id), number=task.number, reason=str(error))
        else:
            created.append(task)

    with span("enqueue", executions=len(tasks)):
        async with anyio.create_task_group() as group:
            for task in tasks:
                group.start_soon(create, task)
        if created:
            await ledger.enqueued(created)
    return len(created)


async def enqueue_due(ledger: Ledger, queue: Queue) -> int:
    """Enqueues all that is due by the ledger, in batches, until nothing is. Many may do so at once. It stops at a batch of
    which nothing could be created: the queue is not reachable."""
    total = 0
    while tasks := await ledger.take_due(BATCH):
        created = await enqueue(ledger, queue, tasks)
        total += created
        if created == 0:
            break
    return total

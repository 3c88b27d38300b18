"""How the queue is set, as it says itself."""

from dataclasses import dataclass
from typing import Any, Literal

import grpc
from google.api_core.exceptions import Forbidden, GoogleAPICallError, NotFound, RetryError
from google.auth.exceptions import GoogleAuthError
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport

from app.settings import Settings

TIMEOUT = 20
"""Seconds for the one call."""


@dataclass(frozen=True)
class QueueState:
    """Durations in seconds; `max_attempts` -1: unlimited, `max_retry_duration` 0: unlimited."""

    state: str
    concurrent_dispatches: int
    max_attempts: int
    max_retry_duration: float
    min_backoff: float
    max_backoff: float
    max_doublings: int


@dataclass(frozen=True)
class Unseen:
    """`says`: why, in words."""

    why: Literal["missing", "forbidden", "no answer"]
    says: str


async def look_at(settings: Settings) -> QueueState | Unseen:
    try:
        return await _ask(settings)
    except NotFound:
        return Unseen("missing", f"there is no {settings.queue}")
    except Forbidden as error:
        return Unseen("forbidden", f"the service may not look at it: {error.message}")
    except (GoogleAPICallError, RetryError, GoogleAuthError) as error:
        return Unseen("no answer", f"Cloud Tasks does not answer: {error}".splitlines()[0])


async def _ask(settings: Settings) -> QueueState:
    if settings.queue_endpoint:
        channel = grpc.aio.insecure_channel(settings.queue_endpoint)
        client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
    else:
        client = tasks_v2.CloudTasksAsyncClient()
    try:
        queue = await client.get_queue(name=settings.queue, timeout=TIMEOUT, retry=None)
    finally:
        await client.transport.close()  # type: ignore[no-untyped-call]  # the client library's
    retry: Any = queue.retry_config  # its stubs have protobuf's Durations, it has timedeltas
    return QueueState(
        state=queue.state.name,
        concurrent_dispatches=queue.rate_limits.max_concurrent_dispatches,
        max_attempts=retry.max_attempts,
        max_retry_duration=retry.max_retry_duration.total_seconds(),
        min_backoff=retry.min_backoff.total_seconds(),
        max_backoff=retry.max_backoff.total_seconds(),
        max_doublings=retry.max_doublings,
    )

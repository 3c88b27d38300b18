"""What the real service makes of a queue or a task before it keeps it: defaults, limits, refusals.

Messages marked [recorded] are the real service's own words, as others recorded them; the rest are ours.
"""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import grpc
from google.cloud import tasks_v2

from app.local.queue_names import Refusal, check_task_name, invalid, queue_of
from app.local.queue_pacing import burst_size

Message: TypeAlias = Any
"""A message as protobuf's own class, such as `tasks_v2.Task.pb()`. Those have no stubs; the proto-plus classes around
them do, but declare times and enums as what they are not."""

USER_AGENT = "Google-Cloud-Tasks"

LARGEST_TASK = 2**20 - 7
"""Bytes of the serialized task as it is kept, defaults included. Documented as 1 MB, measured by others as this."""

LONGEST_URL = 2083
LARGEST_HEADERS = 80 * 1024
FARTHEST_SCHEDULE = timedelta(hours=720)
SHORTEST_DEADLINE, LONGEST_DEADLINE = timedelta(seconds=15), timedelta(minutes=30)

_WITH_BODY = (tasks_v2.HttpMethod.POST, tasks_v2.HttpMethod.PUT, tasks_v2.HttpMethod.PATCH)
_COMPUTED = {"host", "content-length", "transfer-encoding", "connection", "user-agent"}
_RESERVED = ("x-google-", "x-appengine-", "x-cloudtasks-")


def complete_queue(queue: Message) -> None:
    """Check what the caller set and fill in what it left out, in place."""
    if queue.HasField("app_engine_routing_override") or queue.HasField("http_target"):
        raise _not_emulated("Queue.app_engine_routing_override and Queue.http_target")
    _complete_rate_limits(queue)
    complete_retry_config(queue.retry_config)


def _complete_rate_limits(queue: Message) -> None:
    limits = queue.rate_limits
    if limits.max_dispatches_per_second < 0:
        raise invalid("RateLimits.maxDispatchesPerSecond cannot be negative.")  # [recorded]
    if limits.max_dispatches_per_second > 500:
        raise invalid("RateLimits.maxDispatchesPerSecond must be less than or equal to 500.")  # [recorded]
    if limits.max_concurrent_dispatches < 0:
        raise invalid("RateLimits.maxConcurrentDispatches cannot be negative.")  # [recorded]
    if limits.max_concurrent_dispatches > 5000:
        raise invalid("RateLimits.maxConcurrentDispatches must be less than or equal to 5000.")  # [recorded]
    limits.max_dispatches_per_second = limits.max_dispatches_per_second or 500.0
    limits.max_concurrent_dispatches = limits.max_concurrent_dispatches or 1000
    limits.max_burst_size = burst_size(limits.max_dispatches_per_second)


def complete_retry_config(retry: Message) -> None:
    """In place. A zero means unset here, as it does on the wire: 0 attempts become 100, 0 doublings 16."""
    if retry.max_attempts < -1:
        raise invalid("RetryConfig.maxAttempts must be greater or equal to -1.")  # [recorded]
    if retry.max_doublings < 0:
        raise invalid("RetryConfig.maxDoublings cannot be negative.")  # [recorded]
    if retry.min_backoff.ToTimedelta() < timedelta():
        raise invalid("RetryConfig.minBackoff cannot be negative.")  # [recorded]
    if retry.max_backoff.ToTimedelta() < timedelta():
        raise invalid("RetryConfig.maxBackoff cannot be negative.")
    if retry.max_retry_duration.ToTimedelta() < timedelta():
        raise invalid("RetryConfig.maxRetryDuration cannot be negative.")
    retry.max_attempts = retry.max_attempts or 100
    retry.max_doublings = retry.max_doublings or 16
    if not retry.min_backoff.ToTimedelta():
        retry.min_backoff.FromMilliseconds(100)
    if not retry.max_backoff.ToTimedelta():
        retry.max_backoff.FromSeconds(3600)
    if retry.min_backoff.ToTimedelta() > retry.max_backoff.ToTimedelta():
        raise invalid("RetryConfig.minBackoff must be less than or equal to RetryConfig.maxBackoff.")  # [recorded]


def complete_task(task: Message, queue: str, default_deadline: timedelta, now: datetime) -> None:
    """Check what the caller sent for `queue` and make it the task that is kept, in place."""
    if task.name:
        _check_name(task.name, queue)
    else:
        task.name = f"{queue}/tasks/{uuid.uuid4().int % 10**19:019d}"
    if not task.HasField("http_request"):
        raise _not_emulated("a task without http_request")
    _complete_request(task.http_request)
    _complete_times(task, default_deadline, now)
    if task.HasField("retry_config"):
        complete_retry_config(task.retry_config)
    task.dispatch_count = task.response_count = 0
    task.ClearField("first_attempt")
    task.ClearField("last_attempt")
    task.view = tasks_v2.Task.View.FULL
    if task.ByteSize() > LARGEST_TASK:
        raise invalid("Task size too large")  # [recorded]


def _check_name(name: str, queue: str) -> None:
    named = queue_of(name)
    if named != queue and "/tasks/" in name:
        raise invalid(
            f"The queue name from request ('{queue}') must be the same as the queue name in the named task ('{named}')."
        )  # [recorded]
    check_task_name(name)


def _complete_request(request: Message) -> None:
    if not request.url:
        raise invalid("HttpRequest.url is required.")  # [recorded]
    if not request.url.startswith(("http://", "https://")):
        raise invalid("HttpTarget.url must start with 'http://' or 'https://'.")  # [recorded]
    if len(request.url) > LONGEST_URL:
        raise invalid(f"HttpRequest.url must be at most {LONGEST_URL} characters.")
    request.http_method = request.http_method or tasks_v2.HttpMethod.POST
    if request.body and request.http_method not in _WITH_BODY:
        raise invalid(
            f"HttpRequest.body is not allowed with the method {tasks_v2.HttpMethod(request.http_method).name}."
        )
    if sum(len(name.encode()) + len(value.encode()) for name, value in request.headers.items()) >= LARGEST_HEADERS:
        raise invalid("HttpRequest.headers must be less than 80KB.")
    for name in [name for name in request.headers if _ignored(name)]:
        del request.headers[name]
    request.headers["User-Agent"] = USER_AGENT
    _check_authorization(request)


def _ignored(header: str) -> bool:
    return header.lower() in _COMPUTED or header.lower().startswith(_RESERVED)


def _check_authorization(request: Message) -> None:
    if request.HasField("oauth_token"):
        raise _not_emulated("HttpRequest.oauth_token: nothing outside Google could check it. oidc_token works, and")
    if request.HasField("oidc_token") and not request.oidc_token.service_account_email:
        raise invalid("OidcToken.serviceAccountEmail is required.")


def _complete_times(task: Message, default_deadline: timedelta, now: datetime) -> None:
    if not task.HasField("dispatch_deadline"):
        task.dispatch_deadline.FromTimedelta(default_deadline)
    elif not SHORTEST_DEADLINE <= task.dispatch_deadline.ToTimedelta() <= LONGEST_DEADLINE:
        raise invalid("Task.dispatchDeadline must be between [15s, 30m].")  # [recorded]
    scheduled = max(task.schedule_time.ToDatetime(UTC), now)  # unset reads as 1970
    if scheduled > now + FARTHEST_SCHEDULE:
        raise invalid(
            f"The Task.scheduleTime, {scheduled.isoformat()}, is too far in the future."
            " Schedule time must be no more than 720h in the future."
        )  # [recorded]
    task.schedule_time.FromDatetime(scheduled)
    task.create_time.FromDatetime(now.replace(microsecond=0))


def _not_emulated(what: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNIMPLEMENTED, f"The emulator has no {what}.")

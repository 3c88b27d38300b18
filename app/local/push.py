"""One push: the HTTP request that Cloud Tasks makes for a task, and what its answer means."""

from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

import anyio
import httpx
from google.cloud import tasks_v2
from google.rpc import code_pb2

from app.local.oidc import Issuer
from app.local.queue_names import queue_of, short
from app.local.queue_rules import Message

LONGEST_RETRY_AFTER = timedelta(hours=1)
"""Of a `Retry-After` header; our own choice. Google says only that the header is considered."""

_CODES = {
    400: code_pb2.INVALID_ARGUMENT,
    401: code_pb2.UNAUTHENTICATED,
    403: code_pb2.PERMISSION_DENIED,
    404: code_pb2.NOT_FOUND,
    409: code_pb2.ABORTED,
    429: code_pb2.RESOURCE_EXHAUSTED,
    499: code_pb2.CANCELLED,
    500: code_pb2.INTERNAL,
    501: code_pb2.UNIMPLEMENTED,
    503: code_pb2.UNAVAILABLE,
    504: code_pb2.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """How a push ended.

    `status`: the target's HTTP status; without an answer 504 past the deadline (so recorded), and 503 where the target
    could not be reached (our choice). `code`, `message`: what `Attempt.response_status` says. `received`: an HTTP
    answer came. `retry_after`: the least delay the target asked for.
    """

    status: int
    code: int
    message: str
    received: bool
    retry_after: timedelta = timedelta()

    @property
    def acknowledged(self) -> bool:
        return self.received and 200 <= self.status < 300

    @property
    def executed(self) -> bool:
        """Counts in `X-CloudTasks-TaskExecutionCount`: an answer other than 5xx."""
        return self.received and self.status < 500


@dataclass(frozen=True, slots=True)
class Push:
    """What a request is made from, fixed when the push begins. `number`: 0 for a task's first push."""

    task: Message
    body: bytes
    number: int
    executions: int
    previous_status: int | None


class Pusher:
    """Makes pushes; a context manager. Redirects are not followed, and every push has a connection of its own, so that
    none fails because the target closed an idle one at the same moment."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            timeout=httpx.Timeout(None),  # httpx's own 5 s would end every longer push; each has its task's deadline
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._client.aclose()

    async def push(self, push: Push) -> Answer:
        """Never raises: a push without an answer would leave a task that is never retried. Past the task's deadline the
        request is dropped; whether the handler notices is the handler's affair."""
        deadline = push.task.dispatch_deadline.ToTimedelta().total_seconds()
        try:
            with anyio.fail_after(deadline):
                response = await self._client.send(self._request(push))
        except TimeoutError:
            return Answer(504, code_pb2.DEADLINE_EXCEEDED, f"No answer within {deadline:g} s", False)
        except Exception as error:  # the API accepts URLs that fail in many ways: a bad host name, port 99999 …
            return Answer(503, code_pb2.UNAVAILABLE, f"{type(error).__name__}: {error}", False)
        return _answer(response)

    def _request(self, push: Push) -> httpx.Request:
        request = push.task.http_request
        headers = {**request.headers, **task_headers(push)}
        if request.HasField("oidc_token"):
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            token = self._issuer.id_token(
                request.oidc_token.service_account_email, request.oidc_token.audience or request.url
            )
            headers["Authorization"] = f"Bearer {token}"
        # Built without the client, which would add headers of its own, and a time-out beside the deadline.
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        return httpx.Request(_method(request), request.url, headers=encoded, content=push.body)


def task_headers(push: Push) -> dict[str, str]:
    """The `X-CloudTasks-…` headers, as the real service was recorded to send them."""
    due = push.task.schedule_time
    headers = {
        "X-CloudTasks-QueueName": short(queue_of(push.task.name)),
        "X-CloudTasks-TaskName": short(push.task.name),
        "X-CloudTasks-TaskRetryCount": str(push.number),
        "X-CloudTasks-TaskExecutionCount": str(push.executions),
        "X-CloudTasks-TaskETA": f"{due.seconds}.{due.nanos // 1000:06}",
    }
    if push.previous_status is not None:
        headers["X-CloudTasks-TaskPreviousResponse"] = str(push.previous_status)
        headers["X-CloudTasks-TaskRetryReason"] = ""
    return headers


def _method(request: Message) -> str:
    return str(tasks_v2.HttpMethod(request.http_method).name)


def _answer(response: httpx.Response) -> Answer:
    status = response.status_code
    code = code_pb2.OK if 200 <= status < 300 else _CODES.get(status, code_pb2.UNKNOWN)
    message = f"{code_pb2.Code.Name(code)}({code}): HTTP status code {status}"
    return Answer(status, code, message, True, _retry_after(response))


def _retry_after(response: httpx.Response) -> timedelta:
    """Only the form in seconds; a date counts as absent."""
    value = response.headers.get("Retry-After", "")
    seconds = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    return min(timedelta(seconds=seconds), LONGEST_RETRY_AFTER)

"""Resource names of the Cloud Tasks emulator: their form, how long they stay used, and listing by them.

Messages marked [recorded] are the real service's own words, as others recorded them.
"""

import base64
import binascii
import heapq
import re
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import grpc

_LOCATION = r"projects/[A-Za-z0-9.:-]+/locations/[A-Za-z0-9-]+"
_QUEUE = _LOCATION + r"/queues/[A-Za-z0-9-]{1,100}"
_TASK_ID = r"[A-Za-z0-9_-]{1,500}"


class Refusal(Exception):
    """A call that the real service would refuse: the gRPC status and its message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


def check_location(name: str) -> None:
    if not re.fullmatch(_LOCATION, name):
        raise invalid("Invalid resource field value in the request.")  # [recorded]


def check_queue_name(name: str) -> None:
    if not re.fullmatch(_QUEUE, name):
        raise invalid(
            'Queue name must be formatted: "projects/<PROJECT_ID>/locations/<LOCATION_ID>/queues/<QUEUE_ID>".'
        )  # [recorded]


def check_task_name(name: str) -> None:
    queue, separator, task_id = name.partition("/tasks/")
    if not separator or not re.fullmatch(_QUEUE, queue):
        raise invalid(
            "Task name must be formatted:"
            ' "projects/<PROJECT_ID>/locations/<LOCATION_ID>/queues/<QUEUE_ID>/tasks/<TASK_ID>"'
        )
    if not re.fullmatch(_TASK_ID, task_id):
        raise invalid(
            f'Task ID "{task_id}" can contain only letters ([A-Za-z]), numbers ([0-9]), hyphens (-), or underscores'
            " (_). Task ID must between 1 and 500 characters."
        )  # [recorded]


def queue_of(task_name: str) -> str:
    return task_name.partition("/tasks/")[0]


def short(name: str) -> str:
    """The last segment: what the `X-CloudTasks-…` headers carry."""
    return name.rpartition("/")[2]


class Tombstones:
    """Names that are gone but still count as used, for a fixed time each."""

    def __init__(self, lifetime: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime = lifetime.total_seconds()
        self._clock = clock
        self._until: dict[str, float] = {}  # in the order of burial, hence of expiry

    def bury(self, name: str) -> None:
        now = self._clock()
        self._forget(now)
        self._until[name] = now + self._lifetime

    def __contains__(self, name: str) -> bool:
        return self._until.get(name, 0.0) > self._clock()

    def _forget(self, now: float) -> None:
        while self._until and (oldest := next(iter(self._until.items())))[1] <= now:
            del self._until[oldest[0]]


def page(names: Iterable[str], size: int, token: str, largest: int) -> tuple[list[str], str]:
    """One page of `names`, sorted, and the token of the next one ("" after the last).

    The token holds the last name given out, so a listing neither skips nor repeats what exists throughout, whatever is
    created and deleted meanwhile.
    """
    if size < 0:
        raise invalid("page_size cannot be negative.")
    after = _decode(token) if token else ""
    count = min(size or largest, largest)
    found = heapq.nsmallest(count + 1, (name for name in names if name > after))
    more = len(found) > count
    return found[:count], _encode(found[count - 1]) if more else ""


def _encode(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise invalid("page_token is not one that this service gave out.") from None

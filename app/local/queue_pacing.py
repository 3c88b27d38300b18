"""How fast a queue pushes, and how long a failed task waits. Pure: every time is an argument, in seconds.

The token bucket, the burst and the back-off are Google's as documented. That 429, 503 and a high rate of errors slow
the whole queue down is documented too, but by how much is not: those constants are our own choice. The real service
also ramps up slowly after a queue was idle; that is not emulated.
"""

import math
from collections import deque

SLOW_RATE = 8.0
"""Pushes a second after the first 429 or 503 (half the queue's rate, if that is less); each further one halves it."""

FLOOR_RATE = 0.125
"""Pushes a second that a slowed queue always keeps."""

SETTLING_SECONDS = 1.0
"""Answers this soon after a slow-down belong to pushes sent before it, and slow nothing further."""

EASING_SECONDS = 2.0
"""After so long without a slow-down a slowed queue's rate doubles, until it is back at its own."""

ERROR_WINDOW = 100
"""A queue slows down when more than half of so many answers, counted since the last slow-down, were failures."""


def burst_size(rate: float) -> int:
    """`max_burst_size`, which is output only: 100 at 500/s and 10 at up to 5/s, as `gcloud tasks queues describe`
    shows; in between we interpolate."""
    return max(10, math.ceil(rate / 5))


def backoff(failures: int, minimum: float, maximum: float, doublings: int) -> float:
    """Seconds between failure number `failures` (1-based) and the next try: `minimum` doubled up to `doublings` times,
    then growing linearly by the last doubled value, never above `maximum`."""
    doubled = min(failures - 1, doublings, 64)  # 2**64 exceeds any Duration: keeps the power finite
    linear = max(1, failures - doublings)
    return min(maximum, minimum * 2.0**doubled * linear)


class Pace:
    """A token bucket of `burst` tokens that refills at `rate` a second, or slower while the target asks for mercy."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._tokens = float(burst_size(rate))
        self._refilled_at = now
        self._slowed_to: float | None = None
        self._slowed_at = self._eased_at = now
        self._failures: deque[bool] = deque(maxlen=ERROR_WINDOW)

    @property
    def rate(self) -> float:
        """The rate in force, in pushes a second."""
        return self._rate if self._slowed_to is None else self._slowed_to

    def change(self, rate: float, now: float) -> None:
        self._refill(now)
        self._rate = rate
        self._tokens = min(self._tokens, burst_size(rate))

    def delay(self, now: float) -> float:
        """Seconds until a push is allowed; 0: now. Ask again then: the rate may have changed."""
        self._refill(now)
        missing = 1.0 - self._tokens
        if missing <= 1e-9:  # what rounding leaves of a token
            return 0.0
        wait = missing / self.rate
        return wait if self._slowed_to is None else min(wait, EASING_SECONDS)

    def take(self) -> None:
        self._tokens -= 1.0

    def heard(self, status: int, failed: bool, now: float) -> None:
        """Learn from an answer's HTTP status."""
        self._failures.append(failed)
        many = len(self._failures) == ERROR_WINDOW and sum(self._failures) > ERROR_WINDOW / 2
        if status in (429, 503) or many:
            self._slow_down(now)

    def _slow_down(self, now: float) -> None:
        self._refill(now)
        if self._slowed_to is not None and now - self._slowed_at < SETTLING_SECONDS:
            return
        halved = min(SLOW_RATE, self._rate / 2) if self._slowed_to is None else self._slowed_to / 2
        self._slowed_to = max(halved, min(FLOOR_RATE, self._rate))
        self._slowed_at = self._eased_at = now
        self._tokens = 0.0
        self._failures.clear()

    def _refill(self, now: float) -> None:
        capacity = burst_size(self._rate) if self._slowed_to is None else 1
        self._tokens = max(self._tokens, min(capacity, self._tokens + self.rate * (now - self._refilled_at)))
        self._refilled_at = now
        self._ease(now)

    def _ease(self, now: float) -> None:
        while self._slowed_to is not None and now - self._eased_at >= EASING_SECONDS:
            self._eased_at += EASING_SECONDS
            self._slowed_to = self._slowed_to * 2 if self._slowed_to * 2 < self._rate else None

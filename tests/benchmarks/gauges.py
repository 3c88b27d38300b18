"""What is measured in every row alike: outcomes, the time of database calls, and connections in use."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine


@dataclass
class Gauge:
    """`failed`: evaluations of which a delivery failed, each once. `calls`: seconds of each database call, failed ones
    too. `held`: connection-seconds in use, over all workers. `reasons`: of failures, by kind of error."""

    evaluations: int = 0
    failed: set[int] = field(default_factory=set)
    deliveries_failed: int = 0
    lost: int = 0
    twice: int = 0
    calls: list[float] = field(default_factory=list)
    held: float = 0
    opened: int = 0
    seconds: float = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Gauge") -> "Gauge":
        """Of another part of the same row, with evaluations of its own that are numbered from 1 as well."""
        return Gauge(
            evaluations=self.evaluations + other.evaluations,
            failed=self.failed | {self.evaluations + number for number in other.failed},
            deliveries_failed=self.deliveries_failed + other.deliveries_failed,
            lost=self.lost + other.lost,
            twice=self.twice + other.twice,
            calls=self.calls + other.calls,
            held=self.held + other.held,
            opened=self.opened + other.opened,
            seconds=max(self.seconds, other.seconds),
            reasons=self.reasons + other.reasons,
        )

    def fail(self, number: int, reason: str) -> None:
        self.failed.add(number)
        self.deliveries_failed += 1
        self.reasons[reason] += 1

    @contextmanager
    def call(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.calls.append(time.monotonic() - began)

    def watch(self, engine: AsyncEngine) -> None:
        """Adds up how long the pool's connections are in use, and how many were opened."""
        since: dict[int, float] = {}

        def checkout(_: Any, record: Any, __: Any) -> None:
            since[id(record)] = time.monotonic()

        def checkin(_: Any, record: Any) -> None:
            self.held += time.monotonic() - since.pop(id(record), time.monotonic())

        def connected(*_: Any) -> None:
            self.opened += 1

        event.listen(engine.sync_engine, "checkout", checkout)
        event.listen(engine.sync_engine, "checkin", checkin)
        event.listen(engine.sync_engine, "connect", connected)


def percentile(values: list[float], share: float) -> float:
    """The nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def upper_bound(failures: int, n: int, confidence: float = 0.95) -> float:
    """The share that failures stay below with that confidence (one-sided, exact: Clopper and Pearson 1934). Without a
    failure it is about 3 / n."""
    if failures >= n:
        return 1.0
    low, high = failures / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(failures, n, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(k: int, n: int, p: float) -> float:
    """Of n independent trials at most k happen."""
    if p <= 0:
        return 1.0
    if p >= 1:
        return float(k >= n)
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return math.fsum(math.exp(value) for value in logs)

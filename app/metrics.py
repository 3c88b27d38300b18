"""Figures: the instruments of OpenTelemetry's API, by what they tell of.

Attributes are few and their values fewer: kinds, verdicts, causes, providers; never an id. Without a meter provider (the
default) recording does nothing and keeps nothing.
"""

import time
from collections.abc import Callable, Iterable
from typing import Literal

from opentelemetry.metrics import CallbackOptions, Meter, NoOpMeter, Observation

NO_METER: Meter = NoOpMeter("proctor")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Bounds for what takes milliseconds: waits for a connection, and its use."""

START_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60)
"""Bounds for a child's start: 0.2 s from a warm forkserver, some 4 s from a cold one, 60 s when it is given up."""

MIB = 2**20
MEMORY = tuple(n * MIB for n in (64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384))
"""Bounds (bytes) for a child's memory: Inspect alone has about 150 MiB, which all children share."""

FRESH = 150.0
"""Seconds for which what a sweep saw is told: two and a half sweeps. Each sweep may reach another worker, and none may go
on telling what it saw an hour ago. Ours."""

Replaced = Literal["recycle", "ping", "timeout", "server gone", "broken", "doubted"]
"""Why a pooled connection is replaced: past its age; silent when asked; cut because its session took too long or was
cancelled; its server shuts down or failed over; broken otherwise; or older than one that broke, so not trusted."""


class SessionFigures:
    """Of sessions: how long they wait for a connection, and hold it."""

    def __init__(self, meter: Meter = NO_METER) -> None:
        self._wait = meter.create_histogram(
            "proctor.pool.wait",
            unit="s",
            description="How long a database session waits for its connection, a ping or a login included.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._hold = meter.create_histogram(
            "proctor.pool.hold",
            unit="s",
            description="How long database sessions are held, from checkout to return.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )

    def waited(self, seconds: float) -> None:
        self._wait.record(seconds)

    def held(self, seconds: float) -> None:
        self._hold.record(seconds)


class PoolFigures:
    """Of the pool: connections in use, and what becomes of them. `in_use` is asked from another thread."""

    def __init__(self, meter: Meter, in_use: Callable[[], int]) -> None:
        self._pings = meter.create_counter(
            "proctor.pool.pings_failed",
            unit="{ping}",
            description="Pooled connections that did not answer their ping: dead, and caught before use.",
        )
        self._replaced = meter.create_counter(
            "proctor.pool.replaced", unit="{connection}", description="Pooled connections given up, by cause."
        )
        meter.create_observable_gauge(
            "proctor.pool.in_use",
            callbacks=[lambda _: [Observation(in_use())]],
            unit="{connection}",
            description="Connections checked out of the pool.",
        )

    def replaced(self, cause: Replaced) -> None:
        self._replaced.add(1, {"cause": cause})
        if cause == "ping":
            self._pings.add(1)


class LedgerFigures:
    """Of the transitions: how claims are answered, which writes are refused, and why work is done again."""

    def __init__(self, meter: Meter = NO_METER) -> None:
        self._claims = meter.create_counter(
            "proctor.ledger.claims",
            unit="{claim}",
            description="Claims by kind of execution and verdict; `held` and `over` are duplicate deliveries.",
        )
        self._stale = meter.create_counter(
            "proctor.ledger.stale_writes",
            unit="{write}",
            description="Writes refused because a later attempt holds the execution, by transition.",
        )
        self._retries = meter.create_counter(
            "proctor.ledger.retries",
            unit="{attempt}",
            description="Attempts whose execution has to be tried again, by cause.",
        )

    def claimed(self, kind: str, verdict: str) -> None:
        self._claims.add(1, {"kind": kind, "verdict": verdict})
        if verdict == "taken over":
            self.retried("lease lost")

    def stale(self, transition: str) -> None:
        self._stale.add(1, {"transition": transition})

    def retried(self, cause: str) -> None:
        self._retries.add(1, {"cause": cause})


class RunnerFigures:
    """Of the children: how many, how quickly they start, what they take and what they spend."""

    def __init__(self, meter: Meter = NO_METER) -> None:
        self._children = meter.create_up_down_counter(
            "proctor.runner.children", unit="{process}", description="Child processes alive."
        )
        self._start = meter.create_histogram(
            "proctor.runner.start",
            unit="s",
            description="From the fork that is asked for until the child has started, and until its samples run.",
            explicit_bucket_boundaries_advisory=START_SECONDS,
        )
        self._memory = meter.create_histogram(
            "proctor.runner.memory_peak",
            unit="By",
            description="A child's largest resident set, what it shares with the forkserver included.",
            explicit_bucket_boundaries_advisory=MEMORY,
        )
        self._tokens = meter.create_counter(
            "proctor.runner.tokens", unit="{token}", description="Tokens used, by model provider."
        )
        self._cost = meter.create_counter(
            "proctor.runner.cost",
            unit="USD",
            description="US dollars spent where Inspect knows the price, by provider.",
        )

    def child(self, change: Literal[1, -1]) -> None:
        self._children.add(change)

    def started(self, seconds: float, until: Literal["started", "first sample"], kind: str) -> None:
        self._start.record(seconds, {"until": until, "kind": kind})

    def memory(self, peak_bytes: int, kind: str) -> None:
        self._memory.record(peak_bytes, {"kind": kind})

    def spent(self, provider: str, tokens: int, cost: float) -> None:
        self._tokens.add(tokens, {"provider": provider})
        if cost:
            self._cost.add(cost, {"provider": provider})


class QueueFigures:
    """Of what waits, as the last sweep saw it."""

    def __init__(self, meter: Meter = NO_METER) -> None:
        self.wanted = meter is not NO_METER
        """Nobody need ask the database otherwise."""
        self._seen: tuple[float, int] | None = None
        self._at = 0.0
        meter.create_observable_gauge(
            "proctor.queue.oldest_pending_age",
            callbacks=[lambda options: self._tell(options, 0)],
            unit="s",
            description="How long the execution that is pending for the longest has been so; 0: none is.",
        )
        meter.create_observable_gauge(
            "proctor.queue.pending",
            callbacks=[lambda options: self._tell(options, 1)],
            unit="{execution}",
            description="Executions that are pending.",
        )

    def swept(self, oldest_seconds: float, pending: int) -> None:
        self._seen, self._at = (oldest_seconds, pending), time.monotonic()

    def _tell(self, _: CallbackOptions, which: Literal[0, 1]) -> Iterable[Observation]:
        if self._seen is not None and time.monotonic() - self._at < FRESH:
            yield Observation(self._seen[which])

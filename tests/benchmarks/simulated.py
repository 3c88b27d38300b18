"""Proctor's worker with nothing simulated but the child, which sleeps: the real engine, ledger, leases and executor."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

from sqlalchemy import Executable, Row, text

from app.artifacts import Artifacts
from app.containment import Contained
from app.database.engine import open_engine
from app.database.session import Database, refuse_held_session
from app.errors import ProctorError
from app.execution import Executor, Push
from app.leases import Leases
from app.ledger import Ledger, Settlement
from app.queue import Queue
from app.runner.messages import LOGS, Done, Job, Progress, SampleEnded, SampleRef, SampleResult, ScoreValue, Started
from app.runner.supervisor import Supervisor
from app.saved import Saved
from app.scratch import Scratch
from app.settings import Settings
from app.spec import Spec
from tests.benchmarks.arrivals import Arrival
from tests.benchmarks.gauges import Gauge

BACKOFF = 0.05
"""Seconds before a push is repeated: 5 s, scaled."""
SPEC = Spec(task="proctor/programming", model="mockllm/model")


class Sleeper:
    """Stands for the supervisor: a child that sleeps as long as its evaluation lasts, and then tells a score."""

    def __init__(self, lasts: dict[str, float]) -> None:
        self._lasts = lasts
        self.began = time.monotonic()
        self.peak_bytes = None

    async def warm(self) -> None:
        """It always is."""

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator["SleepingChild"]:
        refuse_held_session("sleep")
        yield SleepingChild(job, self._lasts[job.execution_id])


class SleepingChild:
    def __init__(self, job: Job, lasts: float) -> None:
        self._job = job
        self._lasts = lasts
        self.began = time.monotonic()
        self.peak_bytes = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield Started(pid=0, versions={})
        await asyncio.sleep(self._lasts / 2)
        yield Progress(tokens=1)
        await asyncio.sleep(self._lasts / 2)
        (sample,) = self._job.samples
        log = Path(self._job.directory, LOGS, "log.eval")
        await asyncio.to_thread(_write, log)
        yield SampleEnded(result=SampleResult(sample=sample, scores={"odd": ScoreValue(value=1)}, log=log.name))
        yield Done()

    def kill(self) -> None:
        """It is nothing but a sleep, which its listener's end ends."""


def _write(log: Path) -> None:
    log.parent.mkdir(parents=True)
    log.write_bytes(b"log")


class Timed(Database):
    """Every call's time goes to the gauge, its waiting and its retries included."""

    gauge: Gauge

    async def run(
        self, statement: Executable, parameters: dict[str, Any] | None = None, *, patience: float | None = None
    ) -> Sequence[Row[Any]]:
        with self.gauge.call():
            return await super().run(statement, parameters, patience=patience)


class Worker:
    """One instance of the service."""

    def __init__(self, executor: Executor, evaluation: UUID, gauge: Gauge) -> None:
        self._executor = executor
        self._evaluation = evaluation
        self._gauge = gauge

    async def deliver(self, arrival: Arrival) -> None:
        """As the queue does: again, until it is acknowledged. What is not acknowledged counts as failed."""
        execution = f"{self._evaluation}.{arrival.number}"
        while True:
            try:
                answer = await self._executor.execute(Push(execution, alone=True))
            except ProctorError as error:
                self._gauge.fail(arrival.number, type(error).__name__)
            else:
                if answer.kind == "terminal":
                    return
                self._gauge.fail(arrival.number, answer.message)
            await asyncio.sleep(BACKOFF)


@asynccontextmanager
async def open_worker(
    settings: Settings, evaluation: UUID, lasts: dict[str, float], gauge: Gauge, *, lifo: bool = True
) -> AsyncIterator[Worker]:
    """`lasts`: seconds by execution id."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(open_engine(settings, lifo=lifo))
        gauge.watch(engine)
        await Database(engine, settings).run(text("SELECT 1"))  # as a service's first look: the connector's key is made
        database = Timed(engine, settings)
        database.gauge = gauge
        ledger = Ledger(database, lease=settings.lease, worker=settings.worker)
        artifacts = Artifacts(settings.artifacts)
        executor = Executor(
            ledger=ledger,
            queue=cast(Queue, None),  # every push here is alone: nothing is enqueued
            artifacts=artifacts,
            saved=Saved(artifacts),
            scratch=await stack.enter_async_context(Scratch(settings.scratch)),
            supervisor=cast(Supervisor, Sleeper(lasts)),
            contained=await stack.enter_async_context(Contained(settings)),
            leases=Leases(ledger, settings),
            settings=settings,
        )
        yield Worker(executor, evaluation, gauge)


async def plan(settings: Settings, runs: int) -> UUID:
    """An evaluation of so many runs, `<evaluation>.1` and so on, as a plan leaves it."""
    async with open_engine(settings) as engine:
        ledger = Ledger(Database(engine, settings), lease=settings.lease, worker=settings.worker)
        evaluation = (await ledger.submit(SPEC, "benchmark")).evaluation_id
        claim = await ledger.claim(f"{evaluation}.plan", uuid4())
        assert claim
        samples = [[SampleRef(id=n, epoch=1)] for n in range(1, runs + 1)]
        settled = await ledger.settle(claim.execution_id, claim.attempt, Settlement("succeeded", runs=samples))
        assert settled
        assert settled.runs == runs
    return evaluation


async def count(connection: Any, gauge: Gauge, evaluation: UUID) -> None:
    """What is in the database in the end, against what must be."""
    results = await connection.fetchval(
        "SELECT count(*) FROM sample_results WHERE evaluation_id = $1 AND error IS NULL", evaluation
    )
    gauge.lost = gauge.evaluations - results
    gauge.twice = await connection.fetchval(
        "SELECT count(*) FROM (SELECT a.execution_id FROM execution_attempts a JOIN task_executions e"
        " ON e.id = a.execution_id WHERE e.evaluation_id = $1 AND e.kind = 'run' AND a.outcome = 'succeeded'"
        " GROUP BY a.execution_id HAVING count(*) > 1) AS doubled",
        evaluation,
    )

"""What a worker asks of the database: with 15 long evaluations under way, and with none.

Two whole services, as `create_app` composes them, with production's settings; only the children sleep. Statements and
round trips are counted on the way to the server, pings and what opening a connection takes included.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.execution import Answer, Executor, Push
from app.local.postgres import open_postgres
from app.main import create_app
from app.runner.messages import Job
from app.runner.supervisor import Supervisor
from app.settings import Settings, load
from app.web.state import Services
from tests.benchmarks import simulated
from tests.benchmarks.pool import Sessions
from tests.conftest import make_template, own_database
from tests.faults.proxy import Proxy
from tests.report import Goal, Report, Value

AT_ONCE = 15
"""Evaluations on one worker, as containerConcurrency."""
MARGIN = 10.0
"""Seconds that the evaluations last longer than they are watched: until all are claimed."""
PING = ";"
LITTLE = 0.01
"""Connections."""


@dataclass(frozen=True, slots=True)
class Size:
    """`seconds` watched; production's settings but for `given`."""

    seconds: float
    given: dict[str, float]


FULL = Size(60, {})
QUICK = Size(5, {"lease": 10, "renew_interval": 1.25, "statement_timeout": 8})


class Gathering(simulated.Sleeper):
    """Tells when so many children sleep."""

    def __init__(self, lasts: dict[str, float]) -> None:
        super().__init__(lasts)
        self._missing = len(lasts)
        self.all_asleep = asyncio.Event()

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[simulated.SleepingChild]:
        async with super().run(job) as child:
            self._missing -= 1
            if not self._missing:
                self.all_asleep.set()
            yield child


class Holds:
    """Connection-seconds in use: from the ping that precedes the use, or the opening's end, to the return."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.seconds = 0.0
        self.longest = 0.0
        self._since: dict[int, float] = {}
        self._ping: Any = engine.dialect.do_ping
        engine.dialect.do_ping = self._do_ping  # type: ignore[method-assign,assignment]
        event.listen(engine.sync_engine, "checkout", self._checkout)
        event.listen(engine.sync_engine, "checkin", self._checkin)

    def _do_ping(self, connection: Any) -> bool:
        self._checkout(connection)
        answered = bool(self._ping(connection))
        if not answered:
            self._checkin(connection)
        return answered

    def _checkout(self, connection: Any, *_: object) -> None:
        self._since.setdefault(id(connection), time.monotonic())

    def _checkin(self, connection: Any, *_: object) -> None:
        held = time.monotonic() - self._since.pop(id(connection), time.monotonic())
        self.seconds += held
        self.longest = max(self.longest, held)


@dataclass(frozen=True, slots=True)
class Count:
    """What there has been so far, or, of two, in between. `held`: connection-seconds. `looks`: at the open sessions."""

    at: float
    statements: int
    round_trips: int
    held: float
    looks: int

    def __sub__(self, other: Self) -> "Count":
        return Count(
            self.at - other.at,
            self.statements - other.statements,
            self.round_trips - other.round_trips,
            self.held - other.held,
            self.looks - other.looks,
        )


class Worker:
    """A whole service, and what passes between it and the database."""

    def __init__(self, services: Services, proxy: Proxy, sessions: Sessions) -> None:
        self.services = services
        self.holds = Holds(services.database.engine)
        self._proxy = proxy
        self._sessions = sessions

    def count(self) -> Count:
        statements = sum(sql != PING for sql in self._proxy.executed)
        return Count(
            time.monotonic(), statements, self._proxy.round_trips, self.holds.seconds, len(self._sessions.open)
        )

    def row(self, what: str, before: Count, after: Count) -> dict[str, Value]:
        between = after - before
        open_sessions = [sum(look) for look in self._sessions.open[before.looks : after.looks]]
        return {
            "what": what,
            "seconds": between.at,
            "statements": between.statements,
            "statements per second": between.statements / between.at,
            "round trips": between.round_trips,
            "connection-seconds in use": between.held,
            "connections in use": between.held / between.at,
            "connections open": sum(open_sessions) / len(open_sessions),
        }


async def measure(quick: bool) -> Report:
    size = QUICK if quick else FULL
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="budget-")))
        url = stack.enter_context(open_postgres(folder / "postgres", durable=False))
        await make_template(url)
        database = await stack.enter_async_context(own_database(url))
        evaluation = await simulated.plan(load(database_url=database), AT_ONCE)
        idle = await _open_worker("idle", database, folder, size, stack)
        busy = await _open_worker("busy", database, folder, size, stack)
        rows = await asyncio.gather(_idle(idle, size.seconds), _busy(busy, evaluation, size.seconds))
    return _report([row for found in rows for row in found])


async def _open_worker(name: str, database: str, folder: Path, size: Size, stack: AsyncExitStack) -> Worker:
    """With a way to the database of its own."""
    server = urlsplit(database)
    proxy = await stack.enter_async_context(Proxy((str(server.hostname), server.port or 5432)))
    settings = _settings(proxy.through(database), name, folder, size)
    app = create_app(settings)
    state = await stack.enter_async_context(app.router.lifespan_context(app))
    services = cast(dict[str, Services], state)["services"]
    await services.executor.supervisor.warm()  # or it competes for the processor with what is measured
    sessions = Sessions(proxy, [name])
    await stack.enter_async_context(sessions.watched(database))
    return Worker(services, proxy, sessions)


def _settings(url: str, name: str, folder: Path, size: Size) -> Settings:
    return load(
        database_url=url,
        worker=name,
        queue_endpoint="127.0.0.1:9",  # never called: every push here is alone
        artifacts=f"file://{folder}/artifacts",
        scratch=folder / "scratch",
        **size.given,
    )


async def _idle(worker: Worker, seconds: float) -> list[dict[str, Value]]:
    before = worker.count()
    await asyncio.sleep(seconds)
    return [worker.row("idle", before, worker.count())]


async def _busy(worker: Worker, evaluation: UUID, seconds: float) -> list[dict[str, Value]]:
    lasts = {f"{evaluation}.{n}": seconds + MARGIN for n in range(1, AT_ONCE + 1)}
    children = Gathering(lasts)
    executor = replace(worker.services.executor, supervisor=cast(Supervisor, children))
    first = worker.count()
    async with asyncio.TaskGroup() as pushes:
        answers = [pushes.create_task(_push(executor, execution)) for execution in lasts]
        async with asyncio.timeout(MARGIN):
            await children.all_asleep.wait()
        began = worker.count()
        await asyncio.sleep(seconds)
        ended = worker.count()
        if any(answer.done() for answer in answers):
            raise RuntimeError("an evaluation ended while it was to be under way")
    return [
        worker.row(f"{AT_ONCE} evaluations under way", began, ended),
        worker.row("the same with their beginning and their end", first, worker.count()),
    ]


async def _push(executor: Executor, execution: str) -> Answer:
    answer = await executor.execute(Push(execution, alone=True))
    if answer.state != "succeeded":
        raise RuntimeError(f"{execution}: {answer.message}")
    return answer


def _report(rows: list[dict[str, Value]]) -> Report:
    idle, busy, _ = rows
    asked, used = cast(float, idle["round trips"]), cast(float, busy["connections in use"])
    return Report(
        "budget",
        rows,
        [
            Goal("round trips of an idle worker", "0", asked, asked == 0),
            Goal(
                f"connections in use while {AT_ONCE} evaluations are under way", f"below {LITTLE}", used, used < LITTLE
            ),
        ],
    )

"""LIFO or FIFO, and whether the server ends idle sessions: what each leaves open, at either end of a path that drops.

All rows see the same evaluations at the same moments, time scaled 100 : 1 as in `idle_drop`. The network drops an idle
connection without a word, so the session at its other end stays until the server finds out by itself. TCP's keepalive would
tell it, but behind AlloyDB's own proxy it asks that, which is alive: here such a session stays for good.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import structlog
import uvloop
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.local.postgres import open_postgres
from app.settings import Settings, load
from tests.benchmarks import simulated
from tests.benchmarks.arrivals import Arrival, Batch, plan
from tests.benchmarks.gauges import Gauge, percentile
from tests.conftest import make_template, own_database
from tests.faults.proxy import Proxy
from tests.report import Goal, Report, Value

SEED = 20261122
IDLE_AFTER = 6.0
"""Seconds until the network drops an idle connection: 600, scaled."""
QUIET = 8.0
"""Seconds watched after the last evaluation: more than IDLE_AFTER, so that what falls idle in the end counts too."""
EVERY = 0.25
"""Seconds between two looks at the server's sessions."""
FULL, QUICK = (160, 4), (20, 2)
"""Evaluations and workers of each row: some 90 s and some 25 s."""
CERTAIN = 1.0
"""Seconds for which a session has been without its client before it counts as orphaned: a server process that merely
ends takes some milliseconds, on a busy machine more."""


@dataclass(frozen=True, slots=True)
class Way:
    lifo: bool
    trimmed: bool

    def __str__(self) -> str:
        return f"{'LIFO' if self.lifo else 'FIFO'}, {'trimmed by the server' if self.trimmed else 'not trimmed'}"


WAYS = [Way(lifo, trimmed) for lifo in (True, False) for trimmed in (True, False)]
CHOSEN = WAYS[0]


@dataclass
class PoolGauge(Gauge):
    """Statements and pings are counted at the engine; a connection that is opened is told whether it may be trimmed."""

    trimmed: bool = True
    statements: int = 0
    pings: int = 0
    pings_failed: int = 0

    def watch(self, engine: AsyncEngine) -> None:
        super().watch(engine)
        ping: Callable[[Any], bool] = engine.dialect.do_ping

        def do_ping(connection: Any) -> bool:
            self.pings += 1
            answered = ping(connection)
            self.pings_failed += not answered
            return answered

        engine.dialect.do_ping = do_ping  # type: ignore[method-assign,assignment]
        event.listen(engine.sync_engine, "connect", self._tell_the_server)
        event.listen(engine.sync_engine, "before_cursor_execute", self._count)

    def _tell_the_server(self, connection: Any, _: Any) -> None:
        """One round trip in every row: back to what `server_settings` said, or off."""
        sql = "RESET idle_session_timeout" if self.trimmed else "SET idle_session_timeout = 0"
        connection.run_async(lambda raw: raw.execute(sql))

    def _count(self, *_: Any) -> None:
        self.statements += 1


@dataclass
class Sessions:
    """The workers' sessions in one database, as the server sees them: `open` and `orphaned`, one list for each look, with
    the number of each worker's. Orphaned: the server holds it, and no way leads to it from its client."""

    proxy: Proxy
    workers: Sequence[str]
    open: list[list[int]] = field(default_factory=list)
    orphaned: list[list[int]] = field(default_factory=list)
    _unreachable: dict[int, float] = field(default_factory=dict)

    @asynccontextmanager
    async def watched(self, url: str) -> AsyncIterator[None]:
        """For as long as the block lasts. `url`: the database, past the proxy."""
        connection = await asyncpg.connect(url, server_settings={"application_name": "benchmark"})
        looking = asyncio.create_task(self._look_on(connection))
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.wait({looking})
            await connection.close()
        if not looking.cancelled():
            looking.result()

    async def _look_on(self, connection: Any) -> None:
        while True:
            rows = await connection.fetch(
                "SELECT pid, client_port, application_name FROM pg_stat_activity WHERE datname = current_database()"
            )
            self._take([(row["pid"], row["client_port"], row["application_name"]) for row in rows])
            await asyncio.sleep(EVERY)

    def _take(self, sessions: Sequence[tuple[int, int, str]]) -> None:
        now = time.monotonic()
        ways = {way.server.transport.get_extra_info("sockname")[1] for way in self.proxy.connections}
        lost = {pid for pid, port, _ in sessions if port not in ways}
        self._unreachable = {pid: self._unreachable.get(pid, now) for pid in lost}
        certain = {pid for pid, since in self._unreachable.items() if now - since >= CERTAIN}
        names = [f"proctor {worker}" for worker in self.workers]
        owners = [name for _, _, name in sessions]
        orphans = [name for pid, _, name in sessions if pid in certain]
        self.open.append([owners.count(name) for name in names])
        self.orphaned.append([orphans.count(name) for name in names])


def _mean(looks: Sequence[Sequence[int]]) -> float:
    """Per worker."""
    return sum(map(sum, looks)) / sum(map(len, looks))


Found = tuple[PoolGauge, list[list[int]], list[list[int]]]
"""With what `Sessions` saw: open, orphaned."""


async def measure(quick: bool) -> Report:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        found = await asyncio.get_running_loop().run_in_executor(process, run, *(QUICK if quick else FULL))
    rows = dict(zip(WAYS, found, strict=True))
    return Report("pool", [_figures(way, *figures) for way, figures in rows.items()], _goals(rows))


def run(evaluations: int, workers: int) -> list[Found]:
    """In a process of its own, for the faster event loop: the rows must not be short of processor time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with (
        TemporaryDirectory(prefix="pool-") as folder,
        open_postgres(Path(folder, "postgres"), durable=False, options=("max_connections=1000",)) as url,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(make_template(url))
        return runner.run(_rows(url, Path(folder), plan(SEED, evaluations, workers)))


async def _rows(url: str, folder: Path, batches: list[list[Batch]]) -> list[Found]:
    return await asyncio.gather(*(_row(url, folder, way, batches) for way in WAYS))


async def _row(url: str, folder: Path, way: Way, batches: list[list[Batch]]) -> Found:
    """With a path, a database and workers of its own."""
    arrivals = [arrival for mine in batches for batch in mine for arrival in batch.arrivals]
    gauge = PoolGauge(evaluations=len(arrivals), trimmed=way.trimmed)
    names = [f"worker-{n}" for n in range(len(batches))]
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(own_database(url))
        server = urlsplit(database)
        proxy = await stack.enter_async_context(Proxy((str(server.hostname), server.port or 5432)))
        proxy.recording, proxy.idle_cut, proxy.idle_after = False, "drop", IDLE_AFTER
        evaluation = await simulated.plan(load(database_url=database), len(arrivals))
        lasts = {f"{evaluation}.{arrival.number}": arrival.lasts for arrival in arrivals}
        settings = _settings(proxy.through(database), folder)
        workers = [
            await stack.enter_async_context(
                simulated.open_worker(
                    settings.model_copy(update={"worker": name}), evaluation, lasts, gauge, lifo=way.lifo
                )
            )
            for name in names
        ]
        sessions = Sessions(proxy, names)
        async with sessions.watched(database):
            await asyncio.gather(*(_work(worker, mine) for worker, mine in zip(workers, batches, strict=True)))
            await asyncio.sleep(QUIET)
        connection = await stack.enter_async_context(_connection(database))
        await simulated.count(connection, gauge, evaluation)
    return gauge, sessions.open, sessions.orphaned


def _settings(url: str, folder: Path) -> Settings:
    """As in `idle_drop`."""
    return load(
        database_url=url,
        pool_recycle=1.8,
        pool_timeout=0.3,
        connect_timeout=1,
        ping_timeout=0.2,
        socket_timeout=1,
        statement_timeout=1,
        database_patience=9,
        lease=1.2,
        renew_interval=0.15,
        renew_patience=3,
        artifacts=f"file://{folder}/artifacts",
        scratch=folder / "scratch",
    )


async def _work(worker: simulated.Worker, batches: list[Batch]) -> None:
    for batch in batches:
        await asyncio.sleep(batch.pause)
        await asyncio.gather(*(_arrive(worker, arrival) for arrival in batch.arrivals))


async def _arrive(worker: simulated.Worker, arrival: Arrival) -> None:
    await asyncio.sleep(arrival.at)
    await worker.deliver(arrival)


@asynccontextmanager
async def _connection(url: str) -> "AsyncIterator[asyncpg.Connection[Any]]":
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def _figures(way: Way, gauge: PoolGauge, opened: list[list[int]], orphaned: list[list[int]]) -> dict[str, Value]:
    return {
        "pool": str(way),
        "evaluations": gauge.evaluations,
        "failed, lost or twice": _wrong(gauge),
        "sessions open per worker": _mean(opened),
        "at most": max(map(max, opened)),
        "of them orphaned": _mean(orphaned),
        "orphaned at the end": _mean(orphaned[-1:]),
        "connections opened": gauge.opened,
        "opened per 100 statements": 100 * gauge.opened / gauge.statements,
        "pings": gauge.pings,
        "pings failed": gauge.pings_failed,
        "call p50 ms": 1000 * percentile(gauge.calls, 0.5),
        "call p99 ms": 1000 * percentile(gauge.calls, 0.99),
    }


def _wrong(gauge: Gauge) -> int:
    return len(gauge.failed) + gauge.lost + gauge.twice


def _goals(rows: dict[Way, Found]) -> list[Goal]:
    average = {way: _mean(opened) for way, (_, opened, _) in rows.items()}
    least = min(mean for way, mean in average.items() if way != CHOSEN)
    most = max(map(max, rows[CHOSEN][2]))
    wrong = sum(_wrong(gauge) for gauge, *_ in rows.values())
    return [
        Goal(f"orphaned sessions of a worker, at most ({CHOSEN})", "0", most, most == 0),
        Goal(
            f"sessions open per worker on average ({CHOSEN})",
            f"no more than the least of the others, {least:.2f}",
            average[CHOSEN],
            average[CHOSEN] <= least,
        ),
        Goal("evaluations failed, lost or recorded twice, all rows", "0", wrong, wrong == 0),
    ]

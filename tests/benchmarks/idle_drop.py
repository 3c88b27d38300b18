"""The original bug, before and after: connections that sit idle are dropped, and the pool hands the dead ones on.

Time runs 100 : 1 where the bug is concerned (`SCALED`). All rows see the same evaluations at the same moments, through the
AlloyDB stand-in and the real connector. What bounds latency is as in production, for a machine's own latency does not
shrink with time: a dead connection that takes 2 s to notice takes as long as 200 s would.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import asyncpg
import structlog
import uvloop

from app.database.connect import TRIM_AT, open_connector
from app.local.postgres import open_postgres
from app.settings import Settings, load
from tests.benchmarks import simulated, story
from tests.benchmarks.arrivals import LONGEST, SHORTEST, Arrival, Batch, plan, renumbered
from tests.benchmarks.gauges import Gauge, percentile, upper_bound
from tests.benchmarks.story import Ways
from tests.conftest import make_template, own_database
from tests.faults.alloydb import AlloyDB, open_alloydb
from tests.faults.connection import Cut
from tests.report import Goal, Report, Value, machine

SEED = 20261122
FAULTS: dict[str, Cut] = {"FIN": "fin", "RST": "rst", "black hole": "drop"}
IDLE_AFTER = 6.0
EARLY = 1.0
KERNEL = 9.24
ORPHANS = 78.75
POOL_TIMEOUT = 0.3
SCALED = [
    ("the network drops an idle connection (Cloud Run to VPC)", 600, IDLE_AFTER),
    ("  in the row where it does so early", 100, EARLY),
    ("an evaluation, shortest", 300, SHORTEST),
    ("an evaluation, longest", 1800, LONGEST),
    ("pool_recycle before the fix", 900, 9.0),
    ("pool_recycle", 180, 1.8),
    ("idle_session_timeout", 240, 2.4),
    ("pool_timeout", 30, POOL_TIMEOUT),
    ("the kernel gives up data that nobody acknowledges", 924, KERNEL),
    ("the server's TCP keepalive gives up a client that is gone", 7875, ORPHANS),
    ("the queue's first back-off", 5, story.BACKOFF),
]
"""What, its seconds in production, its seconds here. All else is as in production: ping_timeout 2 s, connect_timeout and
socket_timeout 10 s, statement_timeout 30 s, lease 120 s and its renewal every 15 s, database_patience 90 s, SQLAlchemy's
graceful close 2 s, TCP keepalive after 30 s (too late to be of help here)."""

BEFORE, PROCTOR = "before the fix", "Proctor"
STORY = {
    BEFORE: Ways(recycle=9, pre_ping=False, held=True, once=False),
    "recycle only": Ways(recycle=1.8, pre_ping=False, held=True, once=False),
    "ping only": Ways(recycle=9, pre_ping=True, held=True, once=False),
    "brief sessions only": Ways(recycle=9, pre_ping=False, held=False, once=False),
    "brief sessions, recycle": Ways(recycle=1.8, pre_ping=False, held=False, once=False),
    "brief sessions, ping": Ways(recycle=9, pre_ping=True, held=False, once=False),
    "the story's fix": Ways(recycle=1.8, pre_ping=True, held=False, once=True),
}
"""The fix: both, brief sessions and idempotent writes."""
STORY_S_SHARE = 0.0001
"""That failed with the story's fix."""
ENOUGH = 30_000
"""Evaluations without a failure that bound the share below that."""
EARLIER = "Proctor, dropped at 100 s"


@dataclass(frozen=True, slots=True)
class Size:
    """Evaluations of each row, and the workers that they come to."""

    story: int
    proctor: int
    story_workers: int
    proctor_workers: int
    faults: tuple[str, ...] = tuple(FAULTS)
    rows: tuple[str, ...] = (*STORY, EARLIER, PROCTOR)


FULL = Size(story=510, proctor=9_500, story_workers=4, proctor_workers=46)
QUICK = Size(8, 60, 2, 8, faults=("RST",), rows=(BEFORE, "the story's fix", PROCTOR))
APART = 3.0
"""Seconds between the beginnings of rows that run together: else all their first batches would log in at once."""
PARTS = 2
"""Of Proctor's large row, each in a process of its own. Two cores must not be at their limit: connections that are opened
late are due for recycling (1.8 s) before they have served anybody, and then latency is the machine's."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one process runs: rows at the same time, under one fault; of Proctor's row one of its parts."""

    fault: str
    rows: tuple[str, ...]
    size: Size
    part: int = 0


class Worker(Protocol):
    async def deliver(self, arrival: Arrival) -> None: ...


async def measure(quick: bool) -> Report:
    size = QUICK if quick else FULL
    gauges: dict[tuple[str, str], Gauge] = {}
    spawn, loop = get_context("spawn"), asyncio.get_running_loop()
    with ProcessPoolExecutor(PARTS, spawn) as processes:
        for found in await asyncio.gather(*(loop.run_in_executor(processes, run, unit) for unit in _units(size))):
            for row, gauge in found.items():
                gauges[row] = gauges[row] + gauge if row in gauges else gauge
    return _report({row: gauges[row] for row in sorted(gauges, key=_order)})


def _units(size: Size) -> Iterator[Unit]:
    """Proctor's first; then the story's, the longest first."""
    for fault in size.faults:
        yield from (Unit(fault, (PROCTOR,), size, part) for part in range(PARTS))
    if EARLIER in size.rows:
        yield from (Unit(fault, (EARLIER,), size) for fault in size.faults)
    for fault in reversed(size.faults):
        yield Unit(fault, tuple(row for row in size.rows if row in STORY), size)


def _order(row: tuple[str, str]) -> tuple[int, int]:
    fault, name = row
    return list(FAULTS).index(fault), [*STORY, EARLIER, PROCTOR].index(name)


def run(unit: Unit) -> dict[tuple[str, str], Gauge]:
    """In a process of its own, with a Postgres of its own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    logging.basicConfig(level=logging.CRITICAL)
    options = ("max_connections=2000", "shared_buffers=256MB")
    with (
        TemporaryDirectory(prefix="idle-drop-") as folder,
        open_postgres(Path(folder, "postgres"), durable=False, options=options) as url,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(make_template(url))
        found = runner.run(_rows(url, Path(folder), unit))
    return {(unit.fault, name): gauge for name, gauge in zip(unit.rows, found, strict=True)}


async def _rows(url: str, folder: Path, unit: Unit) -> list[Gauge]:
    async with AsyncExitStack() as stack, open_alloydb(url, folder) as alloydb:
        alloydb.proxy.recording = False
        alloydb.proxy.idle_after = EARLY if unit.rows == (EARLIER,) else IDLE_AFTER
        alloydb.proxy.idle_cut = FAULTS[unit.fault]
        rows = [_row(url, folder, alloydb, stack, name, unit, n * APART) for n, name in enumerate(unit.rows)]
        return await asyncio.gather(*rows)
        # the stand-in ends before the pools are closed: a polite farewell into a black hole takes long


async def _row(
    url: str, folder: Path, alloydb: AlloyDB, stack: AsyncExitStack, name: str, unit: Unit, after: float
) -> Gauge:
    """With pools and a database of its own."""
    await asyncio.sleep(after)
    size, gauge = unit.size, Gauge()
    database = await stack.enter_async_context(own_database(url))
    settings = _settings(alloydb, database, folder)
    if name in STORY:
        await _story(settings, database, stack, gauge, STORY[name], size)
    elif name == PROCTOR:
        mine = plan(SEED, size.proctor, size.proctor_workers)[unit.part :: PARTS]
        await _proctor(settings, database, stack, gauge, renumbered(mine))
    else:
        await _proctor(settings, database, stack, gauge, plan(SEED, size.story, size.story_workers))
    return gauge


async def _story(
    settings: Settings, database: str, stack: AsyncExitStack, gauge: Gauge, ways: Ways, size: Size
) -> None:
    batches = plan(SEED, size.story, size.story_workers)
    # the driver as it comes: none of Proctor's deadlines, 60 s to connect, the kernel's patience at either end
    trim = ORPHANS / TRIM_AT
    plain = {"statement_timeout": 1800.0, "pool_recycle": trim, "connect_timeout": 60.0, "socket_timeout": KERNEL}
    workers: list[Worker] = []
    for _ in batches:
        connect = await stack.enter_async_context(open_connector(settings.model_copy(update=plain)))
        engine = await stack.enter_async_context(story.open_pool(connect, ways, POOL_TIMEOUT))
        async with engine.connect():  # as Proctor's first look: the connector's key is made
            workers.append(story.Worker(engine, ways, gauge))
    async with _connection(database) as connection:
        await connection.execute(story.TABLES)
        await _play(workers, batches, gauge)
        await story.count(connection, gauge, ways)


async def _proctor(
    settings: Settings, database: str, stack: AsyncExitStack, gauge: Gauge, batches: list[list[Batch]]
) -> None:
    arrivals = [arrival for mine in batches for batch in mine for arrival in batch.arrivals]
    evaluation = await simulated.plan(load(database_url=database), len(arrivals))
    lasts = {f"{evaluation}.{a.number}": a.lasts for a in arrivals}
    workers: list[Worker] = []
    for n in range(len(batches)):
        mine = settings.model_copy(update={"worker": f"worker-{n}"})
        workers.append(await stack.enter_async_context(simulated.open_worker(mine, evaluation, lasts, gauge)))
    async with _connection(database) as connection:
        await _play(workers, batches, gauge)
        await simulated.count(connection, gauge, evaluation)


def _settings(alloydb: AlloyDB, database: str, folder: Path) -> Settings:
    return load(
        **alloydb.settings | {"alloydb_database": database.rpartition("/")[2]},
        pool_recycle=1.8,
        pool_timeout=POOL_TIMEOUT,
        artifacts=f"file://{folder}/artifacts",
        scratch=folder / "scratch",
    )


async def _play(workers: Sequence[Worker], batches: list[list[Batch]], gauge: Gauge) -> None:
    gauge.evaluations = sum(len(batch.arrivals) for mine in batches for batch in mine)
    began = time.monotonic()
    await asyncio.gather(*(_work(worker, mine) for worker, mine in zip(workers, batches, strict=True)))
    gauge.seconds = time.monotonic() - began


async def _work(worker: Worker, batches: list[Batch]) -> None:
    for batch in batches:
        await asyncio.sleep(batch.pause)
        await asyncio.gather(*(_arrive(worker, arrival) for arrival in batch.arrivals))


async def _arrive(worker: Worker, arrival: Arrival) -> None:
    await asyncio.sleep(arrival.at)
    await worker.deliver(arrival)


@asynccontextmanager
async def _connection(url: str) -> "AsyncIterator[asyncpg.Connection[Any]]":
    """Past the stand-in."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


# What it came to ------------------------------------------------------------------------------------------------------


def _report(gauges: dict[tuple[str, str], Gauge]) -> Report:
    rows = [_figures(fault, name, gauge) for (fault, name), gauge in gauges.items()]
    scale = "; ".join(f"{what.strip()} {real:g} → {here:g}" for what, real, here in SCALED)
    return Report("idle_drop", rows, _goals(gauges), machine() | {"seconds in production → here": scale, "seed": SEED})


def _figures(fault: str, name: str, gauge: Gauge) -> dict[str, Value]:
    n = gauge.evaluations
    workers = gauge.held / gauge.seconds
    return {
        "idle connections end by": fault,
        "row": name,
        "evaluations": n,
        "failed %": 100 * len(gauge.failed) / n,
        "failed %, 95 % bound": 100 * upper_bound(len(gauge.failed), n),
        "lost": gauge.lost,
        "recorded twice": gauge.twice,
        "call p50 ms": 1000 * percentile(gauge.calls, 0.5),
        "call p99 ms": 1000 * percentile(gauge.calls, 0.99),
        "connections in use": workers,
        "connection-seconds each": gauge.held / n,
        "connections opened": gauge.opened,
        "commonest failure": gauge.reasons.most_common(1)[0][0] if gauge.reasons else "",
    }


def _goals(gauges: dict[tuple[str, str], Gauge]) -> list[Goal]:
    before = [gauge for (_, name), gauge in gauges.items() if name == BEFORE]
    ours = [gauge for (_, name), gauge in gauges.items() if name in (PROCTOR, EARLIER)]
    n, failed = sum(g.evaluations for g in ours), sum(len(g.failed) for g in ours)
    bound = upper_bound(failed, n)
    least = min((len(g.failed) / g.evaluations for g in before), default=1.0)
    wrong = sum(g.lost + g.twice for g in ours)
    goals = [
        Goal("share failed before the fix, least of the faults", "above 0.05", least, least > 0.05),
        Goal("evaluations failed, Proctor's rows together", f"0 of {n}", failed, failed == 0),
        Goal("evaluations lost or recorded twice, Proctor's rows together", "0", wrong, wrong == 0),
    ]
    if n >= ENOUGH:
        goals.append(
            Goal("share failed, 95 % upper bound", "the story's 0.0001 or less", bound, bound <= STORY_S_SHARE)
        )
    return goals

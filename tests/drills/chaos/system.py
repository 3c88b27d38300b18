"""The real stack, in as many processes as in production: two workers behind a front, Postgres behind AlloyDB's stand-in, the
queue, the sweeper, a store, a model provider. What Google runs is run by the drill's own process."""

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc
import httpx
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport
from google.protobuf.duration_pb2 import Duration

from app.database.migrate import migrate_async
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.postgres import open_postgres
from app.settings import load
from tests.drills.chaos import workers
from tests.drills.chaos.front import Front
from tests.drills.chaos.workers import Worker
from tests.faults.alloydb import AlloyDB, open_alloydb
from tests.faults.models import Models, Script

QUEUE = "projects/drill/locations/here/queues/chaos"
WORKERS = 2
AT_ONCE = 8
"""Pushes under way, at most: children of Inspect on two cores. 15 for each worker in production."""

PATIENCE = 20
"""Seconds for a statement of the drill's own."""

STARTS = 3
SWEEP_EVERY = 1.0
"""Seconds; 60 in production."""

QUICK: dict[str, Any] = {
    "lease": 4,
    "renew_interval": 0.5,
    "renew_patience": 10,
    "statement_timeout": 2.5,
    "socket_timeout": 1,
    "ping_timeout": 0.5,
    "connect_timeout": 3,
    "pool_timeout": 5,
    "pool_recycle": 15,
    "database_patience": 6,
    "queue_patience": 3,
    "sweep_after": 2,
    "sweep_after_release": 6,
    "sweep_after_enqueue": 15,
    "dispatch_deadline": 90,
    "deadline_margin": 8,
    "log_format": "json",
    "revision": "chaos",
}
"""Every time of production's, scaled so that each keeps its place among the others: the lease by 30, the rest about as much,
down to what a busy machine can keep. A push must outlast the start of a cold worker, which imports Inspect: 8 s, or 30 s
on two cores that others use as well."""

_KEPT_WHOLE = ("fsync=off", "full_page_writes=off", "max_connections=200")
"""A server that is killed loses nothing so: the machine does not go down. `synchronous_commit` must stay on."""


class Database:
    """Postgres, with a stand-in for AlloyDB in front of it for each worker: so that one can be cut off alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = ""
        self.stand_ins: list[AlloyDB] = []

    def start(self) -> None:
        """At another port each time, to which the stand-ins lead."""
        self._running = open_postgres(self._folder / "postgres", options=_KEPT_WHOLE)
        server = self._running.__enter__()
        self.url = f"{server.rpartition('/')[0]}/proctor"
        self.server = server
        address = urlsplit(server)
        for stand_in in self.stand_ins:
            stand_in.proxy.upstream = (str(address.hostname), int(address.port or 0))

    def stop(self) -> None:
        self._running.__exit__(None, None, None)

    @property
    def pid(self) -> int:
        return int((self._folder / "postgres" / "data" / "postmaster.pid").read_text().split()[0])

    async def fetch(self, sql: str, *arguments: Any) -> Any:
        """Past the stand-ins. While the server is being restarted it raises OSErrors and asyncpg's, and never hangs."""
        async with asyncio.timeout(PATIENCE):
            connection = await asyncpg.connect(self.url)
            try:
                return await connection.fetch(sql, *arguments)
            finally:
                connection.terminate()


@dataclass
class Slot:
    """Where a worker runs, one after the other: each has a name of its own."""

    number: int
    worker: Worker | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    generations: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))


class System:
    """`store`: the artifacts' folder, by way of a link that can be turned; `folder` has everything that is worth a look
    afterwards."""

    def __init__(self, folder: Path, plant: str | None) -> None:
        self.folder = folder
        self.store = folder / "artifacts"
        self.database = Database(folder)
        self.front = Front()
        self.models = Models(script_of)
        self.emulator = CloudTasksEmulator()
        self.slots = [Slot(number) for number in range(WORKERS)]
        self.queue: Any = None
        self.client: httpx.AsyncClient
        self.died: list[str] = []
        """Workers that ended by themselves."""
        self._plant = plant

    @property
    def workers(self) -> list[Worker]:
        return [slot.worker for slot in self.slots if slot.worker is not None and slot.worker.lives]

    async def start(self, slot: Slot, clock: float = 0) -> None:
        """Returns when it serves; one that does not get there is followed by another."""
        for _ in range(STARTS):
            worker = slot.worker = await self._start(slot, clock)
            if await worker.serving():
                assert worker.address
                self.front.workers[worker.name] = worker.address
                return
            self.died.append(worker.name)
        raise RuntimeError(f"{worker.name} ended while it was starting, like those before; see its log")

    async def _start(self, slot: Slot, clock: float) -> Worker:
        name = f"worker-{slot.number}.{next(slot.generations)}"
        stand_in = self.database.stand_ins[slot.number]
        settings = {
            **QUICK,
            **stand_in.settings,
            "queue": QUEUE,
            "queue_endpoint": self.emulator.endpoint,
            "service_url": self.front.url,
            "artifacts": f"file://{self.store}",
            "scratch": self.folder / "scratch",
            "port": 0,
        }
        environment = {**stand_in.environment, **self.models.environment()}
        log = self.folder / f"{name}.log"
        return await workers.start(name, log, settings, environment, clock=clock, plant=self._plant)

    def living(self, slot: Slot) -> Worker:
        """The slot's worker; notes if it has ended by itself."""
        assert slot.worker
        if not slot.worker.lives:
            self.died.append(slot.worker.name)
        return slot.worker

    def point_store_at(self, name: str) -> None:
        """ "store", or "nothing", which is a file. At once: nobody finds the store missing."""
        link = self.folder / "artifacts.new"
        link.symlink_to(self.folder / name)
        link.replace(self.store)

    def leave(self, worker: Worker) -> None:
        """The front sends it nothing any more."""
        self.front.workers.pop(worker.name, None)


def script_of(conversation: str) -> Script:
    """The conversation's name says how long it is: `TAG-tTURNS-lLATENCY/ID`, the latency in tenths of a second."""
    found = re.search(r"-t(\d+)-l(\d+)/", conversation)
    assert found, conversation
    return Script(turns=int(found[1]), latency=int(found[2]) / 10)


@asynccontextmanager
async def open_system(folder: Path, plant: str | None = None) -> AsyncIterator[System]:
    """To be called in the main thread: Postgres ends with it."""
    system = System(folder, plant)
    (folder / "store").mkdir(parents=True)
    (folder / "nothing").touch()
    system.point_store_at("store")
    async with AsyncExitStack() as stack:
        system.database.start()
        stack.callback(system.database.stop)
        await _create_database(system.database)
        for number in range(WORKERS):
            (folder / f"stand-in-{number}").mkdir()
            stand_in = open_alloydb(system.database.url, folder / f"stand-in-{number}")
            system.database.stand_ins.append(await stack.enter_async_context(stand_in))
            system.database.stand_ins[-1].proxy.recording = False
        for part in (system.emulator, system.front, system.models):
            await stack.enter_async_context(part)
        system.queue = await stack.enter_async_context(_queue(system.emulator.endpoint))
        system.client = await stack.enter_async_context(httpx.AsyncClient(base_url=system.front.url, timeout=30))
        stack.push_async_callback(_kill_all, system)
        await asyncio.gather(*(system.start(slot) for slot in system.slots))
        await stack.enter_async_context(_sweeper(system))
        yield system


async def _create_database(database: Database) -> None:
    connection = await asyncpg.connect(database.server)
    await connection.execute("CREATE DATABASE proctor")
    await connection.close()
    await migrate_async(load(database_url=database.url))


@asynccontextmanager
async def _queue(endpoint: str) -> AsyncIterator[Any]:
    """A client of the queue, which is made first: as DESIGN asks for it, with shorter pauses."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
        retry = tasks_v2.RetryConfig(
            max_attempts=-1,
            max_retry_duration=Duration(),
            min_backoff=Duration(nanos=2 * 10**8),
            max_backoff=Duration(seconds=2),
            max_doublings=4,
        )
        limits = tasks_v2.RateLimits(max_concurrent_dispatches=AT_ONCE)
        queue = tasks_v2.Queue(name=QUEUE, rate_limits=limits, retry_config=retry)
        await client.create_queue(parent=QUEUE.partition("/queues/")[0], queue=queue)
        yield client


@asynccontextmanager
async def _sweeper(system: System) -> AsyncIterator[None]:
    """As Cloud Scheduler."""

    async def sweep() -> None:
        while True:
            began = time.monotonic()
            with suppress(httpx.HTTPError):
                await system.client.post("/tasks/sweep")
            await asyncio.sleep(max(0, SWEEP_EVERY - (time.monotonic() - began)))

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _kill_all(system: System) -> None:
    await asyncio.gather(*(worker.kill() for worker in system.workers))

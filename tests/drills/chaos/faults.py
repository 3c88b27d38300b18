"""What goes wrong, and when: drawn from a seed, so that the same seed means the same plan."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from google.api_core.exceptions import GoogleAPICallError
from google.cloud import tasks_v2

from tests.drills.chaos.history import Fault
from tests.drills.chaos.system import QUEUE, QUICK, Slot, System
from tests.drills.chaos.workers import pick
from tests.faults.connection import Cut

LEASE = float(QUICK["lease"])
GAP = 2.0
"""Seconds between two faults, on average."""
HOUR = 3600.0

OUTAGE = "database outage"
OUTAGE_SHARE = 0.15
"""Of the drill's time: 90 s of ten minutes. Always longer than the lease."""

WEIGHTS = {
    "worker killed": 3,
    "worker drained": 3,
    "clock wrong by an hour": 1,
    "forkserver killed": 2,
    "child killed": 10,
    "connections closed": 4,
    "connections reset": 4,
    "connections silent": 3,
    "connections dropped": 3,
    "worker cut off": 2,
    "database restarted": 2,
    "delivered twice": 12,
    "delivered early": 10,
    "deadline passed": 6,
    "queue purged": 2,
    "store failing": 2,
}
"""How often each comes, beyond the once that each comes if there is time. Killing a worker costs two cores some seconds."""

RESTARTS = ("worker killed", "worker drained", "clock wrong by an hour")
RESTARTS_APART = 12.0
"""Seconds between two of these, at least: or all that two cores did would be to start workers."""

LEFT_IN_PEACE = 0.8
"""Of the workers that were started, until they are warm."""

KINDS = (*WEIGHTS, OUTAGE)
_CUTS: dict[str, Cut] = {"closed": "fin", "reset": "rst", "silent": "silence", "dropped": "drop"}


@dataclass(frozen=True)
class Planned:
    """`at`: seconds from the start. `chance`: seeds what is drawn when it comes, such as whom it befalls."""

    at: float
    kind: str
    chance: float


def plan(seconds: float, seed: int) -> list[Planned]:
    """Each kind once, as far as the time goes, then by weight; the outage in the middle."""
    chance = random.Random(seed)
    once = chance.sample(list(WEIGHTS), len(WEIGHTS))
    planned = [Planned(seconds * chance.uniform(0.4, 0.6), OUTAGE, chance.random())]
    at, restarted = 0.0, -RESTARTS_APART
    while (at := at + chance.uniform(0.4, 1.6) * GAP) < seconds:
        possible = [kind for kind in WEIGHTS if kind not in RESTARTS or at - restarted >= RESTARTS_APART]
        (kind,) = chance.choices(possible, [WEIGHTS[kind] for kind in possible])
        kind = next((kind for kind in once if kind in possible), kind)
        if kind in once:
            once.remove(kind)
        if kind in RESTARTS:
            restarted = at
        planned.append(Planned(at, kind, chance.random()))
    return sorted(planned, key=lambda one: one.at)


class Faults:
    """`happened`: those that did; a fault that finds nobody to befall does not count."""

    def __init__(self, system: System, seconds: float) -> None:
        self.happened: list[Fault] = []
        self._system = system
        self._seconds = seconds
        self._under_way: set[asyncio.Task[None]] = set()
        self._database = asyncio.Lock()
        self._store = asyncio.Lock()
        self._pushes: set[asyncio.Task[None]] = set()

    async def bring(self, planned: list[Planned]) -> None:
        """Each at its time, whatever else is going wrong then; returns when all of it is put right."""
        began = time.monotonic()
        for one in planned:
            await asyncio.sleep(max(0.0, one.at - (time.monotonic() - began)))
            self._under_way.add(asyncio.create_task(self._bring(one)))
        await asyncio.gather(*self._under_way)

    async def settle(self) -> None:
        """Returns when every push of its own has been answered, or come to nothing."""
        await asyncio.gather(*self._pushes)

    async def _bring(self, one: Planned) -> None:
        deeds: dict[str, Callable[[random.Random], Awaitable[Any]]] = {
            "worker killed": self._kill_worker,
            "worker drained": self._drain_worker,
            "clock wrong by an hour": self._set_clock_wrong,
            "forkserver killed": self._kill_forkserver,
            "child killed": self._kill_child,
            "worker cut off": self._cut_off,
            "database restarted": self._restart_database,
            OUTAGE: self._outage,
            "delivered twice": self._deliver_twice,
            "delivered early": self._deliver_early,
            "deadline passed": self._pass_deadline,
            "queue purged": self._purge,
            "store failing": self._fail_store,
        }
        chance = random.Random(one.chance)
        _, _, how = one.kind.rpartition(" ")
        if how in _CUTS:
            self._cut(one.kind, chance, _CUTS[how])
        else:
            await deeds[one.kind](chance)

    def _note(self, kind: str, began: float, **what: Any) -> None:
        self.happened.append(Fault(kind, began, time.time(), **what))

    # Processes --------------------------------------------------------------------------------------------------------

    def _slot(self, chance: random.Random) -> Slot | None:
        """One whose worker is not about to change."""
        free = [slot for slot in self._system.slots if not slot.changing.locked()]
        return chance.choice(free) if free else None

    async def _kill_worker(self, chance: random.Random) -> None:
        if slot := self._slot(chance):
            async with slot.changing:
                worker, began = self._system.living(slot), time.time()
                self._note("worker killed", began, worker=worker.name)
                await worker.kill()
                self._system.leave(worker)
                await asyncio.sleep(chance.uniform(0, 1))
                await self._start(slot, chance)

    async def _drain_worker(self, chance: random.Random) -> None:
        if slot := self._slot(chance):
            await self._replace("worker drained", slot, chance)

    async def _set_clock_wrong(self, chance: random.Random) -> None:
        if slot := self._slot(chance):
            await self._replace("clock wrong by an hour", slot, chance, clock=chance.choice([-HOUR, HOUR]))

    async def _start(self, slot: Slot, chance: random.Random, clock: float = 0) -> None:
        """Mostly it is left in peace until it is warm. On a slow machine, to kill cold workers only would be to kill the
        same work again and again, until it is given up by rule."""
        await self._system.start(slot, clock)
        if slot.worker and chance.random() < LEFT_IN_PEACE:
            await slot.worker.warm()

    async def _replace(self, kind: str, slot: Slot, chance: random.Random, clock: float = 0) -> None:
        async with slot.changing:
            worker, began = self._system.living(slot), time.time()
            in_time = await worker.drain()
            self._system.leave(worker)
            self._note(kind, began, worker=worker.name, note="" if in_time else "it had to be killed")
            await self._start(slot, chance, clock)

    async def _kill_forkserver(self, chance: random.Random) -> None:
        slot = self._slot(chance)
        worker = slot.worker if slot else None
        forkserver = worker.forkserver() if worker else None
        if slot and worker and forkserver:
            async with slot.changing:
                began = time.time()
                with suppress(psutil.Error):
                    forkserver.kill()
                    self._note("forkserver killed", began, worker=worker.name)
                    await worker.warm()

    async def _kill_child(self, chance: random.Random) -> None:
        child = pick(chance, self._system.workers)
        if child:
            began = time.time()
            with suppress(psutil.Error):
                child.process.kill()
                self._note("child killed", began, held=((child.execution, child.attempt),))

    # The database -----------------------------------------------------------------------------------------------------

    def _cut(self, kind: str, chance: random.Random, how: Cut) -> None:
        """Of one worker, or of all."""
        began = time.time()
        chosen = self._system.database.stand_ins
        cut = sum(one.proxy.cut(how) for one in chance.sample(chosen, chance.randint(1, len(chosen))))
        if cut:
            self._note(kind, began, note=f"{cut} connections")

    async def _cut_off(self, chance: random.Random) -> None:
        """One worker alone, for longer than its leases: others take its work over while it goes on."""
        slot = chance.choice(self._system.slots)
        proxy = self._system.database.stand_ins[slot.number].proxy
        async with self._database:
            began = time.time()
            name = slot.worker.name if slot.worker else None
            proxy.unanswered = True
            proxy.cut("silence")
            await asyncio.sleep(LEASE * chance.uniform(1.2, 2.5))
            proxy.unanswered = False
            self._note("worker cut off", began, worker=name)

    async def _restart_database(self, chance: random.Random) -> None:
        async with self._database:
            began = time.time()
            how = chance.choice([signal.SIGKILL, signal.SIGQUIT, signal.SIGINT])
            os.kill(self._system.database.pid, how)
            self._system.database.stop()
            await asyncio.sleep(chance.uniform(0, 1))
            self._system.database.start()
            self._note("database restarted", began, note=how.name)

    async def _outage(self, chance: random.Random) -> None:
        silent = chance.random() < 0.5
        async with self._database:
            began = time.time()
            for one in self._system.database.stand_ins:
                one.proxy.refuse, one.proxy.unanswered = not silent, silent
                one.proxy.cut("silence" if silent else "rst")
            await asyncio.sleep(max(1.5 * LEASE, OUTAGE_SHARE * self._seconds))
            for one in self._system.database.stand_ins:
                one.proxy.refuse = one.proxy.unanswered = False
            self._note(OUTAGE, began, note="silent" if silent else "refusing")

    # The queue --------------------------------------------------------------------------------------------------------

    async def _deliver_twice(self, chance: random.Random) -> None:
        """What runs now, mostly; or what was pushed before."""
        running = [delivery.execution for delivery in self._system.front.under_way]
        earlier = [push.execution for push in self._system.front.pushes[-50:]]
        if running or earlier:
            execution = chance.choice(running if running and chance.random() < 0.8 else earlier or running)
            self._note("delivered twice", time.time(), note=execution)
            task = asyncio.create_task(self._push(execution))
            self._pushes.add(task)
            task.add_done_callback(self._pushes.discard)

    async def _push(self, execution: str) -> None:
        headers = {"X-CloudTasks-TaskName": "again", "X-CloudTasks-QueueName": QUEUE.rpartition("/")[2]}
        with suppress(httpx.HTTPError):
            await self._system.client.post("/tasks/execute", json={"execution_id": execution}, headers=headers)

    async def _deliver_early(self, chance: random.Random) -> None:
        """The queue itself delivers what it has delivered already, or is to deliver later."""
        request = tasks_v2.ListTasksRequest(parent=QUEUE, page_size=100)
        names = [task.name async for task in await self._system.queue.list_tasks(request)]
        if names:
            began = time.time()
            with suppress(GoogleAPICallError):  # it has just ended
                await self._system.queue.run_task(name=chance.choice(names))
                self._note("delivered early", began)

    async def _pass_deadline(self, chance: random.Random) -> None:
        """The queue gives up waiting, and delivers again; the handler goes on."""
        if self._system.front.under_way:
            delivery = chance.choice(self._system.front.under_way)
            self._note("deadline passed", time.time(), note=delivery.execution)
            self._system.front.cut(delivery)

    async def _purge(self, chance: random.Random) -> None:
        began = time.time()
        await self._system.queue.purge_queue(name=QUEUE)
        self._note("queue purged", began)

    async def _fail_store(self, chance: random.Random) -> None:
        """A file where the store was: root ignores what permissions would forbid. Listing what is below a file does not
        fail, though, but finds nothing, where a bucket would refuse."""
        async with self._store:
            began = time.time()
            self._system.point_store_at("nothing")
            await asyncio.sleep(chance.uniform(0.5, 4))
            self._system.point_store_at("store")
            self._note("store failing", began)

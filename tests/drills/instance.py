"""One worker of several, behind a proxy and a relay of its own: its messages are counted there by their names, and there it
is killed. The n-th message of a name is the same in every evaluation, in whatever order concurrent ones come."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from tests.faults.proxy import Proxy
from tests.faults.queue import Call, QueueRelay
from tests.system.worker import Worker, working

UPKEEP = "connection"
"""What the driver and the pool send of their own accord: pings, and what a new connection is told and asked."""

QUEUE = "queue."
"""What the names of calls of the queue begin with."""

_OUTLIVED = 10
"""Seconds; the kernel tells children at once."""

_WARM = 120
"""Seconds in which a forkserver is ready, on a busy machine too; it takes six of a processor."""

Moment = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is killed: at its `nth` message called `message` of an evaluation. before: it never reaches the
    server; after: it was carried out, and the worker never hears of it."""

    message: str
    nth: int
    moment: Moment


class Instance:
    """A worker with its own way to the database and to the queue."""

    def __init__(self, worker: Worker, proxy: Proxy, relay: QueueRelay, stack: AsyncExitStack) -> None:
        self.url = worker.url
        self.messages: Counter[str] = Counter()
        self.killed_at: float | None = None
        self._worker, self._proxy, self._relay, self._stack = worker, proxy, relay, stack
        self._place: Place | None = None
        self._on_kill: Callable[[], None] = lambda: None

    def watch(self, place: Place | None, on_kill: Callable[[], None]) -> None:
        """Counts from here on, and is killed at `place`."""
        self.messages.clear()
        self._place, self._on_kill = place, on_kill
        self._proxy.cut_points.clear()
        self._proxy.cut_at(self._is_place, place.moment if place else "before", "fin", then=self._kill)
        self._relay.calls.clear()
        self._relay.before, self._relay.after = self._call_came, self._call_was_made

    def _is_place(self, sql: str) -> bool:
        name = name_of(sql)
        self.messages[name] += 1
        return self._place is not None and (self._place.message, self._place.nth) == (name, self.messages[name])

    def _call_came(self, call: Call) -> None:
        self.messages[QUEUE + call.method] += 1
        if self._place == Place(QUEUE + call.method, call.number, "before"):
            self._relay.refuse = True
            self._kill()

    def _call_was_made(self, call: Call) -> None:
        if self._place == Place(QUEUE + call.method, call.number, "after"):
            self._kill()

    def _kill(self) -> None:
        """Returns when it is dead: until then nothing passes."""
        os.kill(self._worker.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # the event loop's own watcher has heard of it first
            os.waitid(os.P_PID, self._worker.pid, os.WEXITED | os.WNOWAIT)
        self.killed_at = time.monotonic()
        self._on_kill()

    async def close(self) -> None:
        """Raises `TimeoutError` if anything that it started outlives it."""
        if self.killed_at is not None:
            await self._worker.ended()
            async with asyncio.timeout(_OUTLIVED):
                while _left_by(self._worker.pid):
                    await asyncio.sleep(0.1)
        await self._stack.aclose()


def _left_by(pid: int) -> list[psutil.Process]:
    """The forkserver and the children, which share its command line: it ends with the pid of the worker."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []  # a zombie has none
        if "app.runner.forkserver" in words and words[-1] == str(pid):
            found.append(process)
    return found


class Door:
    """Cloud Run's: one address, and behind it the worker whose URL is in `to`."""

    def __init__(self) -> None:
        self.url = self.to = ""
        self._serving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Door"]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Who is cut off learns of it by the end of the connection."""
        there = urlsplit(self.to)
        try:
            there_reader, there_writer = await asyncio.open_connection(there.hostname, there.port)
            try:
                await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
            finally:
                there_writer.close()
        except OSError:
            pass
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


def name_of(sql: str) -> str:
    """Our statements bring their name, or are told by the table they read; the rest is not ours."""
    words = sql.split()
    if words[0] == "/*":
        return words[1]
    read = [table for table in ("evaluations", "task_executions", "sample_results") if f"FROM {table}" in sql]
    return f"read {read[0]}" if read else UPKEEP


async def start_instance(folder: Path, *, database_url: str, queue_endpoint: str, **variables: Any) -> Instance:
    """One that is warm, with its artifacts in `folder`."""
    server = urlsplit(database_url)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy((server.hostname or "", server.port or 5432)))
        relay = await stack.enter_async_context(QueueRelay(queue_endpoint))
        ways = {"database_url": proxy.through(database_url), "queue_endpoint": relay.endpoint}
        worker = await stack.enter_async_context(working(folder, **ways, **variables))
        await _warm(worker)
        return Instance(worker, proxy, relay, stack.pop_all())


async def _warm(worker: Worker) -> None:
    """Until its forkserver has imported everything, and waits."""
    forkserver, spent, before = worker.forkserver(), 0.0, -1.0
    async with asyncio.timeout(_WARM):
        while spent != before or forkserver.status() != psutil.STATUS_SLEEPING or forkserver.children():
            await asyncio.sleep(0.3)
            spent, before = sum(forkserver.cpu_times()[:2]), spent

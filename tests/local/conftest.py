"""The Cloud Tasks emulator, a real client and an HTTP target, on loopback."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

import anyio
import grpc.aio
import pytest
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport

from app.local.cloud_tasks import CloudTasksEmulator
from app.local.dispatcher import Signal
from app.local.oidc import Issuer

LOCATION = "projects/proctor/locations/europe-west4"
QUEUE = f"{LOCATION}/queues/evaluations"
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)


class Target:
    """An HTTP server that gives `answers` in order, then 200. While `gate` is closed requests are held.

    Like uvicorn it does not cancel a handler whose client went away: `under_way` counts until the handler ends.
    """

    def __init__(self) -> None:
        self.url = ""
        self.received: list[Received] = []
        self.answers: list[int | str] = []
        self.under_way = self.most_under_way = 0
        self.gate: anyio.Event | None = None
        self._changed = Signal()

    async def wait(self, count: int) -> None:
        """Until so many requests have come."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while len(self.received) < count:
                await self._changed.wait()

    async def quiet(self) -> None:
        """Until no handler is under way."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while self.under_way:
                await self._changed.wait()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received = await _read(reader)
        except (OSError, asyncio.IncompleteReadError):  # the push was given up before it was sent
            writer.close()
            return
        self.received.append(received)
        answer = self.answers.pop(0) if self.answers else 200
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self._changed.notify()
        if self.gate:
            await self.gate.wait()
        self.under_way -= 1
        self._changed.notify()
        head = answer if isinstance(answer, str) else f"{answer} Answer"
        with suppress(OSError):
            writer.write(f"HTTP/1.1 {head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
        writer.close()


async def _read(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")[:-2]
    method, path, _version = first.split(" ")
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Received(method, path, headers, await reader.readexactly(int(headers.get("Content-Length", 0))))


@dataclass
class Bench:
    emulator: CloudTasksEmulator
    client: Any  # a CloudTasksAsyncClient, whose annotations refuse the dicts it takes
    target: Target

    async def queue(self, name: str = QUEUE, **settings: Any) -> Any:
        return await self.client.create_queue(parent=LOCATION, queue={"name": name, **settings})

    async def task(self, name: str = "", queue: str = QUEUE, **settings: Any) -> str:
        """The full name of a new task whose target is `target`; `name` is its short one."""
        request = {"url": self.target.url, **settings.pop("http_request", {})}
        full = f"{queue}/tasks/{name}" if name else ""
        task = await self.client.create_task(parent=queue, task={"name": full, "http_request": request, **settings})
        return str(task.name)

    async def idle(self) -> None:
        with anyio.fail_after(PATIENCE_SECONDS):
            await self.emulator.wait_idle()

    async def records(self, count: int) -> None:
        with anyio.fail_after(PATIENCE_SECONDS):
            await self.emulator.wait_for_records(count)


OpenBench: TypeAlias = Callable[..., AbstractAsyncContextManager[Bench]]


def ms(milliseconds: float) -> timedelta:
    return timedelta(milliseconds=milliseconds)


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer()


@asynccontextmanager
async def http_target() -> AsyncIterator[Target]:
    target = Target()
    server = await asyncio.start_server(target.handle, "127.0.0.1", 0)
    target.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/tasks/execute"
    async with server:
        yield target
        if target.gate:
            target.gate.set()
        await target.quiet()


@pytest.fixture
def open_bench(issuer: Issuer) -> OpenBench:
    """A bench whose emulator has settings of its own."""

    @asynccontextmanager
    async def bench(**settings: Any) -> AsyncIterator[Bench]:
        async with (
            http_target() as target,
            CloudTasksEmulator(issuer=issuer, **settings) as emulator,
            grpc.aio.insecure_channel(emulator.endpoint) as channel,
        ):
            client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
            yield Bench(emulator, client, target)

    return bench


@pytest.fixture
async def bench(open_bench: OpenBench) -> AsyncIterator[Bench]:
    async with open_bench() as bench:
        yield bench

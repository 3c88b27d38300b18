"""The whole system in one process and its children: Postgres, the Cloud Tasks emulator, the service and its sweeper.

Everything ends with the process, however that ends: the children are told by the kernel.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import IPPROTO_TCP, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any

import grpc
import httpx
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from rich.markup import escape

from app.database.engine import open_engine
from app.database.migrate import migrate_async
from app.database.session import Database
from app.errors import ProctorError
from app.exporters import Telemetry
from app.ledger import Ledger
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.data import hold, tell
from app.local.postgres import open_postgres
from app.main import create_app
from app.serve import InnerServer, config
from app.settings import Settings, load
from app.telemetry import configure_logging

SWEEP_EVERY = 60
"""Seconds between two sweeps; Cloud Scheduler's shortest interval."""

CONCURRENT_DISPATCHES = 15
"""Pushes at once, as containerConcurrency in service.yaml."""


@dataclass(frozen=True)
class Stack:
    settings: Settings
    emulator: CloudTasksEmulator
    server: InnerServer

    @property
    def url(self) -> str:
        return self.settings.service_url


class PortTaken(ProctorError):
    title = "Port taken"


@asynccontextmanager
async def open_stack(
    data: Path,
    *,
    port: int = 0,
    database_url: str | None = None,
    sweep_every: float = SWEEP_EVERY,
    min_backoff: float = 5,
    telemetry: Telemetry | None = None,
    **given: Any,
) -> AsyncIterator[Stack]:
    """The system on the data in `data`, listening on loopback at `port` (0: a free one). `database_url`: use this
    Postgres instead of one of its own, for which `data` is this system's alone. `min_backoff`: seconds before the queue's
    first retry. `telemetry`: see `create_app`. `given`: further settings. With `auth="oidc"` the emulator issues the
    tokens; its queue and the sweeper need a `queue_service_account` then. To be called in the main thread."""
    async with AsyncExitStack() as stack:
        lock = None if database_url else stack.enter_context(hold(data))
        listener = stack.enter_context(_listener(port))
        if lock:
            tell(lock, f"http://127.0.0.1:{listener.getsockname()[1]}")
        url = database_url or stack.enter_context(open_postgres(data / "postgres"))
        emulator = await stack.enter_async_context(CloudTasksEmulator())
        settings = load(
            **{
                "database_url": url,
                "queue_endpoint": emulator.endpoint,
                "service_url": f"http://127.0.0.1:{listener.getsockname()[1]}",
                "artifacts": f"file://{data}/artifacts",
                "allowed_sandboxes": ("proctor", "local"),  # who may use this system already owns the machine
                "oidc_certs_url": emulator.certs_url,
                **given,
            }
        )
        configure_logging(settings)
        await migrate_async(settings)
        await create_queues(settings, min_backoff)
        await _forget_the_lost_queue(settings)
        server = await stack.enter_async_context(_serve(settings, listener, telemetry))
        await stack.enter_async_context(_sweep(settings, emulator, sweep_every))
        yield Stack(settings, emulator, server)


def run_local(port: int, data: Path) -> None:
    """Until Ctrl-C or SIGTERM."""
    asyncio.run(_run_local(port, data))


async def _run_local(port: int, data: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    console = Console(stderr=True)
    async with open_stack(data, port=port) as stack:
        console.print(
            f"Proctor is at [bold]{stack.url}[/] (API: {stack.url}/docs). Its data is in {escape(str(data))}."
            " Ctrl-C stops it."
        )
        console.print(f"In another terminal: [bold]PROCTOR_URL={stack.url} proctor submit proctor/programming[/] …")
        await stop.wait()
        console.print("Stopping.")


async def create_queues(settings: Settings, min_backoff: float) -> None:
    """All that push here. By their retry settings they keep delivering: the ledger decides when to give up."""
    assert settings.queue_endpoint is not None
    async with grpc.aio.insecure_channel(settings.queue_endpoint) as channel:
        client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
        for name in settings.queues:
            queue = tasks_v2.Queue(
                name=settings.queue_called(name),
                rate_limits=tasks_v2.RateLimits(max_concurrent_dispatches=CONCURRENT_DISPATCHES),
                retry_config=tasks_v2.RetryConfig(
                    max_attempts=-1,
                    max_retry_duration=Duration(),
                    min_backoff=Duration(nanos=round(min_backoff % 1 * 1e9), seconds=int(min_backoff)),
                    max_backoff=Duration(seconds=60),
                    max_doublings=4,
                ),
            )
            await client.create_queue(parent=settings.queue.partition("/queues/")[0], queue=queue)


async def _forget_the_lost_queue(settings: Settings) -> None:
    """The emulator's tasks ended with the process that held them: what the ledger holds open is due again."""
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        await Ledger(database, lease=settings.lease, worker=settings.worker).all_due()


@asynccontextmanager
async def _serve(settings: Settings, listener: socket, telemetry: Telemetry | None) -> AsyncIterator[InnerServer]:
    app = create_app(settings, telemetry)
    server = InnerServer(config(app, settings), app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if serving.done():
        serving.result()
        raise ProctorError("The service ended while it was starting; see its log above.")
    try:
        yield server
    finally:
        await server.drain()
        server.should_exit = True
        await asyncio.shield(asyncio.wait({serving}))


@asynccontextmanager
async def _sweep(settings: Settings, emulator: CloudTasksEmulator, every: float) -> AsyncIterator[None]:
    """What Cloud Scheduler does in production, in the name of the queue's service account if there is one."""
    account = settings.queue_service_account

    def authorization() -> dict[str, str]:
        token = emulator.id_token(account, settings.accepted_audiences[-1]) if account else None
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def sweeping() -> None:
        async with httpx.AsyncClient(base_url=settings.service_url, timeout=60) as client:
            while True:
                with suppress(httpx.HTTPError):
                    await client.post("/tasks/sweep", headers=authorization())
                await asyncio.sleep(every)

    task = asyncio.create_task(sweeping())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _listener(port: int) -> socket:
    listener = socket(proto=IPPROTO_TCP)  # named, or asyncio leaves Nagle's algorithm on: 40 ms for each answer
    listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise PortTaken(
            f"Port {port} of 127.0.0.1 is taken: end what listens there, or give another --port."
        ) from error
    return listener

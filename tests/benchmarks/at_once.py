"""15 executions at once on one worker, against 15 plain `inspect eval` processes.

Each sample marks that it has begun and waits for a sign, so that all run at the same time when memory is read. Memory
is PSS: each shared page counted in parts. The peer starts a fresh interpreter for each sample, as a service without a
warm forkserver would.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from app.database.migrate import migrate_async
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.postgres import open_postgres
from app.local.stack import create_queues
from app.settings import load
from tests.processes import is_forkserver
from tests.report import Goal, Report, Value
from tests.system.conftest import ended, submit

TASK = f"{Path(__file__).with_name('gathering.py')}@gathering"
PATIENCE = 300
MIB = 2**20


async def measure(quick: bool) -> Report:
    n = 3 if quick else 15
    with TemporaryDirectory(prefix="at-once-") as folder:
        ours = await _proctor(n, Path(folder, "ours"))
        peer = await _plain(n, Path(folder, "peer"))
    seconds = peer["seconds"] / ours["seconds"]
    memory = peer["pss"] / ours["pss"]
    return Report(
        name="at_once",
        rows=[_row("Proctor", n, ours, ours), _row("inspect eval", n, peer, ours)],
        goals=[
            Goal("ratio of seconds until all had begun, plain / Proctor", "above 1", seconds, seconds > 1),
            Goal("ratio of memory, plain / Proctor", "above 1", memory, memory > 1),
        ],
    )


def _row(what: str, n: int, figures: dict[str, float], ours: dict[str, float]) -> dict[str, Value]:
    """Seconds until all samples had begun, on a warm worker; PSS of everything, and of it the service, the forkserver and
    each sample's process; that process's USS. × is the multiple of Proctor's."""
    return {
        "what": what,
        "samples": n,
        "seconds": figures["seconds"],
        "× seconds": figures["seconds"] / ours["seconds"],
        "memory, MiB": figures["pss"],
        "× memory": figures["pss"] / ours["pss"],
        "service, MiB": figures.get("service"),
        "forkserver, MiB": figures.get("forkserver"),
        "each sample, MiB": figures["child"],
        "its own, MiB": figures["uss"],
    }


async def _proctor(n: int, folder: Path) -> dict[str, float]:
    marks = folder / "marks"
    marks.mkdir(parents=True)
    async with _service(folder) as (service, client):
        (folder / "warm").mkdir()
        (folder / "warm" / "go").touch()
        warm = await submit(client, _spec(1, folder / "warm"))
        await ended(client, warm)
        began = time.monotonic()
        evaluation = await submit(client, _spec(n, marks))
        await _all_begun(marks, n)
        seconds = time.monotonic() - began
        figures = _memory(service.pid) | {"seconds": seconds}
        (marks / "go").touch()
        view = await ended(client, evaluation)
        assert view["state"] == "succeeded", view["error"]
    return figures


def _spec(n: int, marks: Path) -> dict[str, object]:
    return {"task": TASK, "model": "mockllm/model", "task_args": {"n": n, "marks": str(marks)}}


@asynccontextmanager
async def _service(folder: Path) -> "AsyncIterator[tuple[subprocess.Popen[bytes], httpx.AsyncClient]]":
    """The service as a process of its own, as it is deployed; Postgres and the queue beside it."""
    with open_postgres(folder / "postgres") as url:
        async with CloudTasksEmulator() as emulator:
            settings = load(
                database_url=url,
                queue_endpoint=emulator.endpoint,
                port=_free_port(),
                artifacts=f"file://{folder}/artifacts",
                scratch=folder / "scratch",
            )
            address = f"http://127.0.0.1:{settings.port}"
            await migrate_async(settings)
            await create_queues(settings, min_backoff=1)
            environment = os.environ | {
                "PROCTOR_DATABASE_URL": url,
                "PROCTOR_QUEUE_ENDPOINT": emulator.endpoint,
                "PROCTOR_SERVICE_URL": address,
                "PROCTOR_PORT": str(settings.port),
                "PROCTOR_ARTIFACTS": settings.artifacts,
                "PROCTOR_SCRATCH": str(settings.scratch),
                "PROCTOR_LOG_LEVEL": "error",
            }
            service = subprocess.Popen([sys.executable, "-m", "app.cli", "serve"], env=environment, stdout=sys.stderr)
            try:
                async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                    await _ready(client)
                    yield service, client
            finally:
                service.terminate()
                service.wait(20)


async def _ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if (await client.get("/health/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


async def _plain(n: int, marks: Path) -> dict[str, float]:
    marks.mkdir()
    began = time.monotonic()
    command = [sys.executable, "-m", "inspect_ai", "eval", TASK, "--model", "mockllm/model", "--display", "none"]
    processes = [
        subprocess.Popen(
            [*command, "-T", "n=1", "-T", f"marks={marks}", "-T", f"first={i}", "--log-dir", str(marks / f"logs{i}")],
            stdout=subprocess.DEVNULL,
        )
        for i in range(1, n + 1)
    ]
    try:
        await _all_begun(marks, n)
        seconds = time.monotonic() - began
        family = [p for process in processes for p in _family(process.pid)]
        pss = sum(_pss(p) for p in family)
        uss = sum(_uss(p) for p in family)
        (marks / "go").touch()
        for process in processes:
            assert process.wait(PATIENCE) == 0
    finally:
        for process in processes:
            process.kill()
    return {"seconds": seconds, "pss": pss, "child": pss / n, "uss": uss / n}


async def _all_begun(marks: Path, n: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while len(list(marks.glob("*.begun"))) < n:
            await asyncio.sleep(0.02)


def _memory(service: int) -> dict[str, float]:
    family = _family(service)
    forkserver = next(p for p in family if is_forkserver(p) and p.ppid() == service)
    children = forkserver.children(recursive=True)
    return {
        "pss": sum(_pss(p) for p in family),
        "service": _pss(psutil.Process(service)),
        "forkserver": _pss(forkserver),
        "child": _mean(_pss(p) for p in children),
        "uss": _mean(_uss(p) for p in children),
    }


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _pss(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / MIB


def _uss(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss) / MIB


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

"""A worker as a process of its own: `proctor serve`, real from its signals to its exit code."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import httpx
import psutil

from tests.processes import is_forkserver

START = 60
"""Seconds in which a worker serves, on a busy machine too."""


class Worker:
    """`artifacts`: the folder it ships to; `log`: what it has logged so far, line by line."""

    def __init__(self, process: asyncio.subprocess.Process, artifacts: str, scratch: Path) -> None:
        self.process = process
        self.scratch = scratch
        self.artifacts = artifacts
        self.log: list[dict[str, Any]] = []
        self.url = ""
        self._serving = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self.process.pid

    def below(self) -> list[psutil.Process]:
        """All processes it has started, and they."""
        return psutil.Process(self.pid).children(recursive=True)

    def forkserver(self) -> psutil.Process:
        (found,) = filter(is_forkserver, psutil.Process(self.pid).children())
        return found

    def logged(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line.get("message") == message]

    async def ended(self) -> int:
        """Its exit code."""
        code = await self.process.wait()
        await self._reading
        return code

    async def kill(self) -> None:
        """kill -9; returns when it and all that it started is gone."""
        below = self.below()
        self.process.kill()
        await self.ended()
        await asyncio.to_thread(psutil.wait_procs, below, START)

    async def serving(self) -> None:
        async with asyncio.timeout(START):
            await self._serving.wait()
        assert self.url, self.log

    async def _read(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            try:
                told = json.loads(line)
            except ValueError:
                told = {"message": line.decode().rstrip()}
            self.log.append(told)
            if "Uvicorn running on" in told.get("message", ""):
                self.url = told["message"].split()[3]
                self._serving.set()
        self._serving.set()


@asynccontextmanager
async def working(folder: Path, **variables: object) -> AsyncIterator[Worker]:
    """One worker that serves, with its artifacts in `folder` and a queue that nobody listens to, unless told otherwise."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PROCTOR_", "GOOGLE_"))}
    scratch = Path(mkdtemp(prefix="proctor-test-"))
    given = {
        "queue_endpoint": "127.0.0.1:9",
        "queue_patience": 0.1,
        "artifacts": f"file://{folder}/artifacts",
        "scratch": scratch,
        "port": 0,
        "log_format": "json",
        **variables,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "serve"),
        env=kept | {f"PROCTOR_{name.upper()}": str(value) for name, value in given.items()},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    worker = Worker(process, str(given["artifacts"]).removeprefix("file://"), scratch)
    try:
        await worker.serving()
        yield worker
    finally:
        if process.returncode is None:
            with suppress(psutil.NoSuchProcess):
                await worker.kill()
        await worker.ended()
        rmtree(scratch, ignore_errors=True)


async def push(worker: Worker, execution: str) -> httpx.Response:
    """As Cloud Tasks does, and as patiently."""
    async with httpx.AsyncClient(base_url=worker.url, timeout=120) as client:
        headers = {"X-CloudTasks-TaskName": "by-hand", "X-CloudTasks-QueueName": "proctor"}
        return await client.post("/tasks/execute", json={"execution_id": execution}, headers=headers)


def terminate(worker: Worker) -> None:
    worker.process.send_signal(signal.SIGTERM)

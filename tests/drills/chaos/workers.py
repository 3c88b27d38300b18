"""Workers as processes of their own: `proctor serve`, some of them with a wrong clock or a planted bug."""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from app.settings import PREFIX
from tests.processes import is_forkserver

START = 120
"""Seconds in which a worker serves, on a busy machine too."""

IDLE = 1.0
"""Seconds without a tick of the processor's: even on a busy machine, whoever has work gets some."""

DRAINED = 15
"""Seconds after SIGTERM; Cloud Run gives 10, this machine may be busy."""

ROOT = Path(__file__).parents[3]
WRONG_CLOCK = Path(__file__).with_name("wrong_clock")


@dataclass(frozen=True)
class Child:
    """A child process at work for one attempt."""

    process: psutil.Process
    execution: str
    attempt: int


class Worker:
    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.address: tuple[str, int] | None = None
        self._process = process
        self._log = log
        self._serving = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @property
    def lives(self) -> bool:
        return self._process.returncode is None

    def forkserver(self) -> psutil.Process | None:
        with suppress(psutil.Error):
            return next(filter(is_forkserver, psutil.Process(self._process.pid).children()), None)
        return None

    def children(self) -> list[Child]:
        forkserver = self.forkserver()
        with suppress(psutil.Error):
            return [child for one in (forkserver.children() if forkserver else ()) if (child := _at_work(one))]
        return []

    async def kill(self) -> None:
        """kill -9; returns when it and all that it started is gone."""
        below: list[psutil.Process] = []
        with suppress(psutil.Error):
            below = psutil.Process(self._process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._ended()
        await asyncio.to_thread(psutil.wait_procs, below, DRAINED)

    async def drain(self) -> bool:
        """SIGTERM; returns whether it ended by itself."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAINED):
                await self._ended()
                return True
        await self.kill()
        return False

    async def serving(self) -> bool:
        """Returns when it serves, or False when it has ended before."""
        async with asyncio.timeout(START):
            await self._serving.wait()
        return self.address is not None

    async def warm(self) -> None:
        """Returns when its forkserver has nothing to import any more, so that children start fast; or after `START` s."""
        with suppress(TimeoutError, psutil.Error):
            async with asyncio.timeout(START):
                used = -1.0
                while (forkserver := self.forkserver()) is None or (now := sum(forkserver.cpu_times()[:2])) > used:
                    used = now if forkserver else used
                    await asyncio.sleep(IDLE)

    async def _ended(self) -> None:
        await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        """Its log goes to a file; the line that tells its address is looked for."""
        assert self._process.stderr
        with self._log.open("ab") as log:
            async for line in self._process.stderr:
                log.write(line)
                log.flush()
                if self.address is None and b"Uvicorn running on" in line:
                    host, _, port = str(json.loads(line)["message"]).split()[3].removeprefix("http://").partition(":")
                    self.address = (host, int(port))
                    self._serving.set()
        self._serving.set()


async def start(
    name: str,
    log: Path,
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    clock: float = 0,
    plant: str | None = None,
) -> Worker:
    """`clock`: seconds by which its clock is wrong, and that of its forkserver and children (see `wrong_clock`); the
    kernel's own, as monotonic time, is right. `plant`: a bug to run with."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith((PREFIX, "GOOGLE_"))}
    given = {f"{PREFIX}{key.upper()}": str(value) for key, value in {**settings, "worker": name}.items()}
    clock_variables = {"PYTHONPATH": str(WRONG_CLOCK), "CLOCK_WRONG_BY": str(clock)} if clock else {}
    module = ["app.cli"] if plant is None else ["tests.drills.chaos.plants", plant]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *module, "serve"),
        cwd=ROOT,
        env=kept | dict(environment) | given | clock_variables,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        limit=2**22,
    )
    return Worker(name, process, log)


def _at_work(process: psutil.Process) -> Child | None:
    """Which attempt a child is for is told by the file that it prints to: …/execution/attempt/output.txt."""
    with suppress(OSError, ValueError):
        output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
        return Child(process, output.parts[-3], int(output.parts[-2]))
    return None


def pick(chance: random.Random, workers: list[Worker]) -> Child | None:
    """One of all the children at work."""
    children = [child for worker in workers for child in worker.children()]
    return chance.choice(children) if children else None

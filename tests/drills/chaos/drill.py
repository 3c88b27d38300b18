"""The story of the drill: load and faults for some time, then no faults until everything has ended, then the check."""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import asyncpg

from tests.drills.chaos import figures, gather
from tests.drills.chaos.checker import check
from tests.drills.chaos.faults import Faults, plan
from tests.drills.chaos.history import History
from tests.drills.chaos.load import Client
from tests.drills.chaos.logs import open_logs
from tests.drills.chaos.system import System, open_system
from tests.drills.chaos.violation import Violation
from tests.report import Report

MOST_OPEN = 10
"""Evaluations under way, at most: the client waits, so that the backlog stays short on a machine of any size."""

PAUSE = 0.3
"""Seconds between two submissions, at least."""

LOOK_EVERY = 0.5
STALLED = 60.0
"""Seconds in which, without faults, nothing at all happens: no attempt begins or ends, no model is called. What has not ended
then is lost; with the sweeper's times, nothing should take 30. More than any of the load's samples sleeps."""

QUIET = 60.0
"""Seconds after which a push that has not been answered, when all is over, is not waited for any longer."""

KEPT = Path(".proctor")
SHOWN = 20


async def chaos(seconds: float, seed: int, *, plant: str | None = None) -> Report:
    """`plant`: a bug to run with (see `plants`), to see that it is found."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        history = await run(seconds, seed, folder, plant=plant)
        violations = check(history)
        report = figures.report(history, violations)
        if not report.met:
            _keep(history, violations, folder)
        return report


def _keep(history: History, violations: Sequence[Violation], folder: Path) -> None:
    """What it takes to find out why, without running it again."""
    seed = history.notes["seed"]
    kept = KEPT / f"chaos-{seed}-{time.strftime('%H%M%S')}"
    history.save(kept / "history.json")
    for log in folder.glob("*.log"):
        shutil.copy(log, kept)
    print(
        f"chaos: seed {seed}, {len(violations)} violations; the history and the workers' logs are in {kept}:",
        file=sys.stderr,
    )
    for violation in violations[:SHOWN]:
        print(f"  {violation}", file=sys.stderr)


async def run(seconds: float, seed: int, folder: Path, *, plant: str | None = None) -> History:
    async with open_system(folder, plant) as system, open_logs() as logs:
        (folder / "flags").mkdir()
        client = Client(system.client, folder / "flags", seed)
        await client.warm_up(len(system.slots), lambda: _ended(system))
        began = time.time()
        watching = asyncio.create_task(_watch(system, client))
        faults = Faults(system, seconds)
        bringing = asyncio.create_task(faults.bring(plan(seconds, seed)))
        await client.submit_until(bringing.done, MOST_OPEN, PAUSE, seconds)
        await bringing
        faults_ended = time.time()
        await client.finish()
        await _ended(system)
        await _quiet(system, faults)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching  # had it failed, nobody would have told the client to go on
        for slot in system.slots:
            system.living(slot)
        rows = await gather.rows(system.database.url)
        files = gather.files(system.store)
        return History(
            root=f"file://{system.store}",
            began=began,
            faults_ended=faults_ended,
            ended=time.time(),
            submissions=client.submissions,
            pushes=system.front.pushes,
            calls=gather.calls(system.models.requests),
            faults=faults.happened,
            files=files,
            logged=await gather.logged(logs, system.store, rows),
            died=system.died,
            notes={"seed": seed, "seconds": seconds, "plant": plant},
            **rows,
        )


async def _watch(system: System, client: Client) -> None:
    """Keeps count of what is open."""
    while True:
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            client.open = await _running(system)
        await asyncio.sleep(LOOK_EVERY)


async def _quiet(system: System, faults: Faults) -> None:
    """Returns when every push has been answered, too: what the queue holds is done with."""
    with suppress(TimeoutError):
        async with asyncio.timeout(QUIET):
            await faults.settle()
            await system.emulator.wait_idle()


async def _ended(system: System) -> None:
    """Returns when every evaluation has ended, or nothing happens any more."""
    seen, since = await _happened(system), time.monotonic()
    while await _running(system) and time.monotonic() - since < STALLED:
        await asyncio.sleep(LOOK_EVERY)
        if (now := await _happened(system)) != seen:
            seen, since = now, time.monotonic()


async def _happened(system: System) -> tuple[int, ...]:
    """Changes whenever an attempt begins or ends, or a model is called."""
    ((begun, ended),) = await system.database.fetch("SELECT count(*), count(ended_at) FROM execution_attempts")
    return int(begun), int(ended), len(system.models.requests)


async def _running(system: System) -> int:
    ((running,),) = await system.database.fetch("SELECT count(*) FROM evaluations WHERE state = 'running'")
    return int(running)

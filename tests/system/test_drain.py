"""SIGTERM, on the real process: everything is given back, nothing that is known is lost, and in time."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import anyio
import httpx
import psutil
from sqlalchemy import text

from app.database.session import Database
from app.ledger import Ledger
from tests.system.conftest import planned
from tests.system.worker import Worker, push, terminate, working

FULL = 15
"""As many as one instance takes."""

DRILLS, STOOD_STILL = 3, 0.5
"""The time there is, is Cloud Run's: where nothing ran on this machine for so many seconds of it, that shows nothing, and the
drill is made again, so often at most."""

STEPS = text("""/* test.steps */
SELECT count(*) AS n FROM task_executions
WHERE evaluation_id = :evaluation AND state = 'running' AND progress ->> 'samples_done' = '0'
""")
HISTORY = text("""/* test.history */
SELECT e.state, e.crashes, e.failures, a.outcome, a.error ->> 'message' AS why
FROM task_executions e JOIN execution_attempts a ON a.execution_id = e.id
WHERE e.evaluation_id = :evaluation AND e.kind = 'run' ORDER BY e.position
""")


async def all_run(database: Database, evaluation: UUID, count: int) -> None:
    """Returns when so many children have told of a sample under way."""
    with anyio.fail_after(120):
        while (await database.run(STEPS, {"evaluation": evaluation}))[0].n < count:
            await anyio.sleep(0.1)


async def test_a_full_worker_gives_everything_back_and_ends_in_time(
    database_url: str, database: Database, ledger: Ledger, tmp_path: Path
) -> None:
    for _ in range(DRILLS):
        evaluation = await planned(ledger, *[[1]] * FULL, how="hang")
        async with working(tmp_path, database_url=database_url, renew_interval=0.5) as worker:
            pushes = [asyncio.create_task(push(worker, f"{evaluation}.{n + 1}")) for n in range(FULL)]
            await all_run(database, evaluation, FULL)
            below = worker.below()
            async with lateness() as late:
                began = time.monotonic()
                terminate(worker)
                await refuses_what_comes(worker, f"{evaluation}.1")
                answers = await asyncio.gather(*pushes, return_exceptions=True)
                assert await worker.ended() == -15  # by the signal, as uvicorn has it
            seconds = time.monotonic() - began
            (drained,) = worker.logged("drained")
            print(f"SIGTERM to exit with {FULL} evaluations: {seconds:.2f} s; drained after {drained['seconds']} s")
            assert not psutil.wait_procs(below, timeout=10)[1]
        if not drained["unsettled"] or max(late) < STOOD_STILL:
            break
        print(f"the machine stood still for {max(late):.2f} s of them: once more")
    assert (drained["executions"], drained["unsettled"]) == (FULL, 0), "all settled themselves in the time there is"
    assert [a.status_code if isinstance(a, httpx.Response) else a for a in answers] == [409] * FULL
    history = await database.run(HISTORY, {"evaluation": evaluation})
    assert [tuple(row) for row in history] == [("pending", 0, 0, "interrupted", "The worker was told to stop.")] * FULL


@asynccontextmanager
async def lateness() -> AsyncIterator[list[float]]:
    """Seconds by which this process was woken too late, each time: so is every process of a machine that stands still."""
    late = [0.0]

    async def watch() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.05)
            late.append(time.monotonic() - began - 0.05)

    watching = asyncio.create_task(watch())
    try:
        yield late
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def refuses_what_comes(worker: Worker, execution: str) -> None:
    """Not ready from the moment of the signal, but there: nobody meets a closed door while pushes are answered."""
    async with httpx.AsyncClient(base_url=worker.url, timeout=10) as client:
        with anyio.fail_after(5):
            while (ready := await client.get("/health/ready")).status_code == 200:
                await anyio.sleep(0.01)
        assert (ready.status_code, ready.json()["title"]) == (503, "Draining")
        assert (await client.get("/health/live")).status_code == 200
        refused = await client.post("/tasks/execute", json={"execution_id": execution})
        assert refused.status_code == 409
        assert "about to end" in refused.json()["detail"]


async def test_an_idle_worker_ends_at_once(database_url: str, tmp_path: Path) -> None:
    async with working(tmp_path, database_url=database_url) as worker:
        async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
            assert (await client.get("/health/ready")).status_code == 200
        terminate(worker)
        assert await worker.ended() == -15
        assert worker.logged("drained")[0]["executions"] == 0
        assert not list(worker.scratch.iterdir())


async def test_what_was_given_back_is_done_by_the_next_worker(
    database_url: str, database: Database, ledger: Ledger, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await planned(ledger, [1, 2], how=f"until:{flag}", sample=2)
    async with working(tmp_path, database_url=database_url, renew_interval=0.5) as worker:
        first = asyncio.create_task(push(worker, f"{evaluation}.1"))
        with anyio.fail_after(60):
            while not await database.run(text("SELECT 1 FROM sample_results")):
                await anyio.sleep(0.05)
        terminate(worker)
        assert (await first).status_code == 409
    flag.touch()
    async with working(tmp_path, database_url=database_url) as worker:
        answer = await push(worker, f"{evaluation}.1")
    assert (answer.status_code, answer.json()["state"], answer.json()["attempt"]) == (200, "succeeded", 2)
    rows = await database.run(text("SELECT sample_id, attempt, note FROM sample_results ORDER BY sample_id"))
    assert [(r.sample_id, r.attempt) for r in rows] == [("1", 1), ("2", 2)], "what was finished stays"
    assert rows[0].note is None
    assert rows[1].note

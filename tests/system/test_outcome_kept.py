"""What an attempt came to is never lost to a dead database, nor to a kill: the next attempt records it and runs nothing."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import text

from app.database.session import Database
from app.ledger import Ledger
from app.spec import Spec
from tests.faults.proxy import Proxy
from tests.system.conftest import NUMBERS
from tests.system.worker import Worker, push, working

QUICK: dict[str, Any] = {
    "lease": 2,
    "renew_interval": 0.5,
    "statement_timeout": 1,
    "database_patience": 6,
    "connect_timeout": 2,
}
ADOPTED = "recording what an earlier attempt came to"
ATTEMPTS = text("""/* test.attempts */
SELECT e.kind, a.attempt, a.outcome FROM execution_attempts a JOIN task_executions e ON e.id = a.execution_id
ORDER BY e.position, a.attempt
""")


async def until_claimed(worker: Worker, execution: str) -> Any:
    """The answer of the first push that is not refused for another's lease, nor for a database that is slow to answer."""
    async with asyncio.timeout(60):
        while True:
            answer = await push(worker, execution)
            if answer.status_code != 503 and not (answer.status_code == 409 and "holds it" in answer.json()["detail"]):
                return answer
            await asyncio.sleep(0.2)


def proxied(database_url: str) -> Proxy:
    url = urlsplit(database_url)
    assert url.hostname
    assert url.port
    return Proxy((url.hostname, url.port))


async def test_a_result_that_could_not_be_recorded_is_recorded_by_the_next_attempt(
    database_url: str, database: Database, ledger: Ledger, tmp_path: Path
) -> None:
    """In each of the three kinds of work the database is dead past all patience just as the end is to be recorded."""
    marks = tmp_path / "marks"
    spec = Spec(task=NUMBERS, model="mockllm/model", task_args={"n": 1, "how": f"mark:{marks}"})
    evaluation = (await ledger.submit(spec, "me")).evaluation_id
    async with (
        proxied(database_url) as proxy,
        working(tmp_path, database_url=proxy.through(database_url), **QUICK) as worker,
    ):
        for name in ("plan", "1", "report"):
            dead = proxy.cut_at("ledger.settle", "before", "fin", times=10**6)
            assert (await push(worker, f"{evaluation}.{name}")).status_code == 503
            assert dead.happened > 1, "it has tried for a while"
            dead.remove()
            answer = await until_claimed(worker, f"{evaluation}.{name}")
            assert (answer.status_code, answer.json().get("state")) == (200, "succeeded"), (answer.text, worker.log)
        assert len(worker.logged(ADOPTED)) == 3
    assert marks.read_text() == "1\n", "the sample ran once"
    kinds = [tuple(row) for row in await database.run(ATTEMPTS)]
    assert kinds == [(k, n, o) for k in ("plan", "run", "report") for n, o in ((1, "interrupted"), (2, "succeeded"))]
    (row,) = await database.run(text("SELECT state, results FROM evaluations"))
    assert (row.state, row.results["completed_samples"]) == ("succeeded", 1)


async def test_a_worker_killed_as_it_settles_has_left_its_result(
    database_url: str, database: Database, ledger: Ledger, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    spec = Spec(
        task=NUMBERS, model="mockllm/model", task_args={"n": 2, "how": f"mark:{marks}"}, samples_per_execution=2
    )
    evaluation = (await ledger.submit(spec, "me")).evaluation_id
    async with (
        proxied(database_url) as proxy,
        working(tmp_path, database_url=proxy.through(database_url), **QUICK) as worker,
    ):
        assert (await push(worker, f"{evaluation}.plan")).status_code == 200
        settling = proxy.cut_at("ledger.settle", "before", "silence", times=10**6)
        pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
        await asyncio.wait_for(settling.wait(), 60)
        await worker.kill()
        await asyncio.wait({pushed})
        pushed.exception()
    async with working(tmp_path, database_url=database_url, **QUICK) as next_worker:
        answer = await until_claimed(next_worker, f"{evaluation}.1")
        assert (answer.status_code, answer.json()["state"], answer.json()["attempt"]) == (200, "succeeded", 2)
        assert len(next_worker.logged(ADOPTED)) == 1
    assert marks.read_text() == "1\n"
    rows = await database.run(text("SELECT sample_id, transcript FROM sample_results ORDER BY sample_id"))
    assert [row.sample_id for row in rows] == ["1", "2"]
    assert all(f"/{evaluation}.1/1/" in row.transcript for row in rows)
    assert all(Path(urlsplit(row.transcript).path).is_file() for row in rows)

"""Everything at once, at random, for some seconds: no deadlock, and then everything comes to its end."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from uuid import UUID

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database.session import Database
from app.ledger import Held, Ledger, Outcome
from app.settings import Settings
from tests.ledger.factories import SUCCEEDED, ended, errored, planned, push, scored, settle, watched

SECONDS = 4.0
LEASE = 0.05
RECENT, RUNS = 6, 4
TRIES = 2
OUTCOMES: tuple[Outcome | None, ...] = ("succeeded", "succeeded", "failed", "failed", "interrupted", None)
HAPPENS = (
    *("claimed", "taken over", "held", "over", "record", "stale record", "settle recorded", "settle stale"),
    *("renewed", "lost", "swept", "cancelled", "retried"),
)
OPEN = "state IN ('pending', 'running')"

RANDOMLY_DUE = text(f"""
UPDATE task_executions SET sweep_at = clock_timestamp() WHERE id IN (
  SELECT id FROM task_executions WHERE {OPEN} ORDER BY random() LIMIT 20 FOR NO KEY UPDATE SKIP LOCKED)
""")
STILL_OPEN = text(f"SELECT id FROM task_executions WHERE {OPEN}")
WITHOUT_HISTORY = text("""
SELECT e.id, e.attempt, count(a.attempt) FROM task_executions e
LEFT JOIN execution_attempts a ON a.execution_id = e.id GROUP BY e.id HAVING count(a.attempt) <> e.attempt
""")
NOT_AT_THE_END = text("""
SELECT v.id, v.state, v.remaining, count(e.id) FROM evaluations v
LEFT JOIN task_executions e ON e.evaluation_id = v.id AND e.kind = 'report'
GROUP BY v.id HAVING v.state = 'running' OR v.remaining <> 0 OR count(e.id) <> 1
""")


ROUNDS = 4
"""At most: in one, something may by chance not have happened, on a busy machine above all."""


class Crowd:
    """Workers, sweepers and users of one ledger; `did` counts what their turns came to."""

    def __init__(self, ledger: Ledger, database: Database, seed: int) -> None:
        self.ledger = ledger
        self.database = database
        self.evaluations: list[UUID] = []
        self.held: dict[str, int] = {}
        self.did: Counter[str] = Counter()
        self.random = random.Random(seed)
        self.end = 0.0

    async def run(self) -> None:
        fresh = [planned(self.ledger, RUNS) for _ in range(RECENT // 2)]
        failed: list[Outcome] = ["failed"] * RUNS
        over = [ended(self.ledger, *failed) for _ in range(RECENT // 2)]
        self.evaluations += await asyncio.gather(*fresh, *over)
        self.end = time.monotonic() + SECONDS
        async with asyncio.TaskGroup() as everyone:
            turns = ((24, self.work), (6, self.renew), (3, self.sweep), (1, self.cancel), (4, self.retry))
            for count, turn in ((1, self.submit), *turns):
                for _ in range(count):
                    everyone.create_task(self._again_and_again(turn))

    async def _again_and_again(self, turn: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self.end:
            await turn()

    async def submit(self) -> None:
        self.evaluations.append(await planned(self.ledger, RUNS))
        await self._wait(SECONDS / 10)

    async def work(self) -> None:
        """On what is recent: it is often held, or its lease has just ended."""
        evaluation = self.random.choice(self.evaluations[-RECENT:])
        execution = f"{evaluation}.{self.random.choice([*range(1, RUNS + 1), 'report', 'report'])}"
        claim = await self.ledger.claim(execution, UUID(int=self.random.getrandbits(128)))
        self.did[claim.verdict if claim else "no report yet"] += 1
        if not claim or not claim.granted:
            return
        self.held[execution] = claim.attempt
        await self._wait(1.6 * LEASE)
        samples = [self.random.choice([scored, errored])(execution)] if claim.kind == "run" else []
        recorded = await self.ledger.record(execution, claim.attempt, samples)
        self.did["record" if recorded else "stale record"] += 1
        outcome = self.random.choice(OUTCOMES)
        if outcome:
            settled = await settle(self.ledger, claim, outcome, max_failures=TRIES, samples=samples, end=SUCCEEDED)
            self.did[f"settle {settled.verdict}"] += 1
        else:
            self.held.pop(execution, None)  # its worker died: nobody renews it

    async def renew(self) -> None:
        """Of anything that was ever held, in any order, partly under an attempt that is not the newest."""
        some = self.random.sample(list(self.held.items())[-40:], min(15, len(self.held)))
        held = [Held(id, attempt - (self.random.random() < 0.2), {"tokens": 1}) for id, attempt in some]
        for renewal in await self.ledger.renew(held):
            self.did["lost" if renewal.lost else "renewed"] += 1

    async def sweep(self) -> None:
        await self.database.run(RANDOMLY_DUE)
        due = await self.ledger.take_due(50)
        self.random.shuffle(due)
        await self.ledger.enqueued(due)
        self.did["swept"] += len(due)

    async def cancel(self) -> None:
        await self._wait(SECONDS / 5)
        cancelled = await self.ledger.cancel(self.random.choice(self.evaluations[-RECENT:]))
        self.did["cancelled"] += cancelled.executions if cancelled else 0

    async def retry(self) -> None:
        await self._wait(SECONDS / 40)
        found = await self.ledger.retry(self.random.choice(self.evaluations[-2 * RECENT :]))
        self.did["retried"] += bool(found and found[1])

    async def _wait(self, most: float) -> None:
        await asyncio.sleep(self.random.random() * most)

    async def drain(self) -> None:
        """What a queue would do: push until everything is over."""
        async with asyncio.timeout(20):
            while left := await self.database.run(STILL_OPEN):
                await asyncio.gather(*(self._finish(row.id) for row in left))

    async def _finish(self, execution: str) -> None:
        claim = await push(self.ledger, execution)
        if claim.granted:
            await settle(self.ledger, claim, "cancelled" if claim.cancel else "succeeded", end=SUCCEEDED)


async def test_everything_at_once_never_deadlocks_and_comes_to_its_end(
    settings: Settings, engine: AsyncEngine, database: Database
) -> None:
    seed = random.randrange(2**32)
    crowd = Crowd(Ledger(database, lease=LEASE, worker=settings.worker), database, seed)
    with watched(engine) as errors:
        for _ in range(ROUNDS):
            await crowd.run()
            if all(crowd.did[what] for what in HAPPENS):
                break
        await crowd.drain()
    print(f"seed {seed}: {dict(crowd.did)}")

    assert errors == []
    assert await database.run(NOT_AT_THE_END) == []
    assert await database.run(WITHOUT_HISTORY) == []
    assert all(crowd.did[what] for what in HAPPENS), "it tries less than it should"
    await engine.dispose()  # a server process tells of its deadlocks when it ends, at the latest
    assert await deadlocks(settings) == 0


async def deadlocks(settings: Settings) -> int:
    """Since the database was made, which is for this test."""
    assert settings.database_url is not None
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    try:
        found = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        return int(await connection.fetchval(found))
    finally:
        await connection.close()

"""`python -m tests.drills stranded [--every N] [--seed N] [--json]`

Kills the worker (`kill -9`) before and after every message that it sends to the database and to the queue, from the
submission of an evaluation to its end: one evaluation for each kill. Another worker takes over, and a third starts, as on
Cloud Run. Every evaluation must end all the same, with one result for each sample. Ends with 1 if a goal was not met.

    client, queue ── door ──► worker ────┬── proxy ── Postgres
    scheduler ──────────────► the other ─┘── relay ── Cloud Tasks
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx

from app.database.migrate import migrate_async
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.postgres import open_postgres
from app.local.stack import create_queues
from app.settings import load
from tests.benchmarks.gauges import percentile
from tests.drills.instance import QUEUE, UPKEEP, Door, Instance, Moment, Place, start_instance
from tests.report import Goal, Report, Value, as_json, show
from tests.system.conftest import spec

QUICK: dict[str, Any] = {
    "lease": 2,
    "renew_interval": 1,
    "statement_timeout": 1.5,
    "sweep_after": 1,
    "sweep_after_release": 2,
    "queue_patience": 20,
}
"""Seconds. What a take-over waits for, scaled from minutes."""

SAMPLES = 2
"""Epochs of one sample, each an execution of its own: whoever ends last brings about the report."""

SWEEP_EVERY = 1.0
"""Seconds."""

PATIENCE = 60.0
"""Seconds from its submission: an evaluation that has not ended by then is stranded. Most take five."""

TRIES = 3
"""Evaluations in which a message is waited for that need not come in each."""

BY_TIME = frozenset({UPKEEP, "ledger.renew"})
"""How many of these there are depends on the moment."""


@dataclass(frozen=True, slots=True)
class End:
    """What became of one evaluation. `wrong`: nothing, or what should not be; `again`: how often a sample ran once more;
    `seconds`: from the kill to the end, None if there was no kill."""

    place: Place | None
    wrong: str
    again: int
    seconds: float | None

    def __str__(self) -> str:
        place = f"{self.place.moment} {self.place.message} {self.place.nth}" if self.place else "nowhere"
        ended = "not met" if self.seconds is None else f"{self.seconds:.1f} s, {self.again} ran again"
        return f"{place}: {self.wrong or ended}"


class Drill:
    """Two workers at a time: the first does all the work and is killed, the other sweeps, and takes over."""

    def __init__(
        self,
        folder: Path,
        direct: Any,
        emulator: CloudTasksEmulator,
        door: Door,
        start: Callable[[], Awaitable[Instance]],
    ) -> None:
        self.sweeping = True
        self.patience = PATIENCE
        self._folder, self._direct, self._emulator, self._door, self._start = folder, direct, emulator, door, start
        self._pair: list[asyncio.Future[Instance]] = []

    async def count(self, rehearsals: int = 2) -> Counter[str]:
        """The messages of an evaluation by name, in the order in which they first came. Nobody is killed. After two
        rehearsals both workers have worked before, as most have."""
        for _ in range(rehearsals + 1):
            end = await self._evaluate(None)
            assert not end.wrong, end
            counted = Counter((await self._pair[0]).messages)
            self._pair.reverse()
        return counted

    async def kill_at(self, place: Place) -> End:
        for _ in range(TRIES):
            end = await self._evaluate(place)
            if end.wrong or end.seconds is not None:
                break
        return end

    async def close(self) -> None:
        for start in self._pair:
            start.cancel()
        for started in await asyncio.gather(*self._pair, return_exceptions=True):
            if isinstance(started, Instance):
                await started.close()

    async def _evaluate(self, place: Place | None) -> End:
        while len(self._pair) < 2:
            self._pair.append(asyncio.ensure_future(self._start()))
        first, other = await asyncio.gather(*self._pair)
        self._door.to = first.url
        first.watch(place, lambda: self._replace(other))
        marks = self._folder / f"marks-{uuid4()}"
        marks.touch()
        evaluation: UUID | None = None
        try:
            async with asyncio.timeout(self.patience), self._sweeps(other.url):
                evaluation = await self._submit(marks)
                ended_at = await self._ended(evaluation)
                await self._emulator.wait_idle()
            wrong = await self._wrong(evaluation)
        except TimeoutError:
            wrong, ended_at = await self._stranded(evaluation), time.monotonic()
        seconds = None
        if first.killed_at is not None:
            seconds = max(ended_at - first.killed_at, 0)
            await first.close()
        return End(place, wrong, len(marks.read_text().splitlines()) - SAMPLES, seconds)

    def _replace(self, other: Instance) -> None:
        """Who comes now comes to the other one."""
        self._door.to = other.url
        self._pair = [self._pair[1], asyncio.ensure_future(self._start())]

    async def _submit(self, marks: Path) -> UUID:
        """As a client does: again with the same key, until there is an answer."""
        body = spec(task_args={"n": 1, "epochs": SAMPLES, "how": f"mark:{marks}"})
        while True:
            with suppress(httpx.TransportError):
                async with httpx.AsyncClient(base_url=self._door.url, timeout=self.patience, trust_env=False) as client:
                    answer = await client.post("/evaluations", json=body, headers={"Idempotency-Key": marks.name})
                if answer.status_code == 202:
                    return UUID(answer.json()["id"])
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def _sweeps(self, url: str) -> AsyncIterator[None]:
        """Cloud Scheduler's part."""

        async def sweep() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=self.patience, trust_env=False) as client:
                while self.sweeping:
                    with suppress(httpx.TransportError):
                        await client.post("/tasks/sweep")
                    await asyncio.sleep(SWEEP_EVERY)

        task = asyncio.create_task(sweep())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _ended(self, evaluation: UUID) -> float:
        """When. It is asked past the proxies: to watch costs no message."""
        while await self._direct.fetchval("SELECT state FROM evaluations WHERE id = $1", evaluation) == "running":
            await asyncio.sleep(0.02)
        return time.monotonic()

    async def _wrong(self, evaluation: UUID) -> str:
        found = dict(await self._direct.fetchrow(_FOUND, evaluation))
        expected = dict(zip(found, ("succeeded", SAMPLES, SAMPLES, SAMPLES + 2, SAMPLES + 2), strict=True))
        return "" if found == expected else f"{found}, not {expected}"

    async def _stranded(self, evaluation: UUID | None) -> str:
        if evaluation is None:
            return "nobody took it"
        rows = await self._direct.fetch(_OPEN, evaluation)
        return "stranded: " + "; ".join(f"{r['kind']} {r['state']} after {r['attempt']} attempts" for r in rows)


_FOUND = """
SELECT v.state, (v.results ->> 'completed_samples')::int AS reported,
       (SELECT count(*) FROM sample_results r WHERE r.evaluation_id = v.id AND r.error IS NULL) AS results,
       (SELECT count(*) FROM task_executions e WHERE e.evaluation_id = v.id AND e.state = 'succeeded') AS executions,
       (SELECT count(*) FROM execution_attempts a JOIN task_executions e ON e.id = a.execution_id
        WHERE e.evaluation_id = v.id AND a.outcome = 'succeeded') AS successes
FROM evaluations v WHERE v.id = $1
"""
_OPEN = "SELECT kind, state, attempt FROM task_executions WHERE evaluation_id = $1 AND finished_at IS NULL"


@asynccontextmanager
async def open_drill(folder: Path, database_url: str) -> AsyncIterator[Drill]:
    """On a migrated database of its own."""
    async with AsyncExitStack() as stack:
        direct = await asyncpg.connect(database_url)
        stack.push_async_callback(direct.close)
        emulator = await stack.enter_async_context(CloudTasksEmulator())
        door = await stack.enter_async_context(Door().open())
        await create_queues(load(database_url=database_url, queue_endpoint=emulator.endpoint), min_backoff=0.1)

        async def start() -> Instance:
            given = {
                "database_url": database_url,
                "queue_endpoint": emulator.endpoint,
                "service_url": door.url,
                **QUICK,
            }
            return await start_instance(folder, **given)

        drill = Drill(folder, direct, emulator, door, start)
        stack.push_async_callback(drill.close)
        yield drill


def places(counted: Mapping[str, int]) -> list[Place]:
    moments: tuple[Moment, ...] = ("before", "after")
    return [Place(message, nth, m) for message, n in counted.items() for nth in range(1, n + 1) for m in moments]


async def stranded(every: int = 1, seed: int = 0, tell: Callable[[object], None] = lambda _: None) -> Report:
    """`every`: only each so-many-th place, of all in an order drawn from `seed`. Stops at the first evaluation that is
    not as it should be: what is left of it would meet the next one."""
    ends: list[End] = []
    with tempfile.TemporaryDirectory(prefix="drill-") as name:
        folder = Path(name)
        with open_postgres(folder / "postgres", durable=False) as url:
            await migrate_async(load(database_url=url))
            async with open_drill(folder, url) as drill:
                counted = await drill.count()
                chosen = places(counted)
                random.Random(seed).shuffle(chosen)
                chosen = chosen[::every]
                tell(told(counted, len(chosen)))
                for place in chosen:
                    ends.append(await drill.kill_at(place))
                    tell(f"{len(ends)}. {ends[-1]}")
                    if ends[-1].wrong:
                        break
    return report(counted, ends, len(chosen), seed)


def told(counted: Mapping[str, int], kills: int) -> str:
    total, calls = sum(counted.values()), sum(n for name, n in counted.items() if name.startswith(QUEUE))
    return f"{total} messages, {total - calls} to the database and {calls} to the queue; {kills} kills"


def report(counted: Mapping[str, int], ends: Sequence[End], wanted: int, seed: int) -> Report:
    rows = [
        _row(message, n, [end for end in ends if end.place and end.place.message == message])
        for message, n in counted.items()
    ]
    rows.append(_row(f"all (seed {seed})", sum(counted.values()), ends))
    wrong = [end for end in ends if end.wrong]
    missed = [end for end in ends if end.seconds is None and end.place and end.place.message not in BY_TIME]
    first = str(wrong[0]) if wrong else "none"
    return Report(
        "stranded",
        rows,
        [
            Goal("evaluations that did not end as they should", "none", first, not wrong),
            Goal("kills tried", f"all {wanted}", len(ends), len(ends) == wanted),
            Goal("messages of ours that were not met again", "none", len(missed), not missed),
        ],
    )


def _row(message: str, n: int, ends: Sequence[End]) -> dict[str, Value]:
    seconds = [end.seconds for end in ends if end.seconds is not None]
    return {
        "message": message,
        "messages": n,
        "kills": len(seconds),
        "p50 s to the end": percentile(seconds, 0.5) if seconds else None,
        "longest s": max(seconds, default=None),
        "samples that ran again": sum(end.again for end in ends),
        "not met": len(ends) - len(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills stranded", description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = asyncio.run(
        stranded(arguments.every, arguments.seed, lambda line: print(line, file=sys.stderr, flush=True))
    )
    if arguments.json:
        print(as_json(found))
    else:
        show(found)
    return 0 if found.met else 1


if __name__ == "__main__":
    sys.exit(main())

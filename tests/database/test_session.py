"""Sessions are brief, bounded, and never held while anything slow happens."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint
from sqlalchemy import Row, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from structlog.testing import capture_logs

from app.artifacts import Artifacts
from app.database import session
from app.database.engine import open_engine
from app.database.session import Database, refuse_held_session
from app.errors import DatabaseRefused, DatabaseUnavailable, SessionHeld
from app.ledger import Enqueue
from app.metrics import SECONDS
from app.queue import open_queue
from app.runner.messages import Job
from app.runner.supervisor import Supervisor
from app.settings import Settings, load
from app.spec import Spec
from tests.recorded import Recorded

SELECT = text("SELECT 1 AS one")


async def test_a_child_cannot_be_started_while_a_session_is_held(database: Database) -> None:
    job = Job(
        kind="plan", evaluation_id="e", execution_id="e.plan", attempt=1, spec=Spec(task="t", model="m"), directory="d"
    )
    supervisor = Supervisor({}, refuse_held_session)

    async def culprit(_: AsyncConnection) -> None:
        async with supervisor.run(job):
            raise AssertionError("it runs")

    with pytest.raises(
        SessionHeld, match=r"test_session\..*culprit \(test_session.py:\d+\) holds .* run e.plan in a child"
    ):
        await database.transaction(culprit)


async def test_nothing_slow_is_done_while_a_session_is_held(
    database: Database, settings: Settings, tmp_path: Any
) -> None:
    """Uploads and Cloud Tasks, and a second session: the first would wait for it while holding what it may need."""
    artifacts = Artifacts(settings.artifacts)
    async with open_queue(settings.model_copy(update={"queue_endpoint": "127.0.0.1:9"})) as queue:
        slow = {
            "upload a.eval": lambda: artifacts.ship(tmp_path / "a.eval", "file:///nowhere"),
            "create a Cloud Task for e.1": lambda: queue.create(Enqueue("e.1", 1)),
            "open another": lambda: database.run(SELECT),
        }
        for what, begin in slow.items():

            async def culprit(_: AsyncConnection, begin: Any = begin) -> None:
                await begin()

            with pytest.raises(SessionHeld, match=what):
                await database.transaction(culprit)


async def test_a_task_that_a_session_started_may_go_on_once_it_has_returned(database: Database) -> None:
    gate = asyncio.Event()
    tasks = []

    async def later() -> None:
        await gate.wait()
        await database.run(SELECT)

    async def work(_: AsyncConnection) -> None:
        tasks.append(asyncio.create_task(later()))

    await database.transaction(work)
    gate.set()
    await tasks[0]


async def test_a_session_that_lasts_is_logged_with_what_it_waits_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is up when it waits for what is to be shown, on however slow a machine."""
    timers: list[tuple[float, Any, asyncio.TimerHandle]] = []
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def noted(delay: float, callback: Any, *given: Any, **named: Any) -> asyncio.TimerHandle:
        hold = getattr(callback, "__self__", None)
        if not isinstance(hold, session._Hold) or not hold.by.startswith(__name__):
            return call_later(delay, callback, *given, **named)
        timers.append((delay, callback, call_later(3600, callback)))
        return timers[-1][2]

    async def dawdle(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT pg_sleep(0.05)"))
        ((_, tell, _),) = timers
        loop.call_soon(tell)
        loop.call_soon(told.set)
        await told.wait()

    async def hurry(connection: AsyncConnection) -> None:
        await connection.execute(SELECT)

    monkeypatch.setattr(loop, "call_later", noted)
    with capture_logs() as logs:
        await database.transaction(dawdle)
        await database.transaction(hurry)
    assert [(delay, timer.cancelled()) for delay, _, timer in timers] == [(session.LONG, True)] * 2
    (entry,) = (entry for entry in logs if entry.get("by", "").startswith(__name__))
    assert entry["event"] == "a database session is held for long"
    assert "dawdle (test_session.py:" in entry["by"]
    assert "await told.wait()" in entry["stack"]
    assert "test_a_session_that_lasts" in entry["stack"]
    assert entry["seconds"] >= 0.05


async def test_a_statement_that_lasts_is_logged_by_its_name(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONG", 0.05)
    with capture_logs() as logs:
        await database.run(text("/* slow.one */ SELECT pg_sleep(0.3)"))
    (entry,) = (entry for entry in logs if entry.get("by") == "slow.one")
    assert "asyncpg" in entry["stack"]


async def test_how_long_sessions_wait_and_are_held_are_histograms(engine: AsyncEngine, settings: Settings) -> None:
    recorded = Recorded()
    database = Database(engine, settings, recorded.telemetry.meter)
    for _ in range(3):
        await database.run(SELECT)
    await database.run(text("SELECT pg_sleep(0.3)"))
    (wait,) = recorded.points("proctor.pool.wait")
    assert isinstance(wait, HistogramDataPoint)
    assert wait.count == 4
    (point,) = recorded.points("proctor.pool.hold")
    assert isinstance(point, HistogramDataPoint)
    assert (point.count, tuple(point.explicit_bounds)) == (4, SECONDS)
    assert sum(point.bucket_counts) == 4
    assert point.min < 0.3 <= point.max


@pytest.fixture
def hasty(engine: AsyncEngine, settings: Settings) -> Database:
    return Database(engine, settings.model_copy(update={"statement_timeout": 0.3, "database_patience": 0}))


async def test_a_transaction_as_a_whole_has_a_deadline(
    hasty: Database, database: Database, engine: AsyncEngine
) -> None:
    """Each of its statements is quick enough."""
    pids = []

    async def long(connection: AsyncConnection) -> None:
        pids.append((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())
        while True:
            await connection.execute(text("SELECT pg_sleep(0.05)"))

    with pytest.raises(DatabaseUnavailable, match="TimeoutError"):
        await hasty.transaction(long)
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    (row,) = await database.run(text("SELECT pg_backend_pid() AS pid"))
    assert row.pid not in pids


async def test_a_cancelled_caller_leaves_no_connection_behind(database_url: str) -> None:
    """Neither in use nor, being still at work, in the pool; whatever moment it was cancelled at."""
    # the driver does not retrieve an error of its own when it is cancelled while it asks for TLS
    settings = load(database_url=f"{database_url}?sslmode=disable")
    async with open_engine(settings) as engine:
        database, cancelled = Database(engine, settings), 0
        for turns in range(60):
            call = asyncio.create_task(database.run(text("SELECT pg_sleep(20)")))
            for _ in range(turns):
                await asyncio.sleep(0)
            cancelled += call.cancel()
            await asyncio.wait({call})
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert cancelled == 60
        everyone = [database.run(text("SELECT pg_sleep(0.1)")) for _ in range(settings.connections)]
        await asyncio.gather(*everyone)


async def test_a_batch_that_begins_is_served_by_the_pool_s_own_connections(
    database: Database, engine: AsyncEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of those beyond them is opened, used once and closed, while one would be free in a moment."""
    monkeypatch.setattr(session, "OVERFLOW_AFTER", 10)  # a busy machine's moment
    opened = _connections(engine)
    for _ in range(3):
        await asyncio.gather(*(database.run(SELECT) for _ in range(settings.connections)))
    assert len(opened) <= settings.pool_size


async def test_nobody_waits_for_long_behind_sessions_that_last(
    database: Database, engine: AsyncEngine, settings: Settings
) -> None:
    gate = asyncio.Event()

    async def last(connection: AsyncConnection) -> None:
        await connection.execute(SELECT)
        await gate.wait()

    opened = _connections(engine)
    lasting = [asyncio.create_task(database.transaction(last)) for _ in range(settings.pool_size)]
    rows = await asyncio.gather(*(database.run(SELECT) for _ in range(settings.max_overflow)))
    assert not any(task.done() for task in lasting)
    assert len(rows) == settings.max_overflow
    assert settings.pool_size < len(opened) <= settings.connections
    gate.set()
    await asyncio.gather(*lasting)


def _connections(engine: AsyncEngine) -> list[Any]:
    """Those that are opened from now on."""
    opened: list[Any] = []
    event.listen(engine.sync_engine, "connect", lambda connection, _: opened.append(connection))
    return opened


async def test_a_statement_that_was_prepared_before_a_migration_is_prepared_again(database_url: str) -> None:
    settings = load(database_url=database_url, pool_size=1, max_overflow=0)
    everything = text("SELECT * FROM changing")

    async def work(connection: AsyncConnection) -> Sequence[Row[Any]]:
        return (await connection.execute(everything)).all()

    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        await database.run(text("CREATE TABLE changing (a int)"))
        ways: list[Callable[[], Awaitable[Sequence[Row[Any]]]]] = [
            lambda: database.run(everything),
            lambda: database.transaction(work),
        ]
        for n, read in enumerate(ways, start=1):
            assert await read() == []
            other: Any = await asyncpg.connect(database_url)
            await other.execute(f"ALTER TABLE changing ADD COLUMN b{n} int; INSERT INTO changing (a) VALUES ({n})")
            await other.close()
            assert [row.a for row in await read()] == [n]
            await database.run(text("DELETE FROM changing"))


async def test_a_parameter_that_the_server_does_not_know_is_said_to_be_one(database_url: str) -> None:
    settings = load(database_url=f"{database_url}?no_such_setting=1")
    async with open_engine(settings) as engine:
        with pytest.raises(
            DatabaseRefused, match=r"does not know a parameter of PROCTOR_DATABASE_URL.*no_such_setting"
        ):
            await Database(engine, settings).run(SELECT)


async def test_a_failure_that_is_not_the_moment_s_is_not_tried_again(database: Database) -> None:
    tries = []

    async def wrong(connection: AsyncConnection) -> None:
        tries.append(1)
        await connection.execute(text("SELECT nothing"))

    with pytest.raises(Exception, match="column is missing"):
        await database.transaction(wrong)
    assert len(tries) == 1

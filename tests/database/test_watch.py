"""What becomes of pooled connections can be read from the metrics: how many, and why."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import event, text

from app.database.engine import open_engine
from app.database.session import Database
from app.errors import DatabaseUnavailable
from app.settings import Settings
from tests.database.conftest import BRISK, PID, Clock, fill
from tests.faults.proxy import Proxy
from tests.recorded import Recorded

SLEEP = text("SELECT pg_sleep(10)")
END = "SELECT pg_terminate_backend($1)"


@pytest.fixture
def recorded() -> Recorded:
    """Its own."""
    return Recorded()


async def test_connections_in_use_are_counted_while_they_are(calm: Settings, recorded: Recorded) -> None:
    async with open_engine(calm, meters=recorded.telemetry.meter) as engine:
        async with engine.connect(), engine.connect():
            assert recorded.value("proctor.pool.in_use") == 2
        assert recorded.value("proctor.pool.in_use") == 0


async def test_a_failed_ping_is_counted_and_so_are_the_connections_that_it_casts_doubt_on(
    calm: Settings, proxy: Proxy, recorded: Recorded
) -> None:
    watchful = calm.model_copy(update={"ping_timeout": BRISK["ping_timeout"]})
    async with open_engine(watchful, meters=recorded.telemetry.meter) as engine:
        await fill(engine, 3)
        assert proxy.cut("silence") == 3
        async with engine.connect():
            assert recorded.value("proctor.pool.replaced") == 1
            async with engine.connect(), engine.connect():
                pass
    assert recorded.value("proctor.pool.pings_failed") == recorded.value("proctor.pool.replaced", cause="ping") == 1
    assert recorded.value("proctor.pool.replaced", cause="doubted") == 2
    assert recorded.value("proctor.pool.replaced") == 3


async def test_replacing_a_connection_for_its_age_is_counted_as_that(
    calm: Settings, recorded: Recorded, clock: Clock
) -> None:
    """The age of a connection includes its login: here a slow one is too old from the first, and is replaced before its
    use; the next, once it is as old, when it is used again."""

    def age(*_: Any) -> None:
        clock.ahead += calm.pool_recycle + 1

    async with open_engine(calm, meters=recorded.telemetry.meter) as engine:
        # inserted: a part of the login, for whoever counts from its end
        event.listen(engine.sync_engine, "connect", age, insert=True, once=True)
        async with engine.connect():
            assert recorded.value("proctor.pool.replaced", cause="recycle") == 1
        age()
        async with engine.connect():
            pass
    assert recorded.value("proctor.pool.replaced") == recorded.value("proctor.pool.replaced", cause="recycle") == 2


async def test_a_session_that_is_cut_for_its_time_costs_a_connection(calm: Settings, recorded: Recorded) -> None:
    async with open_engine(calm, meters=recorded.telemetry.meter) as engine:
        database = Database(engine, calm.model_copy(update={"statement_timeout": 0.05}))
        with pytest.raises(DatabaseUnavailable):
            await database.run(SLEEP, patience=0)
    assert recorded.value("proctor.pool.replaced", cause="timeout") == 1


async def test_a_server_that_ends_a_session_is_told_from_a_connection_that_breaks(
    calm: Settings, direct: Any, recorded: Recorded
) -> None:
    async with open_engine(calm, meters=recorded.telemetry.meter) as engine:
        async with engine.connect() as connection:
            pid = (await connection.execute(PID)).scalar_one()
        ending = asyncio.create_task(Database(engine, calm).run(SLEEP, patience=0))
        async with asyncio.timeout(20):
            while not await direct.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'", pid
            ):
                await asyncio.sleep(0.02)
        await direct.execute(END, pid)
        with pytest.raises(DatabaseUnavailable):
            await ending
    assert recorded.value("proctor.pool.replaced", cause="server gone") == 1

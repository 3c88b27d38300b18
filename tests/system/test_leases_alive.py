"""Leases while children are at work: one statement renews them all, a lost one ends what was done under it, and a database
that is away for a while ends nothing."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app.ledger import Ledger, Settlement
from app.runner import supervisor
from tests.faults.connection import Moment
from tests.ledger.transactions import until_blocked
from tests.system.conftest import planned
from tests.system.inside import PATIENCE, Inside, open_inside

INTERVAL = 0.5
RENEWALS_PATIENCE = 5.0
QUICK: dict[str, Any] = {
    "lease": 6,
    "statement_timeout": 3,
    "renew_interval": INTERVAL,
    "renew_patience": RENEWALS_PATIENCE,
    "database_patience": 20,
}
RENEW = "/* ledger.renew */"
TAKE = text("UPDATE task_executions SET lease_expires_at = clock_timestamp() WHERE id = :id")
RESULTS = text("SELECT sample_id, attempt FROM sample_results WHERE evaluation_id = :id ORDER BY sample_id")
LOCK = text("SELECT FROM evaluations WHERE id = :id FOR NO KEY UPDATE")
SHORTEST = text("""/* test.shortest */
SELECT min(extract(epoch FROM e.lease_expires_at - a.started_at)) AS held FROM task_executions e
JOIN execution_attempts a ON a.execution_id = e.id WHERE e.evaluation_id = :id AND e.state = 'running'
""")


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("leases"), **QUICK) as inside:
        yield inside


def renewals(inside: Inside) -> int:
    return sum(RENEW in sql for sql in inside.proxy.executed)


async def renewed(inside: Inside, times: int) -> float:
    """Returns after so many more have been sent, with the seconds that took."""
    enough, began = renewals(inside) + times, time.monotonic()
    async with asyncio.timeout(PATIENCE):
        while renewals(inside) < enough:
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def take_over(inside: Inside, execution: str) -> int:
    """By another worker, which is sure that the lease is over. Returns its attempt."""
    async with asyncio.timeout(PATIENCE):
        while True:
            await inside.database.run(TAKE, {"id": execution})
            claim = await Ledger(inside.database, lease=120, worker="another").claim(execution, uuid4())
            if claim and claim.granted:  # else a renewal came in between
                return claim.attempt


async def outcomes(inside: Inside, execution: str) -> list[tuple[str | None, str | None]]:
    attempts = (await inside.get(f"/executions/{execution}"))["attempts"]
    return [(a["outcome"], a["error"] and a["error"]["message"].partition("\n")[0]) for a in attempts]


async def results(inside: Inside, evaluation: UUID) -> list[tuple[str, int]]:
    return [(r.sample_id, r.attempt) for r in await inside.database.run(RESULTS, {"id": evaluation})]


async def test_one_statement_renews_all_that_a_worker_holds_and_an_idle_worker_makes_none(inside: Inside) -> None:
    evaluation = await planned(inside.ledger, *[[1]] * 5, how="hang")
    all_five = [f"{evaluation}.{n}" for n in range(1, 6)]
    pushes = [inside.pushing(execution) for execution in all_five]
    await inside.under_way(*all_five)
    await renewed(inside, 1)
    seconds = await renewed(inside, 4)
    print(f"4 renewals for 5 executions took {seconds:.2f} s, at one every {INTERVAL} s")
    # the first two are seen together if the loop has stood still between them
    assert seconds > 3 * INTERVAL * 0.9, "5 of them would send 4 in less than one interval"
    ((held,),) = await inside.database.run(SHORTEST, {"id": evaluation})
    assert held > QUICK["lease"] + 2 * INTERVAL, "and each of the five is renewed"
    await inside.ledger.cancel(evaluation)
    assert {(await pushed).json()["state"] for pushed in pushes} == {"cancelled"}

    await asyncio.sleep(INTERVAL)  # a renewal may have been under way
    before = len(inside.proxy.executed)
    await asyncio.sleep(4 * INTERVAL)
    assert list(inside.proxy.executed)[before:] == []


async def test_a_lost_lease_kills_the_child_at_once_with_all_that_it_has_started(
    inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears no interrupt, and asked politely it would have ten minutes."""
    monkeypatch.setattr(supervisor, "_GRACE", 600.0)
    output = tmp_path / "grandchild"
    evaluation = await planned(inside.ledger, [1], how=f"spawn:{output}")
    execution = f"{evaluation}.1"
    pushed = inside.pushing(execution)
    (child,) = await inside.under_way(execution)
    grandchild = psutil.Process(await first_number(output))
    assert grandchild.parent() == child
    began = time.monotonic()
    attempt = await take_over(inside, execution)
    answer = await asyncio.wait_for(pushed, PATIENCE)
    print(f"answered {time.monotonic() - began:.2f} s after the lease was lost, renewed every {INTERVAL} s")
    assert (answer.status_code, "Another attempt holds it" in answer.json()["detail"]) == (409, True)
    assert not psutil.wait_procs([child, grandchild], timeout=10)[1]
    assert (await inside.get(f"/executions/{execution}"))["attempt"] == attempt == 2
    assert await outcomes(inside, execution) == [("interrupted", lost_by("inside")), (None, None)]
    assert await results(inside, evaluation) == []


def lost_by(worker: str) -> str:
    return f"The lease of {worker} ran out: the worker or its child was lost."


async def first_number(output: Path) -> int:
    async with asyncio.timeout(PATIENCE):
        while not (output.exists() and "\n" in output.read_text()):
            await asyncio.sleep(0.02)
    return int(output.read_text().split()[0])


def _but_the_lost(rows: list[Any]) -> list[Any]:
    """All but the rows of first attempts: these say what they have spent."""
    return [one for one in rows if one[0] != "attempt" or one[2]["attempt"] != 1]


async def test_what_an_attempt_still_does_after_its_lease_was_lost_is_not_recorded(
    inside: Inside, tmp_path: Path
) -> None:
    """It never learns by renewal: one attempt ends its only sample, another the first of its two."""
    flag = tmp_path / "flag"
    evaluation = await planned(inside.ledger, [1], [1, 2], how=f"until:{flag}")
    ends, goes_on = f"{evaluation}.1", f"{evaluation}.2"
    pushes = [inside.pushing(ends), inside.pushing(goes_on)]
    await inside.under_way(ends, goes_on)
    silent = inside.proxy.cut_at(RENEW, "before", "fin", times=10**6)
    try:
        for execution in (ends, goes_on):
            assert await take_over(inside, execution) == 2
        before = _but_the_lost(await inside.rows(evaluation))
        flag.touch()
        for pushed in pushes:
            answer = await asyncio.wait_for(pushed, PATIENCE)
            assert (answer.status_code, "Another attempt holds it" in answer.json()["detail"]) == (409, True)
    finally:
        silent.remove()
    after = await inside.rows(evaluation)
    assert _but_the_lost(after) == before
    spent = [
        row["usage"]["tokens"] for kind, _, row in after if kind == "attempt" and row["attempt"] == 1 and row["usage"]
    ]
    assert sorted(spent)[-2:] == [15, 30], "what it has spent all the same: a call, and two"
    settled = await inside.ledger.settle(ends, 2, Settlement("succeeded"))
    assert settled
    assert (settled.verdict, settled.state) == ("recorded", "succeeded"), "the other attempt can"


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_renewals_that_fail_for_less_than_the_patience_stop_nothing(
    inside: Inside, tmp_path: Path, moment: Moment, every_log: None
) -> None:
    """Whether they never reach the database, or its reply is lost."""
    flag = tmp_path / "flag"
    evaluation = await planned(inside.ledger, [1], how=f"until:{flag}")
    pushed = inside.pushing(f"{evaluation}.1")
    (child,) = await inside.under_way(f"{evaluation}.1")
    with capture_logs() as logs:
        failing = inside.proxy.cut_at(RENEW, moment, "fin", times=3)
        async with asyncio.timeout(PATIENCE):
            while failing.happened < 3:
                await asyncio.sleep(0.02)
        await renewed(inside, 2)
    assert failing.happened == 3
    assert [line["event"] for line in logs].count("renewal failed") >= 3
    assert not [line for line in logs if line["event"] == "attempt must stop"]
    assert child.is_running()
    flag.touch()
    assert ((await pushed).status_code, (await pushed).json()["attempt"]) == (200, 1)


async def test_renewals_that_fail_past_the_patience_end_the_attempt_and_the_next_begins(
    inside: Inside, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await planned(inside.ledger, [1], how=f"until:{flag}")
    execution = f"{evaluation}.1"
    pushed = inside.pushing(execution)
    (child,) = await inside.under_way(execution)
    lease = inside.app.state.leases._leases[execution, 1]
    inside.proxy.refuse = True
    inside.proxy.cut("rst")
    try:
        await asyncio.to_thread(child.wait, PATIENCE)
        print(f"stopped {lease.age:.2f} s after the last renewal, with a patience of {RENEWALS_PATIENCE} s")
        assert lease.age > RENEWALS_PATIENCE, "work goes on until then"
        assert not pushed.done(), "what it came to is still to be told"
    finally:
        inside.proxy.refuse = False
    answer = await asyncio.wait_for(pushed, PATIENCE)
    why = "The database did not answer for too long."
    assert (answer.status_code, answer.json()["detail"]) == (409, why)
    view = await inside.get(f"/executions/{execution}")
    assert (view["state"], view["failures"], view["crashes"]) == ("pending", 0, 0)
    flag.touch()
    assert (await inside.push(execution)).json()["attempt"] == 2
    assert await outcomes(inside, execution) == [("interrupted", why), ("succeeded", None)]


@asynccontextmanager
async def locked(inside: Inside, evaluation: UUID) -> AsyncIterator[None]:
    """No settle of it can end. It waits for the evaluation's row last, with the execution's locked."""
    async with inside.database.engine.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            await connection.execute(LOCK, {"id": evaluation})
            yield


async def test_a_renewal_that_crosses_the_own_settle_changes_nothing(
    inside: Inside, tmp_path: Path, every_log: None
) -> None:
    """The settle is carried out and its reply is lost; the renewal has waited for it, and says that there is nothing to
    renew any more. Only then is the settle sent again."""
    flag = tmp_path / "flag"
    evaluation = await planned(inside.ledger, [1], [2], how=f"until:{flag}")
    execution = f"{evaluation}.1"
    pushed = inside.pushing(execution)
    await inside.under_way(execution)
    with capture_logs() as logs:
        settling = inside.proxy.cut_at("/* ledger.settle */", "after", "silence")
        again = inside.proxy.cut_at("/* ledger.settle */", "before", "fin", times=10**6)
        async with locked(inside, evaluation):
            flag.touch()
            await until_blocked(inside.database, 2)  # the settle, and behind it the renewal
        await settling.wait()
        await renewed(inside, 2)
        assert not pushed.done()
        again.remove()
        answer = await asyncio.wait_for(pushed, PATIENCE)
    assert (answer.status_code, answer.json()["state"], answer.json()["attempt"]) == (200, "succeeded", 1)
    assert not [line for line in logs if line["event"] == "attempt must stop"]
    assert await outcomes(inside, execution) == [("succeeded", None)]
    assert await results(inside, evaluation) == [("1", 1)]

"""Every operation of the ledger, its connection cut at its own statement, before it is carried out and after: what the
caller gets and what the tables hold are those of a run without any fault. Where a reply that was lost makes a difference,
`after` says which."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from sqlalchemy import delete, select, text
from structlog.testing import capture_logs

from app.database.engine import open_engine
from app.database.session import Database
from app.database.tables import evaluations, execution_attempts, sample_results, task_executions
from app.ledger import Cancelled, Claim, Enqueue, Held, Ledger, Settled, Settlement, Stop
from app.settings import load
from tests.conftest import own_database
from tests.faults.connection import Cut, Moment
from tests.faults.proxy import Proxy
from tests.ledger.factories import (
    FAULT,
    SPEC,
    SUCCEEDED,
    claim,
    end_days_ago,
    ended,
    errored,
    let_expire,
    make_due,
    planned,
    run_out,
    samples_of,
    scored,
    settle,
    submitted,
)
from tests.ledger.rows import seconds_until

CLAIM_ID = UUID(int=1)
BRISK: dict[str, Any] = {"statement_timeout": 0.8, "database_patience": 30, "worker": "worker-1"}
"""Seconds: silence costs so much. A statement takes some milliseconds, on a busy machine some tenths of a second."""
AGAIN = "database call is tried again"
RUNS = 3
"""Of one case, if the machine stands still for as long as a statement may take."""
NOBODY = UUID(int=0)


@dataclass(frozen=True)
class Scene:
    """What an operation is about to act on."""

    ledger: Ledger
    """Nothing is wrong with its connections."""
    database: Database
    evaluation: UUID = NOBODY
    attempt: Any = None
    """The claim that the operation acts by, where it needs one."""


Make = Callable[[Scene], Awaitable[Scene]]
Act = Callable[[Ledger, Scene], Awaitable[Any]]


def same(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class Operation:
    """`make` brings the scene about, `act` is the operation, `statement` is its own, and `after` turns its answer into the
    one that a caller gets whose first one was lost."""

    make: Make
    act: Act
    statement: str
    after: Callable[[Any], Any] = same


# Scenes ---------------------------------------------------------------------------------------------------------------


async def nothing(scene: Scene) -> Scene:
    return scene


async def plan_pending(scene: Scene) -> Scene:
    return replace(scene, evaluation=await submitted(scene.ledger))


async def plan_claimed(scene: Scene) -> Scene:
    scene = await plan_pending(scene)
    return replace(scene, attempt=await claim(scene.ledger, f"{scene.evaluation}.plan"))


async def runs_pending(scene: Scene) -> Scene:
    return replace(scene, evaluation=await planned(scene.ledger, 2, samples=2))


async def run_claimed(scene: Scene) -> Scene:
    scene = await runs_pending(scene)
    return replace(scene, attempt=await claim(scene.ledger, f"{scene.evaluation}.1"))


async def run_expired(scene: Scene) -> Scene:
    scene = await run_claimed(scene)
    await let_expire(scene.database, f"{scene.evaluation}.1")
    return scene


async def run_taken_over(scene: Scene) -> Scene:
    scene = await run_expired(scene)
    return replace(scene, attempt=await claim(scene.ledger, f"{scene.evaluation}.1"))


async def last_run_claimed(scene: Scene) -> Scene:
    scene = await runs_pending(scene)
    await run_out(scene.ledger, scene.evaluation, "succeeded")
    return replace(scene, attempt=await claim(scene.ledger, f"{scene.evaluation}.2"))


async def last_run_errored(scene: Scene) -> Scene:
    scene = replace(scene, evaluation=await submitted(scene.ledger))
    plan = await claim(scene.ledger, f"{scene.evaluation}.plan")
    await settle(scene.ledger, plan, runs=samples_of(3), error_limit=1)
    scene = replace(scene, attempt=await claim(scene.ledger, f"{scene.evaluation}.1"))
    await settle(scene.ledger, scene.attempt, "failed", samples=[errored(1)], error=FAULT)
    return scene


async def report_claimed(scene: Scene) -> Scene:
    scene = replace(scene, evaluation=await planned(scene.ledger, 2))
    await run_out(scene.ledger, scene.evaluation, "succeeded", "failed")
    return replace(scene, attempt=await claim(scene.ledger, f"{scene.evaluation}.report"))


async def run_recorded(scene: Scene) -> Scene:
    scene = await run_claimed(scene)
    await scene.ledger.record(scene.attempt.execution_id, scene.attempt.attempt, [scored(1), errored(1001)])
    return scene


async def over(scene: Scene) -> Scene:
    return replace(scene, evaluation=await ended(scene.ledger, "failed", "succeeded", "cancelled"))


async def long_over(scene: Scene) -> Scene:
    scene = await over(scene)
    await end_days_ago(scene.database, scene.evaluation, 100)
    return scene


async def checkpoints_expired(scene: Scene) -> Scene:
    scene = await long_over(scene)
    (expired,) = await scene.ledger.expire("checkpoints", days=99)
    return replace(scene, attempt=expired)


async def run_due(scene: Scene) -> Scene:
    scene = await runs_pending(scene)
    await scene.ledger.enqueued([Enqueue(f"{scene.evaluation}.2", 0)])  # a day out
    await make_due(scene.database, f"{scene.evaluation}.1")
    return scene


async def run_taken(scene: Scene) -> Scene:
    scene = await run_due(scene)
    assert await scene.ledger.take_due(10) == [Enqueue(f"{scene.evaluation}.1", 1)]
    return scene


# Operations -----------------------------------------------------------------------------------------------------------


def settling(settlement: Settlement) -> Act:
    return lambda ledger, scene: ledger.settle(scene.attempt.execution_id, scene.attempt.attempt, settlement)


def recording(ledger: Ledger, scene: Scene) -> Awaitable[Any]:
    return ledger.record(scene.attempt.execution_id, scene.attempt.attempt, [scored(1), errored(1001)], {"m": "1"})


def renewing(ledger: Ledger, scene: Scene) -> Awaitable[Any]:
    execution, attempt = scene.attempt.execution_id, scene.attempt.attempt
    return ledger.renew([Held(execution, attempt, {"tokens": 7}), Held(f"{scene.evaluation}.2", 9)])


async def claiming(ledger: Ledger, scene: Scene) -> Claim:
    """What is left of a lease depends on the moment; it is the whole lease, or none."""
    found = await ledger.claim(f"{scene.evaluation}.1", CLAIM_ID, {"queue": "q"})
    assert found is not None
    if found.verdict == "yours":
        assert found.lease_left is not None
        assert 110 < found.lease_left <= 120
    return replace(found, lease_left=None)


def yours(answer: Claim) -> Claim:
    """Granted, with the same number; the row is the one that this very push brought about."""
    return replace(answer, verdict="yours", state="running", holder="worker-1")


def already(answer: Settled) -> Settled:
    """Recorded by this attempt. A report's Cloud Task is then the sweeper's to make: the row has its time."""
    return replace(answer, verdict="already", runs=0, report=None)


def nothing_left(answer: Cancelled) -> Cancelled:
    return replace(answer, executions=0, report=None)


def stopping(ledger: Ledger, scene: Scene) -> Awaitable[Any]:
    return ledger.stop_if_exceeded(scene.evaluation, scene.attempt.execution_id, scene.attempt.attempt)


def stopped_already(answer: Stop) -> Stop:
    return replace(answer, executions=0, report=None)


def none(_: Any) -> list[Enqueue]:
    """Taken, and not by anybody who knows: due again in two minutes."""
    return []


async def expiring(ledger: Ledger, scene: Scene) -> list[UUID]:
    return [one.evaluation_id for one in await ledger.expire("transcripts", days=99)]


RUN_ENDS = Settlement("succeeded", samples=[scored(2), scored(1002)], usage={"m": {"total_tokens": 5}}, cost=0.5)


async def how_many_wait(ledger: Ledger, _: Any) -> int:
    """How long they have is another number each time."""
    return (await ledger.waiting())[1]


OPERATIONS = {
    "submit": Operation(nothing, lambda ledger, _: ledger.submit(SPEC, "user@example.com"), "submit"),
    "submit with a key": Operation(nothing, lambda ledger, _: ledger.submit(SPEC, "u@example.com", "key"), "submit"),
    "claim": Operation(runs_pending, claiming, "claim", yours),
    "claim what expired": Operation(run_expired, claiming, "claim", yours),
    "record": Operation(run_claimed, recording, "record"),
    "renew": Operation(run_claimed, renewing, "renew"),
    "settle a plan": Operation(
        plan_claimed, settling(Settlement("succeeded", runs=samples_of(3, 2), runs_due=0)), "settle", already
    ),
    "settle a run": Operation(run_claimed, settling(RUN_ENDS), "settle", already),
    "settle the last run": Operation(last_run_claimed, settling(RUN_ENDS), "settle", already),
    "settle a run to be tried again": Operation(
        run_claimed, settling(Settlement("failed", max_failures=2)), "settle", already
    ),
    "settle a report": Operation(report_claimed, settling(Settlement("succeeded", end=SUCCEEDED)), "settle", already),
    "cancel": Operation(run_claimed, lambda ledger, scene: ledger.cancel(scene.evaluation), "cancel", nothing_left),
    "cancel all": Operation(
        runs_pending, lambda ledger, scene: ledger.cancel(scene.evaluation), "cancel", nothing_left
    ),
    "stop_if_exceeded, counting": Operation(last_run_errored, stopping, "errored"),
    "stop_if_exceeded": Operation(last_run_errored, stopping, "stop", stopped_already),
    "retry": Operation(over, lambda ledger, scene: ledger.retry(scene.evaluation), "retry.lock"),
    "retry, arming": Operation(over, lambda ledger, scene: ledger.retry(scene.evaluation), "retry.rearm"),
    "retry, reopening": Operation(over, lambda ledger, scene: ledger.retry(scene.evaluation), "retry.reopen"),
    "retry, COMMIT": Operation(over, lambda ledger, scene: ledger.retry(scene.evaluation), "COMMIT;"),
    "take_due": Operation(run_due, lambda ledger, _: ledger.take_due(10), "take_due", none),
    "enqueued": Operation(
        run_taken, lambda ledger, scene: ledger.enqueued([Enqueue(f"{scene.evaluation}.1", 1)]), "enqueued"
    ),
    "all_due": Operation(run_claimed, lambda ledger, _: ledger.all_due(), "all_due"),
    "waiting": Operation(runs_pending, how_many_wait, "waiting"),
    "scored": Operation(run_recorded, lambda ledger, scene: ledger.scored(scene.attempt), "scored"),
    "interrupted": Operation(run_taken_over, lambda ledger, scene: ledger.interrupted(scene.attempt), "interrupted"),
    "unfinished": Operation(run_claimed, lambda ledger, scene: ledger.unfinished(scene.evaluation), "unfinished"),
    "plan": Operation(plan_pending, lambda ledger, scene: ledger.plan(scene.evaluation), "plan"),
    "spent": Operation(
        run_taken_over,
        lambda ledger, scene: ledger.spent(f"{scene.evaluation}.1", 1, {"tokens": 7}, 0.5),
        "spent",
    ),
    "counted_log": Operation(over, lambda ledger, scene: ledger.counted_log(scene.evaluation), "counted_log"),
    "versions": Operation(run_recorded, lambda ledger, scene: ledger.versions(scene.evaluation), "versions"),
    "expire": Operation(long_over, expiring, "expire.transcripts", none),
    "expired": Operation(
        checkpoints_expired, lambda ledger, scene: ledger.expired("checkpoints", scene.attempt, done=True), "expired"
    ),
    "to_report": Operation(report_claimed, lambda ledger, scene: ledger.to_report(scene.evaluation), "to_report"),
}


# A run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """With ids renamed in the order of their appearance, and times in whole minutes from now."""

    rows: list[str]
    answer: str
    after: str
    """The answer, had the first one been lost."""


class Names:
    """The same in every run for what is the same in every run."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def __call__(self, value: Any) -> str:
        return ID.sub(lambda found: self._names.setdefault(found[0], f"id{len(self._names)}"), repr(value))


ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def outcome(operation: Operation, scene: Scene, answer: Any) -> Outcome:
    names = Names()
    rows = [names(row) for row in await all_rows(scene.database)]
    return Outcome(rows, names(answer), names(operation.after(answer)))


async def all_rows(database: Database) -> list[dict[str, Any]]:
    ((now,),) = await database.run(text("SELECT clock_timestamp()"))

    def in_minutes(value: Any) -> Any:
        return f"{round((value - now).total_seconds() / 60)} min" if isinstance(value, datetime) else value

    tables = (evaluations, task_executions, execution_attempts, sample_results)
    found = [row for table in tables for row in await database.run(select(table).order_by(*table.primary_key))]
    return [{name: in_minutes(value) for name, value in row._mapping.items()} for row in found]


@asynccontextmanager
async def scene_of(operation: Operation, url: str) -> AsyncIterator[Scene]:
    """In a database that is empty but for it."""
    settings = load(database_url=url)
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        for table in (sample_results, execution_attempts, task_executions, evaluations):
            await database.run(delete(table))
        yield await operation.make(Scene(Ledger(database, lease=settings.lease, worker="worker-1"), database))


@asynccontextmanager
async def behind(proxy: Proxy, url: str) -> AsyncIterator[Ledger]:
    """The ledger that the operation is asked of: what is cut is its connection."""
    settings = load(**BRISK, database_url=proxy.through(url))
    async with open_engine(settings) as engine:
        yield Ledger(Database(engine, settings), lease=settings.lease, worker="worker-1")


async def run(operation: Operation, url: str, moment: Moment | None = None, how: Cut = "rst") -> Outcome:
    """Without `moment` nothing is cut. A try that nobody cut, or that failed twice, met its deadline for the machine's sake:
    what it leaves behind is another story than the one to be told here, and so it is begun again."""
    expected = 0 if moment is None else 1
    for _ in range(RUNS):
        retries, cuts, found = await run_once(operation, url, moment, how)
        if retries == expected:
            break
    assert (retries, cuts) == (expected, expected)
    return found


async def run_once(operation: Operation, url: str, moment: Moment | None, how: Cut) -> tuple[int, int, Outcome]:
    """How often it was tried again, how often it was cut, and what came of it."""
    async with (
        Proxy(server_of(url)) as proxy,
        scene_of(operation, url) as scene,
        behind(proxy, url) as ledger,
    ):
        name = operation.statement
        point = proxy.cut_at(name if name == COMMIT else f"/* ledger.{name} */", moment, how) if moment else None
        with capture_logs() as logs:
            answer = await operation.act(ledger, scene)
        retries = sum(entry["event"] == AGAIN for entry in logs)
        return retries, point.happened if point else 0, await outcome(operation, scene, answer)


COMMIT = "COMMIT;"


def server_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


Undisturbed = Callable[[str], Awaitable[Outcome]]


@pytest.fixture(scope="module")
async def url(postgres: str) -> AsyncIterator[str]:
    async with own_database(postgres) as url:
        yield url


@pytest.fixture(scope="module")
def undisturbed(url: str) -> Undisturbed:
    """The outcome of an operation where nothing is cut; each is run once."""
    found: dict[str, Outcome] = {}

    async def get(name: str) -> Outcome:
        if name not in found:
            found[name] = await run(OPERATIONS[name], url)
        return found[name]

    return get


# The tests ------------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Any]:
    for name in OPERATIONS:
        for moment, how in product(("before", "after"), ("rst", "silence")):
            yield pytest.param(name, moment, how)


@pytest.mark.parametrize(("name", "moment", "how"), list(cases()))
async def test_a_cut_changes_nothing(undisturbed: Undisturbed, url: str, name: str, moment: Moment, how: Cut) -> None:
    await compare(undisturbed, url, name, moment, how)


@pytest.mark.parametrize("how", ["fin", "drop"])
@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("name", ["submit", "claim", "settle the last run", "retry, COMMIT"])
async def test_nor_does_any_other_cut(undisturbed: Undisturbed, url: str, name: str, moment: Moment, how: Cut) -> None:
    await compare(undisturbed, url, name, moment, how)


async def compare(undisturbed: Undisturbed, url: str, name: str, moment: Moment, how: Cut) -> None:
    expected = await undisturbed(name)
    assert len(expected.rows) > 1
    found = await run(OPERATIONS[name], url, moment, how)
    assert found.rows == expected.rows
    assert found.answer == (expected.answer if moment == "before" else expected.after)


def test_every_operation_of_the_ledger_is_cut() -> None:
    public = {name for name in vars(Ledger) if not name.startswith("_")}
    assert {re.split(r"[ ,]", name)[0] for name in OPERATIONS} == public


async def test_what_was_taken_and_lost_is_due_again(proxy: Proxy, url: str) -> None:
    """The reply that named it was lost, and the next one names nothing: two minutes later it is taken once more, under
    another number, so that no Cloud Task of that name exists."""
    async with scene_of(OPERATIONS["take_due"], url) as scene, behind(proxy, url) as ledger:
        execution = f"{scene.evaluation}.1"
        point = proxy.cut_at("ledger.take_due", "after", "rst")
        assert await ledger.take_due(10) == []
        assert point.happened == 1
        assert 115 < await seconds_until(scene.database, execution, "sweep_at") <= 120
        await make_due(scene.database, execution)
        assert await ledger.take_due(10) == [Enqueue(execution, 2)]


@pytest.mark.parametrize("name", ["settle the last run", "cancel all"])
async def test_a_report_whose_cloud_task_nobody_was_told_to_make_is_due(proxy: Proxy, url: str, name: str) -> None:
    operation = OPERATIONS[name]
    async with scene_of(operation, url) as scene, behind(proxy, url) as ledger:
        proxy.cut_at(f"ledger.{operation.statement}", "after", "rst")
        assert (await operation.act(ledger, scene)).report is None
        execution = f"{scene.evaluation}.report"
        assert 115 < await seconds_until(scene.database, execution, "sweep_at") <= 120
        await make_due(scene.database, execution)
        assert await ledger.take_due(10) == [Enqueue(execution, 2)]


@pytest.fixture
async def proxy(url: str) -> AsyncIterator[Proxy]:
    async with Proxy(server_of(url)) as proxy:
        yield proxy

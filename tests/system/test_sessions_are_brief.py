"""No connection is held while anything slow happens: seen from the pool's own events while evaluations run."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.main import open_services
from app.runner.messages import Job
from app.runner.supervisor import Child, Supervisor
from app.settings import Settings
from app.spec import Spec
from tests.system.conftest import NUMBERS


@dataclass
class Hold:
    """One checkout: when, for how long, and the names of the statements that ran on it."""

    began: float
    ended: float = 0
    statements: list[str] = field(default_factory=list)


def watch(engine: AsyncEngine) -> list[Hold]:
    holds: list[Hold] = []
    open_holds: dict[int, Hold] = {}
    sync = engine.sync_engine

    @event.listens_for(sync, "checkout")
    def checkout(connection: Any, *_: Any) -> None:
        open_holds[id(connection)] = Hold(time.monotonic())
        holds.append(open_holds[id(connection)])

    @event.listens_for(sync, "checkin")
    def checkin(connection: Any, *_: Any) -> None:
        open_holds.pop(id(connection)).ended = time.monotonic()

    @event.listens_for(sync, "before_cursor_execute")
    def execute(connection: Any, _: Any, statement: str, *__: Any) -> None:
        open_holds[id(connection.connection.dbapi_connection)].statements.append(statement.split(" ", 2)[1])

    return holds


def record_children(supervisor: Supervisor, patch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    """Kind, start and end of each child."""
    lives: list[tuple[str, float, float]] = []
    run = supervisor.run

    @asynccontextmanager
    async def recorded(job: Job) -> AsyncIterator[Child]:
        async with run(job) as child:
            began = time.monotonic()
            yield child
            lives.append((job.kind, began, time.monotonic()))

    patch.setattr(supervisor, "run", recorded)
    return lives


async def test_while_a_child_runs_every_checkout_is_a_renewal_or_a_record(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = settings.model_copy(update={"renew_interval": 0.1, "queue_endpoint": "127.0.0.1:9"})
    spec = Spec(
        task=NUMBERS,
        model="mockllm/model",
        task_args={"n": 3, "how": "wait:1", "sample": 3},
        samples_per_execution=3,
    )
    async with open_services(quick) as services:
        holds = watch(services.database.engine)
        lives = record_children(services.executor.supervisor, monkeypatch)
        evaluation = await services.inline.run(spec, "me", "key")
        view = await services.reader.evaluation(evaluation)
    assert view.state == "succeeded", view.error

    assert [kind for kind, *_ in lives] == ["plan", "plan", "run", "report"]  # the first without the ledger
    during = [h.statements for h in holds for _, began, ended in lives if began < h.began < ended]
    assert {name for names in during for name in names} == {"ledger.renew", "ledger.record"}
    assert during.count(["ledger.record"]) == 2  # the third goes with the settle
    assert during.count(["ledger.renew"]) >= 5
    across = [h for h in holds for _, began, ended in lives if h.began < began and h.ended > began]
    assert across == []
    longest = max(holds, key=lambda h: h.ended - h.began)
    print(
        f"{len(holds)} checkouts, {len(during)} of them while a child ran; the longest hold was"
        f" {(longest.ended - longest.began) * 1000:.1f} ms ({', '.join(longest.statements)})"
    )

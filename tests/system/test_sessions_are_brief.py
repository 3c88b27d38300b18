"""No connection is held while anything slow happens: seen from the pool's own events while evaluations run."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.main import open_services
from app.runner.messages import Job
from app.runner.supervisor import Child, Supervisor
from app.settings import Settings
from app.spec import Spec
from tests.system.conftest import NUMBERS, PATIENCE

RENEWAL, RECORD = ["ledger.renew"], ["ledger.record"]


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


def renewals(holds: list[Hold]) -> int:
    """Since the first record: while the child of the run is at work."""
    names = [h.statements for h in holds]
    return names[names.index(RECORD) :].count(RENEWAL) if RECORD in names else 0


async def test_while_a_child_runs_every_checkout_is_a_renewal_or_a_record(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    quick = settings.model_copy(update={"renew_interval": 0.1, "queue_endpoint": "127.0.0.1:9"})
    spec = Spec(
        task=NUMBERS,
        model="mockllm/model",
        task_args={"n": 3, "how": f"until:{flag}", "sample": 3},
        samples_per_execution=3,
    )
    async with open_services(quick) as services:
        holds = watch(services.database.engine)
        lives = record_children(services.executor.supervisor, monkeypatch)
        running = asyncio.create_task(services.inline.run(spec, "me", "key"))
        async with asyncio.timeout(PATIENCE):
            while renewals(holds) < 5 and not running.done():
                await asyncio.sleep(0.02)
        flag.touch()
        view = await services.reader.evaluation(await running)
    assert view.state == "succeeded", view.error

    assert [kind for kind, *_ in lives] == ["plan", "plan", "run", "report"]  # the first without the ledger
    during = [h.statements for h in holds for _, began, ended in lives if began < h.began < ended]
    assert {name for names in during for name in names} == {*RENEWAL, *RECORD}
    assert during.count(RECORD) == 2  # the third goes with the settle
    assert during.count(RENEWAL) >= 5
    across = [h.statements for h in holds for _, began, _ in lives if h.began < began < h.ended]
    assert [names for names in across if names != RENEWAL] == [], "a renewal may, as while the child runs"
    longest = max(holds, key=lambda h: h.ended - h.began)
    print(
        f"{len(holds)} checkouts, {len(during)} of them while a child ran; the longest hold was"
        f" {(longest.ended - longest.began) * 1000:.1f} ms ({', '.join(longest.statements)})"
    )

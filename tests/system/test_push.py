"""What the push endpoint answers, over HTTP: row by row as in the design, and no 2xx while anything is owed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app.execution import Push
from app.ledger import Ledger
from app.spec import Spec
from tests.system.conftest import NUMBERS, TASKS, fanned_out, planned
from tests.system.inside import PATIENCE, Inside, open_inside

BEFORE_DEADLINE = 10.0
"""Seconds that an attempt has which arrives late."""

STATE = text("SELECT state FROM task_executions WHERE id = :id")
TAKE = text("UPDATE task_executions SET lease_expires_at = clock_timestamp() WHERE id = :id")


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    folder = tmp_path_factory.mktemp("push")
    async with open_inside(postgres, folder, deadline_margin=2, database_patience=1) as inside:
        yield inside


async def numbers(inside: Inside, *runs: list[int], max_failures: int = 1, **args: Any) -> UUID:
    spec = Spec(task=NUMBERS, model="mockllm/model", task_args={"n": 4, **args}, max_failures=max_failures)
    return await fanned_out(inside.ledger, spec, *runs)


async def answered(inside: Inside, execution: str) -> tuple[int, str | None, int | None]:
    """Status, and the recorded state and attempt if it is acknowledged."""
    answer = await inside.push(execution)
    told = answer.json()
    assert told.get("status", answer.status_code) == answer.status_code
    return answer.status_code, told.get("state"), told.get("attempt")


async def unchanged(inside: Inside, evaluation: UUID, *answers: tuple[str, int, str]) -> None:
    """Each execution is answered so, again and at once, and nothing is written for it."""
    before = await inside.rows(evaluation)
    for execution, status, state in answers:
        for answer in await asyncio.gather(*(answered(inside, execution) for _ in range(3))):
            assert answer[:2] == (status, state)
    assert await inside.rows(evaluation) == before


async def test_an_end_is_acknowledged_with_its_outcome_and_so_are_its_duplicates(inside: Inside) -> None:
    evaluation = await numbers(inside, [1], [2])
    assert await answered(inside, f"{evaluation}.1") == (200, "succeeded", 1)
    await unchanged(inside, evaluation, (f"{evaluation}.1", 200, "succeeded"))


async def test_a_cancelled_execution_is_acknowledged(inside: Inside) -> None:
    evaluation = await numbers(inside, [1], [2], how="hang")
    running = inside.pushing(f"{evaluation}.1")
    await inside.under_way(f"{evaluation}.1")
    await inside.client.post(f"/evaluations/{evaluation}/cancel")
    assert ((await running).status_code, (await running).json()["state"]) == (200, "cancelled")
    first, second = f"{evaluation}.1", f"{evaluation}.2"
    await unchanged(inside, evaluation, (first, 200, "cancelled"), (second, 200, "cancelled"))


async def test_a_spec_that_cannot_run_is_acknowledged_as_failed_at_once(inside: Inside) -> None:
    wrong = Spec(task=f"{TASKS}@missing", model="mockllm/model", max_failures=3)
    evaluation = (await inside.ledger.submit(wrong, "me")).evaluation_id
    assert await answered(inside, f"{evaluation}.plan") == (200, "failed", 1)
    await unchanged(inside, evaluation, (f"{evaluation}.plan", 200, "failed"))


async def test_a_failure_of_the_task_s_own_is_tried_again_in_the_same_push(inside: Inside) -> None:
    evaluation = await numbers(inside, [1], max_failures=3, how="raise")
    assert await answered(inside, f"{evaluation}.1") == (200, "failed", 3)


async def test_a_failure_late_in_its_push_is_delivered_again_as_long_as_it_has_tries_left(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = inside.settings.dispatch_deadline * 0.6

    def arrived_late(execution: str, headers: dict[str, str] | None, *, began: float, **more: Any) -> Push:
        return Push(execution, headers, began=began - late, **more)

    evaluation = await numbers(inside, [1], max_failures=2, how="raise")
    with monkeypatch.context() as patch:
        patch.setattr("app.web.tasks.Push", arrived_late)
        again = await inside.push(f"{evaluation}.1")
    assert (again.status_code, again.headers["content-type"]) == (409, "application/problem+json")
    assert "it broke" in again.json()["detail"]
    assert await answered(inside, f"{evaluation}.1") == (200, "failed", 2)
    await unchanged(inside, evaluation, (f"{evaluation}.1", 200, "failed"))


async def test_an_unknown_execution_is_acknowledged_to_the_queue_alone_and_told_as_an_error(
    inside: Inside, every_log: None
) -> None:
    nobody = f"{uuid4()}.1"
    with capture_logs() as logs:
        queue = await inside.push(nobody)
    person = await inside.client.post("/tasks/execute", json={"execution_id": nobody})
    assert (queue.status_code, queue.json()["state"]) == (200, None)
    assert (person.status_code, nobody in person.json()["detail"]) == (404, True)
    assert [line for line in logs if line["log_level"] == "error" and nobody in str(line)], logs


async def test_several_cloud_tasks_for_one_execution_are_owed_until_it_is_terminal(
    inside: Inside, tmp_path: Path
) -> None:
    flag, marks = tmp_path / "flag", tmp_path / "marks"
    how = {"hows": [f"fail:0:{marks}", f"until:{flag}"]}
    evaluation = await fanned_out(
        inside.ledger, Spec(task=f"{TASKS}@each", model="mockllm/model", task_args=how), [1, 2]
    )
    execution = f"{evaluation}.1"
    pushes = [inside.pushing(execution, f"cloud-task-{n}") for n in range(5)]
    async with asyncio.timeout(PATIENCE):
        while len(refused := [push.result() for push in pushes if push.done()]) < 4:
            await asyncio.sleep(0.02)
    assert {(answer.status_code, "inside holds it" in answer.json()["detail"]) for answer in refused} == {(409, True)}
    await inside.under_way(execution)
    assert await answered(inside, execution) == (409, None, None)

    async def delivered(name: str) -> tuple[int, str]:
        """As the queue does; what the ledger says the moment it is acknowledged."""
        while (answer := await inside.push(execution, name)).status_code == 409:
            await asyncio.sleep(0.01)
        ((state,),) = await inside.database.run(STATE, {"id": execution})
        return answer.status_code, state

    rest = [asyncio.create_task(delivered(f"cloud-task-{n}")) for n in range(4)]
    flag.touch()
    assert [await one for one in rest] == [(200, "succeeded")] * 4
    (first,) = [answer for push in pushes if (answer := await push) not in refused]
    assert (first.status_code, first.json()["state"], first.json()["attempt"]) == (200, "succeeded", 1)
    assert len((await inside.get(f"/executions/{execution}"))["attempts"]) == 1
    assert marks.read_text() == "called\n", "it ran once"
    await unchanged(inside, evaluation, (execution, 200, "succeeded"))


async def test_a_push_that_reaches_its_deadline_is_delivered_again(
    inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has finished a sample: the next attempt need only do the other."""
    late = inside.settings.dispatch_deadline - inside.settings.deadline_margin - BEFORE_DEADLINE

    def arrived_late(execution: str, headers: dict[str, str] | None, *, began: float, **more: Any) -> Push:
        return Push(execution, headers, began=began - late, **more)

    flag = tmp_path / "flag"
    evaluation = await numbers(inside, [1, 2], how=f"until:{flag}", sample=2)
    await inside.push(f"{await planned(inside.ledger, [1])}.1")  # children start at once from here on
    with monkeypatch.context() as patch:
        patch.setattr("app.web.tasks.Push", arrived_late)
        again = await inside.push(f"{evaluation}.1")
    assert (again.status_code, "deadline" in again.json()["detail"]) == (409, True)
    view = await inside.get(f"/executions/{evaluation}.1")
    assert (view["state"], view["failures"], view["crashes"]) == ("pending", 0, 0)
    flag.touch()
    assert await answered(inside, f"{evaluation}.1") == (200, "succeeded", 2)


async def test_a_worker_that_is_about_to_end_takes_nothing(inside: Inside) -> None:
    evaluation = await numbers(inside, [1])
    before = await inside.rows(evaluation)
    inside.app.state.leases.draining = True
    try:
        assert (await answered(inside, f"{evaluation}.1"))[0] == 409
    finally:
        inside.app.state.leases.draining = False
    assert await inside.rows(evaluation) == before
    assert await answered(inside, f"{evaluation}.1") == (200, "succeeded", 1)


async def test_a_lost_lease_is_delivered_again(inside: Inside) -> None:
    evaluation = await numbers(inside, [1], how="hang")
    execution = f"{evaluation}.1"
    pushed = inside.pushing(execution)
    await inside.under_way(execution)
    await taken_over(inside, execution)
    assert ((await pushed).status_code, "Another attempt" in (await pushed).json()["detail"]) == (409, True)


async def taken_over(inside: Inside, execution: str) -> None:
    """By another worker, which is sure that the lease is over."""
    ledger = Ledger(inside.database, lease=120, worker="another")
    async with asyncio.timeout(PATIENCE):
        while True:
            await inside.database.run(TAKE, {"id": execution})
            claim = await ledger.claim(execution, uuid4())
            if claim and claim.granted:  # else a renewal came in between
                return


async def test_without_the_database_nothing_is_acknowledged_and_the_queue_slows_down(inside: Inside) -> None:
    evaluation = await numbers(inside, [1])
    before = await inside.rows(evaluation)
    inside.proxy.refuse = True
    inside.proxy.cut("rst")
    try:
        refused = await inside.push(f"{evaluation}.1")
    finally:
        inside.proxy.refuse = False
    assert (refused.status_code, refused.json()["title"]) == (503, "Database unavailable")
    assert await inside.rows(evaluation) == before
    assert await answered(inside, f"{evaluation}.1") == (200, "succeeded", 1)


async def test_what_nobody_expects_is_no_acknowledgement_either(
    inside: Inside, monkeypatch: pytest.MonkeyPatch, every_log: None
) -> None:
    evaluation = await numbers(inside, [1])

    async def broken(*_: object) -> None:
        raise RuntimeError("a secret of ours")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(Ledger, "claim", broken)
        answer = await inside.push(f"{evaluation}.1")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert [line for line in logs if line["event"] == "unexpected error" and line["path"] == "/tasks/execute"]
    assert await answered(inside, f"{evaluation}.1") == (200, "succeeded", 1)

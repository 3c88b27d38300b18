"""Cancelling: pending work at once, running work within one renewal, no call of the model after that; what is finished
stays, and is reported."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import TASKS, spec
from tests.system.inside import PATIENCE, Inside, open_inside
from tests.system.scripted import AGENT, JUDGE, Model, scripted

INTERVAL = 0.5
NOTES = f"{TASKS.with_name('agents.py')}@notes"
EACH = f"{TASKS}@each"
SLOW = f"{TASKS}@slow"
RENEW = "/* ledger.renew */"


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("cancel"), renew_interval=INTERVAL) as inside:
        yield inside


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    async with scripted(turns=10**6) as model:
        yield model


async def cancel(inside: Inside, evaluation: str) -> tuple[int, str, int]:
    """Status, the evaluation's state, and how many executions ended at once."""
    answer = await inside.client.post(f"/evaluations/{evaluation}/cancel")
    return answer.status_code, answer.json()["state"], answer.json()["cancelled"]


def renewals(inside: Inside) -> int:
    return sum(RENEW in sql for sql in inside.proxy.executed)


async def states(inside: Inside, evaluation: str) -> list[str]:
    return [sample["state"] for sample in (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]]


async def reported(inside: Inside, evaluation: str) -> Any:
    """The evaluation, after its report."""
    answer = await inside.push(f"{evaluation}.report")
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    return await inside.get(f"/evaluations/{evaluation}")


async def test_pending_work_ends_at_once_running_work_within_a_renewal_and_what_is_finished_is_reported(
    inside: Inside,
) -> None:
    evaluation = await inside.planned(spec(task_args={"n": 4, "how": "hang", "sample": 2}))
    finished, running = f"{evaluation}.1", f"{evaluation}.2"
    assert (await inside.push(finished)).json()["state"] == "succeeded"
    (score,) = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"][:1]
    pushed = inside.pushing(running)
    await inside.under_way(running)

    lease, when_told, began = inside.app.state.leases._leases[running, 1], [], time.monotonic()
    lease.ended.add_done_callback(lambda _: when_told.append(renewals(inside)))
    assert await cancel(inside, evaluation) == (202, "running", 2)
    before = renewals(inside)
    assert await states(inside, evaluation) == ["succeeded", "running", "cancelled", "cancelled"]
    answer = await pushed
    seconds = time.monotonic() - began
    print(f"a running execution was cancelled after {seconds:.2f} s, renewed every {INTERVAL} s")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert [sent - before <= 1 for sent in when_told] == [True], "by the next renewal, if not by one that was under way"
    for n in (2, 3, 4):
        view = await inside.get(f"/executions/{evaluation}.{n}")
        assert (view["state"], view["failures"], view["crashes"]) == ("cancelled", 0, 0)

    view = await reported(inside, evaluation)
    assert view["state"] == "cancelled"
    assert view["samples"] == {"total": 4, "pending": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 3}
    assert view["results"]["completed_samples"] == 1
    assert Path(view["log"].removeprefix("file://")).is_file()
    samples = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]
    assert samples[0] == score
    assert await states(inside, evaluation) == ["succeeded", "cancelled", "cancelled", "cancelled"]


async def calls_told(inside: Inside, execution: str) -> int:
    progress = (await inside.get(f"/executions/{execution}"))["progress"]
    return int(progress["model_calls"]) if progress else 0


async def test_the_model_is_not_called_any_more(inside: Inside, model: Model) -> None:
    """Two agents that would never end by themselves; the judge is not asked about them either."""
    model.seconds = 0.05
    endless = spec(NOTES, checkpoint="off", epochs=2, **model.spec)
    evaluation = await inside.planned(endless)
    both = [f"{evaluation}.1", f"{evaluation}.2"]
    pushes = [inside.pushing(execution) for execution in both]
    async with asyncio.timeout(PATIENCE):  # Inspect tells of a call a little after it was made
        while min([await calls_told(inside, execution) for execution in both]) < 3:
            await asyncio.sleep(0.05)
    assert await cancel(inside, evaluation) == (202, "running", 0)
    for pushed in pushes:
        assert (await pushed).json()["state"] == "cancelled"
    calls = len(model.calls)
    assert (JUDGE, 0) not in model.calls

    model.turns = 1
    another = await inside.planned(spec(NOTES, checkpoint="off", **model.spec))
    assert (await inside.push(f"{another}.1")).json()["state"] == "succeeded"
    assert model.calls[calls:] == [(AGENT, 0), (AGENT, 1), (JUDGE, 0)], "whatever came meanwhile is of this one"
    for execution in both:
        view = await inside.get(f"/executions/{execution}")
        assert view["attempts"][0]["model_calls"] >= 3, "what it has spent is known"


async def test_what_a_cancelled_execution_had_finished_stays(inside: Inside) -> None:
    hows = {"hows": ["", "hang", ""]}
    evaluation = await inside.planned(spec(EACH, task_args=hows, samples_per_execution=3))
    pushed = inside.pushing(f"{evaluation}.1")
    async with asyncio.timeout(PATIENCE):
        while (await states(inside, evaluation)).count("succeeded") < 2:
            await asyncio.sleep(0.05)
    before = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]
    await cancel(inside, evaluation)
    assert (await pushed).json()["state"] == "cancelled"
    after = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]
    assert [sample["state"] for sample in after] == ["succeeded", "cancelled", "succeeded"]
    assert [after[0], after[2]] == [before[0], before[2]]
    view = await reported(inside, evaluation)
    assert (view["state"], view["results"]["completed_samples"]) == ("cancelled", 2)
    counted = view["samples"]
    assert (counted["total"], counted["succeeded"], counted["cancelled"]) == (3, 2, 1)


async def test_the_report_of_a_cancelled_evaluation_is_not_itself_cancelled(inside: Inside, tmp_path: Path) -> None:
    """It lasts for several renewals: its task takes that long to be loaded."""
    flag = tmp_path / "flag"
    flag.touch()
    evaluation = await inside.planned(spec(SLOW, task_args={"flag": str(flag)}, limit=2))
    assert (await inside.push(f"{evaluation}.1")).json()["state"] == "succeeded"
    assert await cancel(inside, evaluation) == (202, "running", 1)
    flag.unlink()
    inside.proxy.executed.clear()
    reporting = asyncio.create_task(reported(inside, evaluation))
    async with asyncio.timeout(PATIENCE):
        while sum(RENEW in sql for sql in inside.proxy.executed) < 3 and not reporting.done():
            await asyncio.sleep(0.05)
    flag.touch()
    view = await reporting
    assert (view["state"], view["results"]["completed_samples"]) == ("cancelled", 1)
    assert view["log"]


async def test_cancelling_again_or_after_the_end_is_harmless(inside: Inside) -> None:
    evaluation = await inside.planned(spec(task_args={"n": 2}))
    assert await cancel(inside, evaluation) == (202, "running", 2)
    await unchanged_by_cancelling(inside, evaluation, "running")
    assert (await reported(inside, evaluation))["state"] == "cancelled"
    await unchanged_by_cancelling(inside, evaluation, "cancelled")

    another = await inside.planned(spec(task_args={"n": 1}))
    await inside.push(f"{another}.1")
    assert (await reported(inside, another))["state"] == "succeeded"
    await unchanged_by_cancelling(inside, another, "succeeded")
    assert (await inside.get(f"/evaluations/{another}"))["cancel_requested"] is False


async def unchanged_by_cancelling(inside: Inside, evaluation: str, state: str) -> None:
    """All that the evaluation's own row may show is that it was locked."""
    before, view = await inside.rows(evaluation), await inside.get(f"/evaluations/{evaluation}")
    again = await asyncio.gather(*(cancel(inside, evaluation) for _ in range(3)))
    assert again == [(202, state, 0)] * 3
    assert [row for *_, row in await inside.rows(evaluation)] == [row for *_, row in before]
    assert await inside.get(f"/evaluations/{evaluation}") == view


async def test_cancelling_while_the_plan_runs_leaves_nothing_to_run(inside: Inside, tmp_path: Path) -> None:
    never = {"flag": f"{tmp_path}/flag"}
    submitted = await inside.client.post("/evaluations", json=spec(SLOW, task_args=never))
    evaluation = submitted.json()["id"]
    plan = f"{evaluation}.plan"
    pushed = inside.pushing(plan)
    await inside.child(plan)
    assert await cancel(inside, evaluation) == (202, "running", 0)
    answer = await pushed
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    view = await reported(inside, evaluation)
    assert (view["state"], view["samples"]["total"], view["results"]) == ("cancelled", 0, None)
    assert view["error"]["error_class"] == "cancelled"


async def test_a_plan_that_was_quicker_than_its_cancellation_fans_out_to_nothing(
    inside: Inside, tmp_path: Path
) -> None:
    """It is as good as ended when the wish comes, and learns of it by its own settle."""
    flag = tmp_path / "flag"
    submitted = await inside.client.post("/evaluations", json=spec(SLOW, task_args={"flag": str(flag)}))
    evaluation = submitted.json()["id"]
    pushed = inside.pushing(f"{evaluation}.plan")
    await inside.child(f"{evaluation}.plan")
    away = inside.proxy.cut_at(RENEW, "before", "fin", times=10**6)
    try:
        await cancel(inside, evaluation)
        flag.touch()
        answer = await pushed
    finally:
        away.remove()
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    view = await reported(inside, evaluation)
    assert (view["state"], view["samples"]["total"]) == ("cancelled", 0)

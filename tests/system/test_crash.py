"""Workers, children and the forkserver are killed: an interrupted attempt each, with the reason in words, and no more."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from sqlalchemy import text

from app.ledger import Ledger
from app.spec import Spec
from tests.system.conftest import TASKS, fanned_out, planned, spec
from tests.system.inside import PATIENCE, Inside, open_inside
from tests.system.worker import push, working

EACH = f"{TASKS}@each"
LETHAL = f"{TASKS}@lethal"
MEMORY = 64 * 2**20
SHORT_OF_MEMORY = "it was killed by SIGKILL, perhaps for want of memory"
LEASE: dict[str, Any] = {"lease": 4, "statement_timeout": 1, "renew_interval": 0.5}
"""Of a worker that is to be lost: so long is waited for."""

ATTEMPTS = text("""/* test.attempts */
SELECT outcome, error ->> 'error_class' AS class, split_part(error ->> 'message', E'\n', 1) AS message
FROM execution_attempts WHERE execution_id = :id ORDER BY attempt  -- what the child had printed follows in the message
""")


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("crash")) as inside:
        yield inside


@pytest.fixture
def memory_cgroup() -> Iterator[str]:
    """Where the kernel ends who uses more than `MEMORY`. Empty where none can be made: the kill is acted then."""
    folder = _limited("/sys/fs/cgroup/memory", "memory.limit_in_bytes") or _limited("/sys/fs/cgroup", "memory.max")
    yield str(folder or "")
    if folder:
        folder.rmdir()


def _limited(root: str, limit: str) -> Path | None:
    folder = Path(root, f"proctor-test-{uuid4().hex}")
    try:
        folder.mkdir()
    except OSError:
        return None
    try:
        with (folder / limit).open("r+") as file:  # it is there, or this is no cgroup that can be limited
            file.write(str(MEMORY))
    except OSError:
        folder.rmdir()
        return None
    return folder


async def counted(inside: Inside, execution: str) -> tuple[str, int, int, int]:
    """State, attempt, failures and crashes."""
    view = await inside.get(f"/executions/{execution}")
    return view["state"], view["attempt"], view["failures"], view["crashes"]


async def attempts(inside: Inside, execution: str) -> list[tuple[str, str | None, str | None]]:
    return [tuple(row) for row in await inside.database.run(ATTEMPTS, {"id": execution})]


async def each(inside: Inside, *hows: str) -> UUID:
    """One execution of so many samples."""
    samples = list(range(1, len(hows) + 1))
    return await fanned_out(
        inside.ledger, Spec(task=EACH, model="mockllm/model", task_args={"hows": list(hows)}), samples
    )


async def test_a_killed_worker_is_taken_over_from_once_its_leases_are_over(inside: Inside, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    evaluation = await planned(inside.ledger, [1], [1], how=f"until:{flag}")
    both = [f"{evaluation}.1", f"{evaluation}.2"]
    async with working(tmp_path, database_url=inside.url, worker="lost", **LEASE) as worker:
        pushes = [asyncio.create_task(push(worker, execution)) for execution in both]
        await inside.under_way(*both)
        below = worker.below()
        await worker.kill()
        assert not psutil.wait_procs(below, timeout=PATIENCE)[1], "nothing outlives it"
        await asyncio.wait(pushes)
        assert all(isinstance(pushed.exception(), Exception) for pushed in pushes), "nobody has been answered"
    over = [(await inside.get(f"/executions/{execution}"))["lease_expires_at"] for execution in both]
    ends = [asyncio.create_task(inside.to_the_end(execution)) for execution in both]
    await inside.under_way(*both)
    for execution in both:
        assert await counted(inside, execution) == ("running", 2, 0, 1)
    flag.touch()
    for execution, end, lease in zip(both, ends, over, strict=True):
        assert ((await end).status_code, (await end).json()["attempt"]) == (200, 2)
        begun = (await inside.get(f"/executions/{execution}"))["attempts"][1]["started_at"]
        assert datetime.fromisoformat(begun) >= datetime.fromisoformat(lease)
        reason = "The lease of lost ran out: the worker or its child was lost."
        assert await attempts(inside, execution) == [
            ("interrupted", "infrastructure", reason),
            ("succeeded", None, None),
        ]


async def test_the_neighbours_of_a_child_that_is_killed_for_its_memory_go_on(
    inside: Inside, memory_cgroup: str, tmp_path: Path
) -> None:
    print("killed by the kernel" if memory_cgroup else "no memory cgroup can be made here: it kills itself")
    flag = tmp_path / "flag"
    neighbours = await planned(inside.ledger, [1], [1], how=f"until:{flag}")
    greedy = await planned(inside.ledger, [1], how=f"memory:{memory_cgroup}")
    beside = [inside.pushing(f"{neighbours}.{n}") for n in (1, 2)]
    await inside.under_way(f"{neighbours}.1", f"{neighbours}.2")
    killed = await inside.push(f"{greedy}.1")
    assert (killed.status_code, SHORT_OF_MEMORY in killed.json()["detail"]) == (409, True)
    assert await counted(inside, f"{greedy}.1") == ("pending", 1, 0, 1)
    ((outcome, whose, why),) = await attempts(inside, f"{greedy}.1")
    assert (outcome, whose, SHORT_OF_MEMORY in str(why)) == ("interrupted", "infrastructure", True)
    flag.touch()
    for n, pushed in enumerate(beside, 1):
        assert ((await pushed).status_code, (await pushed).json()["attempt"]) == (200, 1)
        assert await counted(inside, f"{neighbours}.{n}") == ("succeeded", 1, 0, 0)


async def test_a_killed_forkserver_interrupts_each_of_its_children_once_and_the_worker_goes_on(
    inside: Inside, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await planned(inside.ledger, [1], [1], [1], how=f"until:{flag}")
    all_three = [f"{evaluation}.{n}" for n in (1, 2, 3)]
    pushes = [inside.pushing(execution) for execution in all_three]
    children = await inside.under_way(*all_three)
    forkserver = children[0].parent()
    assert forkserver
    forkserver.kill()
    for execution, pushed in zip(all_three, pushes, strict=True):
        answer = await pushed
        assert (answer.status_code, "its forkserver died" in answer.json()["detail"]) == (409, True)
        assert await counted(inside, execution) == ("pending", 1, 0, 1)
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]
    flag.touch()
    for answer in await asyncio.gather(*map(inside.push, all_three)):
        assert (answer.status_code, answer.json()["attempt"]) == (200, 2)
    for execution in all_three:
        interrupted = ("interrupted", "infrastructure", "its forkserver died")
        assert await attempts(inside, execution) == [interrupted, ("succeeded", None, None)]


async def test_three_losses_of_whatever_kind_without_progress_are_a_failure_with_that_as_its_reason(
    inside: Inside, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await inside.planned(spec(task_args={"n": 1, "how": f"kill-until:{tmp_path}/mark:{flag}"}))
    execution = f"{evaluation}.1"
    assert (await inside.push(execution)).status_code == 409
    pushed = inside.pushing(execution)
    (await inside.child(execution)).kill()
    assert (await pushed).status_code == 409
    assert await counted(inside, execution) == ("pending", 2, 0, 2)
    # a worker that is lost as soon as it has claimed: from here on it says nothing
    gone = await Ledger(inside.database, lease=0.01, worker="gone").claim(execution, uuid4())
    assert gone
    assert gone.granted

    answer = await inside.to_the_end(execution)
    assert (answer.status_code, answer.json()["state"], answer.json()["attempt"]) == (200, "failed", 4)
    assert "lost 3 times without progress" in answer.json()["message"]
    found = await attempts(inside, execution)
    assert [outcome for outcome, *_ in found] == ["interrupted"] * 3 + ["failed"]
    assert {whose for _, whose, _ in found} == {"infrastructure"}
    await inside.push(f"{evaluation}.report")
    view = await inside.get(f"/evaluations/{evaluation}")
    assert (view["state"], "lost 3 times" in view["error"]["message"]) == ("failed", True)

    flag.touch()
    retried = await inside.client.post(f"/evaluations/{evaluation}/retry")
    assert (retried.status_code, retried.json()["executions"]) == (202, 1)
    assert await counted(inside, execution) == ("pending", 4, 0, 0)
    assert (await inside.push(execution)).json()["state"] == "succeeded"
    assert (await inside.push(f"{evaluation}.report")).status_code == 200
    assert (await inside.get(f"/evaluations/{evaluation}"))["state"] == "succeeded"


async def test_losses_before_a_sample_that_ended_do_not_count(inside: Inside, tmp_path: Path) -> None:
    """Two, then a sample, then two more: four losses, and never three of them without progress."""
    first, second = tmp_path / "first", tmp_path / "second"
    evaluation = await each(inside, f"until:{first}", f"until:{second}")
    execution = f"{evaluation}.1"
    for losses in (1, 2):
        await kill_child(inside, execution)
        assert (await counted(inside, execution))[3] == losses
    first.touch()
    pushed = inside.pushing(execution)
    async with asyncio.timeout(PATIENCE):
        while (await counted(inside, execution))[3] != 0:
            await asyncio.sleep(0.05)
    for child in await inside.under_way(execution):
        child.kill()
    assert (await pushed).status_code == 409
    await kill_child(inside, execution)
    assert await counted(inside, execution) == ("pending", 4, 0, 2)
    second.touch()
    answer = await inside.push(execution)
    assert (answer.status_code, answer.json()["state"], answer.json()["attempt"]) == (200, "succeeded", 5)
    assert await counted(inside, execution) == ("succeeded", 5, 0, 0)
    samples = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]
    assert [sample["attempt"] for sample in samples] == [3, 5], "what had ended was not run again"


async def kill_child(inside: Inside, execution: str) -> None:
    pushed = inside.pushing(execution)
    (await inside.child(execution)).kill()
    answer = await pushed
    assert (answer.status_code, SHORT_OF_MEMORY in answer.json()["detail"]) == (409, True), answer.text


async def test_a_plan_that_takes_its_process_with_it_fails_the_evaluation_and_can_be_retried(
    inside: Inside, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    lethal = Spec(task=LETHAL, model="mockllm/model", task_args={"flag": str(flag)})
    evaluation = (await inside.ledger.submit(lethal, "me")).evaluation_id
    plan = f"{evaluation}.plan"
    assert [(await inside.push(plan)).status_code for _ in range(4)] == [409, 409, 409, 200]
    assert (await inside.push(f"{evaluation}.report")).status_code == 200
    view = await inside.get(f"/evaluations/{evaluation}")
    assert (view["state"], view["error"]["error_class"]) == ("failed", "infrastructure")
    assert "lost 3 times without progress" in view["error"]["message"]
    flag.touch()
    assert (await inside.client.post(f"/evaluations/{evaluation}/retry")).status_code == 202
    assert (await inside.push(plan)).json()["state"] == "succeeded"
    assert (await inside.get(f"/evaluations/{evaluation}"))["samples"]["pending"] == 4

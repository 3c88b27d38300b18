"""Work goes on in the middle of a sample: what a lost worker costs is counted in calls of the model."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest
from inspect_ai.log import list_eval_logs
from sqlalchemy import text

from app.artifacts import Artifacts
from app.database.session import Database
from app.evaluations.read import Reader
from app.ledger import Ledger
from app.runner.checkpoint import find_restic
from app.spec import Spec
from app.versions import IMAGE, Mixture
from tests.system.conftest import TASKS, fanned_out, planned
from tests.system.scripted import AGENT, JUDGE, Model, scripted
from tests.system.worker import Worker, push, working

STEPS = f"{TASKS.with_name('agents.py')}@steps"
NOTES = f"{TASKS.with_name('agents.py')}@notes"
QUICK: dict[str, Any] = {"lease": 2, "statement_timeout": 1, "renew_interval": 0.5}
RESULT = text("SELECT attempt, note, error, scores, usage, transcript FROM sample_results")
ATTEMPTS = text("SELECT attempt, outcome FROM execution_attempts WHERE execution_id = :id ORDER BY attempt")

pytestmark = pytest.mark.skipif(
    find_restic() is None, reason="restic 0.18 or newer is missing: `make setup` installs it where apt has one"
)


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    async with scripted(turns=4) as model:
        yield model


async def agent(ledger: Ledger, model: Model, **fields: Any) -> UUID:
    """One sample of an agent that saves its state after each turn."""
    spec = Spec(**{"task": STEPS, "checkpoint": "turn", "max_failures": 1, **model.spec, **fields})
    return await fanned_out(ledger, spec, ["a"])


async def saved(worker: Worker, evaluation: UUID, number: int, attempt: int = 1) -> None:
    """Returns when the store has that checkpoint of that attempt, and it can be resumed from."""
    folder = Path(worker.artifacts, str(evaluation), f"{evaluation}.1", str(attempt))
    with anyio.fail_after(60):
        while not ((folder / "checkpoint.json").exists() and list(folder.glob(f"**/ckpt-{number:05}.json"))):
            await anyio.sleep(0.02)


async def to_the_end(worker: Worker, evaluation: UUID) -> dict[str, Any]:
    """Pushes until it is over, as the queue does."""
    with anyio.fail_after(120):
        while (answer := await push(worker, f"{evaluation}.1")).status_code == 409:
            await anyio.sleep(0.1)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def once_each(turns: range) -> Counter[tuple[str, int]]:
    return Counter([*((AGENT, turn) for turn in turns), (JUDGE, 0)])


async def test_a_killed_worker_costs_at_most_one_turn(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    evaluation = await agent(ledger, model)
    model.hold.add((AGENT, 2))
    async with working(tmp_path, database_url=database_url, **QUICK) as worker:
        pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
        await model.called(AGENT, 2)
        await saved(worker, evaluation, 2)
        await worker.kill()
        await asyncio.wait({pushed})
        pushed.exception()
    model.hold.clear()
    async with working(tmp_path, database_url=database_url, **QUICK) as worker:
        assert (await to_the_end(worker, evaluation))["state"] == "succeeded"
        left = await Artifacts(f"file://{worker.artifacts}").names(f"file://{worker.artifacts}")
    assert Counter(model.calls) == once_each(range(5)) + Counter({(AGENT, 2): 1}), "the turn it was killed in, twice"
    (row,) = await database.run(RESULT)
    assert (row.attempt, row.error, row.scores["model_graded_qa"]["value"]) == (2, None, "C")
    assert row.note == "Attempt 2 went on from the checkpoint of attempt 1."
    (usage,) = row.usage.values()
    assert usage["total_tokens"] == 15 * 6, "of both attempts, less the call that was never answered"
    assert not [name for name in left if "checkpoint" in name], "those of what is over are deleted"
    assert row.transcript.removeprefix(f"file://{worker.artifacts}/") in left, "logs are kept"
    assert [log.name for log in list_eval_logs(worker.artifacts)] == [row.transcript], (
        "and nothing else is taken for one"
    )
    assert list_eval_logs(f"{worker.artifacts}/{evaluation}") == [], "the evaluation has no report yet"


async def test_a_sample_that_a_deploy_has_cut_in_two_is_of_both_versions(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    evaluation = await agent(ledger, model)
    model.hold.add((AGENT, 2))
    async with working(tmp_path, database_url=database_url, image="sha256:old", **QUICK) as worker:
        pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
        await saved(worker, evaluation, 2)
        await worker.kill()  # before it could tell the ledger what it was
        await asyncio.wait({pushed})
        pushed.exception()
    model.hold.clear()
    async with working(tmp_path, database_url=database_url, image="sha256:new", **QUICK) as worker:
        await to_the_end(worker, evaluation)
    reader = Reader(database)
    first, second = (await reader.execution(f"{evaluation}.1")).attempts
    assert first.versions is None
    assert second.versions
    assert second.versions[IMAGE] == "sha256:new"
    assert second.earlier_versions == [second.versions | {IMAGE: "sha256:old"}]
    assert (await reader.evaluation(evaluation)).mixed_versions == [
        Mixture(name=IMAGE, samples={"sha256:new": 1, "sha256:old": 1}, flagged=False)
    ]


async def test_files_of_the_sandbox_come_along(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    evaluation = await agent(ledger, model)
    model.hold.add((AGENT, 3))
    async with working(tmp_path, database_url=database_url, **QUICK) as worker:
        pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
        await saved(worker, evaluation, 3)
        await worker.kill()
        await asyncio.wait({pushed})
        pushed.exception()
    model.hold.clear()
    async with working(tmp_path, database_url=database_url, **QUICK) as worker:
        await to_the_end(worker, evaluation)
    last = [message for message in model.seen[-2] if message["role"] == "tool"][-1]
    assert last["content"].split() == ["0", "1", "2", "3"], "what each turn wrote, the last of them in another worker"


async def test_a_crash_in_the_judge_runs_only_the_judge_again(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    evaluation = await agent(ledger, model)
    model.hold.add((JUDGE, 0))
    async with working(tmp_path, database_url=database_url, **QUICK) as worker:
        pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
        await model.called(JUDGE, 0)
        await saved(worker, evaluation, 5)
        worker.forkserver().children()[0].kill()
        assert (await pushed).status_code == 409
        model.hold.clear()
        assert (await to_the_end(worker, evaluation))["state"] == "succeeded"
    assert Counter(model.calls) == once_each(range(5)) + Counter({(JUDGE, 0): 1})


async def test_a_sample_as_long_as_three_pushes_runs_every_turn_once(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    """Times are scaled; a turn takes as long as it takes. An attempt stops between two turns, so none is paid for twice."""
    model.turns, model.seconds = 9, 2.5
    evaluation = await agent(ledger, model, task=NOTES)
    async with working(
        tmp_path, database_url=database_url, dispatch_deadline=40, deadline_margin=28, **QUICK
    ) as worker:
        await push(worker, f"{await planned(ledger, [1])}.1")  # children start at once from here on
        told = await to_the_end(worker, evaluation)
    assert told["state"] == "succeeded"
    assert Counter(model.calls) == once_each(range(10))
    attempts = await database.run(ATTEMPTS, {"id": f"{evaluation}.1"})
    assert len(attempts) >= 3
    assert [a.outcome for a in attempts] == ["interrupted"] * (len(attempts) - 1) + ["succeeded"]


async def test_an_attempt_that_reaches_no_checkpoint_fails_at_its_deadline_with_that_as_its_reason(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    model.hold.add((AGENT, 0))
    evaluation = await agent(ledger, model, checkpoint="off")
    async with working(
        tmp_path, database_url=database_url, dispatch_deadline=15, deadline_margin=10, **QUICK
    ) as worker:
        await push(worker, f"{await planned(ledger, [1])}.1")  # children start at once from here on
        told = await to_the_end(worker, evaluation)
    assert (told["state"], told["attempt"]) == ("failed", 1)
    assert "no checkpoint to resume from (the spec says `checkpoint: off`)" in told["message"]


async def test_without_checkpoints_a_sample_begins_again_and_says_so(
    database_url: str, database: Database, ledger: Ledger, model: Model, tmp_path: Path
) -> None:
    evaluation = await agent(ledger, model, checkpoint="off")
    model.hold.add((AGENT, 2))
    async with working(tmp_path, database_url=database_url, **QUICK) as worker:
        pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
        await model.called(AGENT, 2)
        worker.forkserver().children()[0].kill()
        assert (await pushed).status_code == 409
        model.hold.clear()
        assert (await to_the_end(worker, evaluation))["state"] == "succeeded"
        (told,) = worker.logged("starting over")
    assert Counter(model.calls) == once_each(range(5)) + Counter((AGENT, turn) for turn in range(3))
    (row,) = await database.run(RESULT)
    assert row.note == "Attempt 1 was interrupted; attempt 2 began again: the spec says `checkpoint: off`."
    assert told["note"] == row.note

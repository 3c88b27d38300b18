"""One push at a time, on the executor itself: what ends an attempt, and what the ledger then says."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app.errors import DatabaseUnavailable
from app.evaluations.read import ExecutionView
from app.execution import Answer, Push
from app.ledger import Settlement
from app.main import open_services
from app.runner.messages import Failure, Job
from app.runner.supervisor import Child
from app.saved import COMMITTED
from app.settings import load
from app.spec import Spec
from app.versions import IMAGE, PRICES, TASK_VERSION, Mixture
from app.web.state import Services
from tests.conftest import own_database
from tests.ledger.factories import SPEC, claim, scored, settle, submitted
from tests.system.conftest import TASKS, fanned_out, planned

PATIENCE = 60


@pytest.fixture(scope="module")
async def services(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    """With leases that are renewed quickly and a queue that nobody listens to: pushes are made by hand. One for all
    tests, for its forkserver takes seconds to warm."""
    artifacts = f"file://{tmp_path_factory.mktemp('artifacts')}"
    quick = {"renew_interval": 0.1, "queue_endpoint": "127.0.0.1:9", "queue_patience": 0.1}
    async with (
        own_database(postgres) as url,
        open_services(load(database_url=url, artifacts=artifacts, **quick)) as services,
    ):
        yield services


async def push(services: Services, execution: str) -> Answer:
    return await services.executor.execute(Push(execution, alone=True))


@asynccontextmanager
async def under_way(services: Services, execution: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """The push as a task, and the child that hangs in it."""
    started: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
    run = services.executor.supervisor.run

    @asynccontextmanager
    async def announced(job: Job) -> AsyncIterator[Child]:
        async with run(job) as child:
            started.set_result(child)
            yield child

    monkeypatch.setattr(services.executor.supervisor, "run", announced)
    task = asyncio.create_task(push(services, execution))
    child = await asyncio.wait_for(started, PATIENCE)
    yield task, child
    assert child.pid
    assert not psutil.pid_exists(child.pid)


async def view(services: Services, execution: str) -> ExecutionView:
    return await services.reader.execution(execution)


async def test_a_hang_ends_at_the_deadline_with_that_as_its_reason(services: Services) -> None:
    evaluation = await planned(services.executor.ledger, [1], how="hang")
    short = services.settings.model_copy(update={"dispatch_deadline": 3.0, "deadline_margin": 1.0})
    answer = await replace(services.executor, settings=short).execute(Push(f"{evaluation}.1", alone=True))
    assert (answer.kind, answer.state) == ("terminal", "failed")
    assert "deadline" in answer.message
    error = (await view(services, f"{evaluation}.1")).error
    assert error
    assert error["error_class"] == "limit"


async def test_a_worker_that_is_stopped_releases_what_it_holds(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = await planned(services.executor.ledger, [1], how="hang")
    async with under_way(services, f"{evaluation}.1", monkeypatch) as (task, _):
        task.cancel()
        answer = await task
    assert (answer.kind, answer.state) == ("again", "pending")
    execution = await view(services, f"{evaluation}.1")
    assert (execution.state, execution.failures, execution.crashes) == ("pending", 0, 0)
    assert [a.outcome for a in execution.attempts] == ["interrupted"]


async def test_a_worker_that_is_stopped_gives_back_what_it_is_about_to_begin(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a child to stop: its checkpoint is being fetched, say, or the forkserver is cold."""
    executor, evaluation = services.executor, await planned(services.executor.ledger, [1], how="hang")
    preparing = asyncio.Event()

    async def slow(*_: object) -> None:
        preparing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(executor.saved, "left_by", slow)
    task = asyncio.create_task(push(services, f"{evaluation}.1"))
    await asyncio.wait_for(preparing.wait(), PATIENCE)
    await asyncio.wait_for(executor.leases.drain(), PATIENCE)
    executor.leases.draining = False  # it is the other tests' too
    execution = await view(services, f"{evaluation}.1")
    assert (execution.state, execution.failures, execution.crashes) == ("pending", 0, 0)
    assert [(a.outcome, a.error and a.error["message"]) for a in execution.attempts] == [
        ("interrupted", "The worker was told to stop.")
    ]
    assert (await asyncio.wait_for(task, PATIENCE)).kind == "again"


async def test_what_is_claimed_while_the_worker_stops_is_given_back_without_a_child(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, evaluation = services.executor, await planned(services.executor.ledger, [1], how="hang")
    claiming, may_go_on, claim = asyncio.Event(), asyncio.Event(), executor.ledger.claim

    async def slow(*given: Any) -> Any:
        claiming.set()
        await may_go_on.wait()
        return await claim(*given)

    monkeypatch.setattr(executor.ledger, "claim", slow)
    monkeypatch.setattr(executor.supervisor, "run", None)
    task = asyncio.create_task(push(services, f"{evaluation}.1"))
    await asyncio.wait_for(claiming.wait(), PATIENCE)
    draining = asyncio.create_task(executor.leases.drain())
    may_go_on.set()
    await asyncio.wait_for(draining, PATIENCE)
    executor.leases.draining = False  # it is the other tests' too
    execution = await view(services, f"{evaluation}.1")
    assert (execution.state, [a.outcome for a in execution.attempts]) == ("pending", ["interrupted"])
    assert (await asyncio.wait_for(task, PATIENCE)).kind == "again"


async def test_a_report_deletes_checkpoints_before_it_ends_its_evaluation(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards they may be a retry's, which is at work already."""
    executor, evaluation = services.executor, await planned(services.executor.ledger, [1])
    assert (await push(services, f"{evaluation}.1")).state == "succeeded"
    left = executor.artifacts.url(str(evaluation), f"{evaluation}.1", 9, COMMITTED)
    await executor.artifacts.write(left, b"[]")
    settle, seen = executor.ledger.settle, []

    async def looking(*given: Any) -> Any:
        seen.append(await executor.artifacts.names(left.rpartition("/")[0]))
        return await settle(*given)

    monkeypatch.setattr(executor.ledger, "settle", looking)
    assert (await push(services, f"{evaluation}.report")).kind == "terminal"
    assert seen == [[]]


async def test_an_attempt_that_was_taken_over_is_killed_and_records_nothing(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = await planned(services.executor.ledger, [1], how="hang")
    async with under_way(services, f"{evaluation}.1", monkeypatch) as (task, _):
        await services.database.run(text("UPDATE task_executions SET attempt = attempt + 1 WHERE state = 'running'"))
        answer = await asyncio.wait_for(task, PATIENCE)
    assert answer.kind == "again"
    assert (await view(services, f"{evaluation}.1")).state == "running"


async def test_a_cancelled_attempt_stops_and_is_over(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = await planned(services.executor.ledger, [1], [2], how="hang")
    async with under_way(services, f"{evaluation}.1", monkeypatch) as (task, _):
        await services.executor.ledger.cancel(evaluation)
        answer = await asyncio.wait_for(task, PATIENCE)
    assert (answer.kind, answer.state) == ("terminal", "cancelled")
    assert (await push(services, f"{evaluation}.2")).state == "cancelled"


async def test_samples_that_have_their_score_are_not_run_again(
    services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await planned(services.executor.ledger, [1, 2, 3], how=f"until:{flag}", sample=2)
    async with under_way(services, f"{evaluation}.1", monkeypatch) as (task, child):
        async with asyncio.timeout(PATIENCE):
            while len(kept := await transcripts(services, evaluation)) < 2:
                await asyncio.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        assert (await asyncio.wait_for(task, PATIENCE)).kind == "again"
    monkeypatch.undo()
    flag.touch()
    assert (await push(services, f"{evaluation}.1")).state == "succeeded"
    after = await transcripts(services, evaluation)
    assert set(kept) == {1, 3}
    assert {id: after[id] for id in kept} == kept
    execution = await view(services, f"{evaluation}.1")
    assert [a.outcome for a in execution.attempts] == ["interrupted", "succeeded"]
    assert execution.attempts[0].error
    assert "SIGKILL" in execution.attempts[0].error["message"]
    assert execution.crashes == 0  # a sample has come in since


async def transcripts(services: Services, evaluation: UUID) -> dict[int | str, str]:
    page = await services.reader.samples(evaluation)
    return {sample.id: sample.transcript for sample in page.samples if sample.transcript}


async def test_a_mistake_of_the_worker_s_own_is_an_interrupted_attempt_and_not_for_ever(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = await planned(services.executor.ledger, [1])

    async def broken(*_: object) -> None:
        raise RuntimeError("the artifact store is a teapot")

    monkeypatch.setattr(services.executor.artifacts, "ship", broken)
    answers = [await push(services, f"{evaluation}.1") for _ in range(4)]
    assert [a.kind for a in answers] == ["again", "again", "again", "terminal"]
    assert "teapot" in answers[-1].message


async def test_a_report_of_a_failed_plan_says_why_the_plan_failed(services: Services) -> None:
    ledger = services.executor.ledger
    evaluation = (await ledger.submit(Spec(task="t", model="m"), "me")).evaluation_id
    claim = await ledger.claim(f"{evaluation}.plan", uuid4())
    assert claim
    error = Failure(error_class="evaluation", message="no such dataset", final=True)
    await ledger.settle(claim.execution_id, claim.attempt, Settlement("failed", error=error))
    await push(services, f"{evaluation}.report")
    found = await services.reader.evaluation(evaluation)
    assert found.state == "failed"
    assert found.error
    assert found.error["message"] == "no such dataset"


async def test_an_unknown_execution_is_told_so(services: Services) -> None:
    assert (await push(services, "nobody.1")).kind == "unknown"


@pytest.mark.usefixtures("every_log")
async def test_results_that_a_deploy_has_mixed_say_so(services: Services, tmp_path: Path) -> None:
    """Two workers, of two versions, on one evaluation."""
    version, ledger = tmp_path / "version", services.executor.ledger
    old, new = [
        replace(services.executor, settings=services.settings.model_copy(update={"image": image}))
        for image in ("sha256:old", "sha256:new")
    ]
    version.write_text("7")
    spec = Spec(task=f"{TASKS}@versioned", model="mockllm/model", task_args={"file": str(version)})
    evaluation = (await ledger.submit(spec, "me")).evaluation_id
    for part, executor, task_version in ((".plan", old, "7"), (".1", old, "7"), (".2", old, "7"), (".3", new, "8")):
        version.write_text(task_version)
        assert (await executor.execute(Push(f"{evaluation}{part}", alone=True))).state == "succeeded"
    differing = [
        Mixture(name=TASK_VERSION, samples={"7": 2, "8": 1}, flagged=True),
        Mixture(name=IMAGE, samples={"sha256:new": 1, "sha256:old": 2}, flagged=False),
    ]
    assert (await services.reader.evaluation(evaluation)).mixed_versions == differing, "and while it runs"
    with capture_logs() as logs:
        assert (await new.execute(Push(f"{evaluation}.report", alone=True))).state == "succeeded"
    assert [e["differing"][TASK_VERSION] for e in logs if e["event"] == "results of mixed versions"] == [
        {"7": 2, "8": 1}
    ]
    ended = await services.reader.evaluation(evaluation)
    assert (ended.state, ended.mixed_versions) == ("succeeded", differing)
    (attempt,) = (await view(services, f"{evaluation}.3")).attempts
    assert attempt.versions
    assert attempt.versions.items() >= {"inspect_ai": "0.3.285", TASK_VERSION: "8", IMAGE: "sha256:new"}.items()
    assert attempt.versions.keys() == {"python", "proctor", "inspect_ai", TASK_VERSION, IMAGE, PRICES}


@pytest.mark.parametrize("reached", ["plan", "1", "report"])
async def test_a_stored_spec_that_this_version_does_not_take_ends_its_evaluation(
    services: Services, reached: str
) -> None:
    """At once, with the reason, however far it had come; and what it was stays to be read."""
    ledger, reader = services.executor.ledger, services.reader
    evaluation = await submitted(ledger) if reached == "plan" else await fanned_out(ledger, SPEC, [1])
    if reached == "report":
        await settle(ledger, await claim(ledger, f"{evaluation}.1"), samples=[scored(1)])
    renamed = (
        'UPDATE evaluations SET spec = spec - \'model\' || \'{"modell": "m", "max_failures": "x"}\' WHERE id = :id'
    )
    await services.database.run(text(renamed), {"id": evaluation})
    parts = (reached, "report") if reached != "report" else ("report",)
    for part in parts:
        answer = await push(services, f"{evaluation}.{part}")
        assert (answer.kind, answer.state) == ("terminal", "failed")
        assert "does not take the stored spec: model: Field required; max_failures: Input should be" in answer.message
        assert "modell: Extra inputs are not permitted" in answer.message
        assert (await push(services, f"{evaluation}.{part}")).kind == "terminal"
        explained = (await reader.execution(f"{evaluation}.{part}")).explanation[0]
        assert "(evaluation): This version of Proctor does not take the stored spec" in explained
    seen = await reader.evaluation(evaluation)
    assert (seen.state, seen.spec["modell"]) == ("failed", "m")
    assert seen.error
    assert seen.error["error_class"] == "evaluation"
    assert seen.id in [one.id for one in (await reader.evaluations()).evaluations]
    assert len((await reader.samples(evaluation)).samples) == (reached != "plan")
    assert "does not take the stored spec" in (await reader.explanation(evaluation)).explanation[0]


async def test_the_plan_of_an_earlier_version_is_reported_too(services: Services) -> None:
    """It had another name in the store."""
    spec = Spec(task=f"{TASKS}@numbers", model="mockllm/model", task_args={"n": 1})
    evaluation = (await services.executor.ledger.submit(spec, "me")).evaluation_id
    assert (await push(services, f"{evaluation}.plan")).state == "succeeded"
    store = services.executor.artifacts
    now, before = (store.url(str(evaluation), f"{evaluation}.plan", 1, n) for n in ("plan.header", "plan.eval"))
    await store.write(before, await store.read(now))
    await store.delete([now])
    assert (await push(services, f"{evaluation}.1")).state == "succeeded"
    assert (await push(services, f"{evaluation}.report")).state == "succeeded"
    assert (await services.reader.evaluation(evaluation)).state == "succeeded"


async def test_a_database_that_goes_away_after_the_settle_makes_no_recorded_outcome_undone(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = services.executor.ledger
    evaluation = (await ledger.submit(SPEC, "me")).evaluation_id

    async def away(*_: object) -> None:
        raise DatabaseUnavailable("It is away.")

    monkeypatch.setattr(ledger, "take_due", away)
    with capture_logs() as logs:
        answer = await services.executor.execute(Push(f"{evaluation}.plan"))
    assert answer.kind == "terminal"
    assert not [entry for entry in logs if "could not be settled" in entry["event"]]
    assert [entry["log_level"] for entry in logs if "waits for the sweeper" in entry["event"]] == ["warning"]

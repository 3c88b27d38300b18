"""`fail_on_error`: as soon as more samples have errored than it allows, no further sample starts, and the evaluation fails
with that as its reason."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.errors import DatabaseUnavailable
from app.evaluations.views import EvaluationView
from app.execution import Answer, Push
from app.main import open_services
from app.settings import load
from app.spec import Spec
from app.web.state import Services
from tests.conftest import own_database
from tests.ledger.factories import let_expire
from tests.system.conftest import PATIENCE, TASKS

SAMPLES = 40


@pytest.fixture(scope="module")
async def services(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    """Its queue is listened to by nobody: pushes are made by hand."""
    settings: dict[str, Any] = {"renew_interval": 0.1, "queue_endpoint": "127.0.0.1:9", "queue_patience": 0.1}
    settings["artifacts"] = f"file://{tmp_path_factory.mktemp('artifacts')}"
    async with own_database(postgres) as url, open_services(load(database_url=url, **settings)) as services:
        yield services


async def _push(services: Services, execution: str) -> Answer:
    return await services.executor.execute(Push(execution, alone=True))


async def _planned(services: Services, *hows: str, **fields: Any) -> UUID:
    spec = Spec(task=f"{TASKS}@each", model="mockllm/model", task_args={"hows": list(hows)}, **fields)
    evaluation = (await services.executor.ledger.submit(spec, "me")).evaluation_id
    assert (await _push(services, f"{evaluation}.plan")).state == "succeeded"
    return evaluation


async def _ended(services: Services, evaluation: UUID) -> EvaluationView:
    assert (await _push(services, f"{evaluation}.report")).kind == "terminal"
    return await services.reader.evaluation(evaluation)


async def test_the_first_error_stops_an_evaluation_that_allows_none(services: Services) -> None:
    evaluation = await _planned(services, *["raise"] * SAMPLES)
    answer = await _push(services, f"{evaluation}.1")
    assert (answer.kind, answer.state, answer.attempt) == ("terminal", "failed", 2)  # in one push
    view = await services.reader.evaluation(evaluation)
    assert view.stop_reason == "It was stopped: 1 sample errored, and fail_on_error allows none."
    assert (view.samples.failed, view.samples.cancelled) == (1, SAMPLES - 1)
    explained = (await services.reader.explanation(evaluation)).explanation
    assert any(view.stop_reason in sentence for sentence in explained)

    view = await _ended(services, evaluation)
    assert view.state == "failed"
    assert view.error is not None
    assert view.error["message"].startswith("It was stopped: 1 sample errored")
    assert "it broke" in view.error["message"]
    assert view.results is not None
    page = await services.reader.samples(evaluation)
    assert page.samples[0].transcript, "what is finished is shown"


@pytest.mark.parametrize(("policy", "runs"), [(0.5, 4), (3, 3), (1.0, 1)])
async def test_a_threshold_means_what_it_means_to_inspect(services: Services, policy: float, runs: int) -> None:
    """A share of all samples, met at exactly that; or a count."""
    evaluation = await _planned(services, *["raise"] * 8, fail_on_error=policy, max_failures=1)
    for n in range(1, runs + 1):
        assert (await services.reader.evaluation(evaluation)).stop_reason is None
        await _push(services, f"{evaluation}.{n}")
    assert (await services.reader.evaluation(evaluation)).samples.cancelled == 8 - runs


@pytest.mark.parametrize(
    ("fields", "ends"), [({"fail_on_error": False}, "succeeded"), ({"continue_on_fail": True}, "failed")]
)
async def test_an_evaluation_may_run_to_its_end_whatever_fails(
    services: Services, fields: dict[str, Any], ends: str
) -> None:
    evaluation = await _planned(services, "raise", "raise", max_failures=1, **fields)
    for n in (1, 2):
        assert (await _push(services, f"{evaluation}.{n}")).state == "failed"
    assert (await _ended(services, evaluation)).state == ends


async def test_what_runs_is_ended_and_what_it_has_finished_is_kept(services: Services) -> None:
    evaluation = await _planned(services, "", "hang", "raise", samples_per_execution=2, max_failures=1)
    running = asyncio.create_task(_push(services, f"{evaluation}.1"))
    async with asyncio.timeout(PATIENCE):
        while not (await services.reader.samples(evaluation)).samples[0].transcript:
            await asyncio.sleep(0.02)
        assert (await _push(services, f"{evaluation}.2")).state == "failed"
        answer = await running
    assert (answer.kind, answer.state) == ("terminal", "cancelled")
    assert "fail_on_error" in answer.message
    view = await _ended(services, evaluation)
    assert (view.state, view.samples.succeeded, view.samples.failed, view.samples.cancelled) == ("failed", 1, 1, 1)


async def test_a_retry_takes_the_stop_back(services: Services, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    evaluation = await _planned(services, *[f"once:{flag}"] * 3, max_failures=1)
    assert (await _push(services, f"{evaluation}.1")).state == "failed"
    assert (await _ended(services, evaluation)).state == "failed"
    assert await services.executor.ledger.retry(evaluation) == ("failed", 3)
    for n in (1, 2, 3):
        assert (await _push(services, f"{evaluation}.{n}")).state == "succeeded"
    view = await _ended(services, evaluation)
    assert (view.state, view.stop_reason, view.error) == ("succeeded", None, None)


async def test_of_a_task_that_stops_early_one_run_stands(services: Services, tmp_path: Path) -> None:
    """The first attempt stops after three scores, of which one is an error; the second after two, and these are all."""
    task = f"{TASKS}@stops_early"
    spec = Spec(task=task, model="mockllm/model", task_args={"flag": str(tmp_path / "flag")}, max_failures=2)
    evaluation = (await services.executor.ledger.submit(spec, "me")).evaluation_id
    assert (await _push(services, f"{evaluation}.plan")).state == "succeeded"
    assert (await _push(services, f"{evaluation}.1")).state == "succeeded"
    view = await _ended(services, evaluation)
    assert (view.state, view.error) == ("succeeded", None)
    page = await services.reader.samples(evaluation)
    assert [(sample.id, sample.attempt) for sample in page.samples if sample.transcript] == [(1, 2), (2, 2)]
    assert view.results is not None
    assert view.results["scores"][0]["metrics"]["accuracy"]["value"] == 0.5


async def test_what_an_attempt_came_to_before_the_stop_is_recorded(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = services.executor.ledger
    evaluation = await _planned(services, "", "raise", max_failures=1)

    async def away(*_: object) -> None:
        raise DatabaseUnavailable("It is away.")

    monkeypatch.setattr(ledger, "settle", away)
    with pytest.raises(DatabaseUnavailable):
        await _push(services, f"{evaluation}.1")
    monkeypatch.undo()
    await let_expire(services.database, f"{evaluation}.1")
    assert (await _push(services, f"{evaluation}.2")).state == "failed"
    assert (await services.reader.evaluation(evaluation)).stop_reason
    assert (await _push(services, f"{evaluation}.1")).state == "succeeded"

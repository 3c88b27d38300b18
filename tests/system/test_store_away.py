"""The artifact store away: what runs is interrupted by it and taken up again. No crash is counted, no spend forgotten."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from app.execution import Answer, Push
from app.ledger import Settlement
from app.main import open_services
from app.runner.messages import SampleRef, SampleResult, ScoreValue
from app.saved import _SETTLEMENT, OUTCOME
from app.settings import load
from app.web.state import Services
from tests.conftest import own_database
from tests.faults.store import FaultyStore, in_front_of
from tests.ledger import rows
from tests.ledger.factories import let_expire
from tests.system.conftest import planned

PATIENCE = 60


@pytest.fixture(scope="module")
async def services(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    artifacts = f"file://{tmp_path_factory.mktemp('artifacts')}"
    quick = {"renew_interval": 0.1, "queue_endpoint": "127.0.0.1:9", "queue_patience": 0.1, "artifacts_patience": 0.2}
    async with (
        own_database(postgres) as url,
        open_services(load(database_url=url, artifacts=artifacts, **quick)) as services,
    ):
        yield services


@pytest.fixture
def store(services: Services) -> Iterator[FaultyStore]:
    artifacts = services.executor.artifacts
    real = artifacts._filesystem
    yield in_front_of(artifacts)
    artifacts._filesystem = real


async def push(services: Services, execution: str) -> Answer:
    return await services.executor.execute(Push(execution, alone=True))


async def test_a_store_that_is_away_interrupts_all_that_runs_and_each_is_taken_up_again(
    services: Services, store: FaultyStore, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await planned(services.executor.ledger, *[[1]] * 3, how=f"until:{flag}")
    runs = [f"{evaluation}.{n}" for n in (1, 2, 3)]
    pushes = [asyncio.create_task(push(services, run)) for run in runs]
    async with asyncio.timeout(PATIENCE):
        while len(services.executor.leases) < len(runs):
            await asyncio.sleep(0.02)
        store.away = True
        flag.touch()
        answers = await asyncio.gather(*pushes)
    assert [(answer.kind, answer.state) for answer in answers] == [("again", "pending")] * 3
    assert all("artifact store did not answer" in answer.message for answer in answers)
    again = await push(services, runs[0])
    assert (again.kind, again.state) == ("again", "pending"), "it is not worked at while nothing could be kept"
    store.away = False
    for answer in await asyncio.gather(*(push(services, run) for run in runs)):
        assert (answer.kind, answer.state) == ("terminal", "succeeded")
    for n, run in enumerate(runs):
        row = await rows.execution(services.database, run)
        assert (row.crashes, row.failures) == (0, 0)
        attempts = await rows.attempts(services.database, run)
        assert [a.outcome for a in attempts] == ["interrupted"] * (2 if n == 0 else 1) + ["succeeded"]
        assert attempts[0].usage["tokens"] == attempts[-1].usage["tokens"] == 15, "what it had spent is known"


async def test_a_store_that_keeps_nothing_of_what_it_took_is_a_store_that_is_away(
    services: Services, store: FaultyStore
) -> None:
    run = f"{await planned(services.executor.ledger, [1])}.1"
    store.hollow = True
    for _ in range(5):
        answer = await push(services, run)
        assert (answer.kind, answer.state) == ("again", "pending")
    attempts = await rows.attempts(services.database, run)
    assert [bool(attempt.usage) for attempt in attempts] == [True] + [False] * 4, "it is paid for once"
    store.hollow = False
    assert (await push(services, run)).state == "succeeded"


async def test_a_file_that_the_store_alone_refuses_does_not_go_round_for_ever(
    services: Services, store: FaultyStore
) -> None:
    run = f"{await planned(services.executor.ledger, [1])}.1"
    store.refuses = ".eval"
    answers = [await push(services, run) for _ in range(4)]
    assert [answer.state for answer in answers] == ["pending"] * 3 + ["failed"]
    assert "does not take a file" in answers[-1].message


async def test_what_a_finished_attempt_came_to_is_looked_for_before_the_third_crash_gives_up(
    services: Services,
) -> None:
    executor = services.executor
    run = f"{await planned(executor.ledger, [1])}.1"
    for _ in range(3):
        claim = await executor.ledger.claim(run, uuid4())
        assert claim
        await let_expire(services.database, run)
    result = SampleResult(sample=SampleRef(id=1, epoch=1), scores={"odd": ScoreValue(value=1)}, log="a.eval")
    outcome = Settlement("succeeded", samples=[(result, "file:///logs/a.eval")])
    assert claim
    url = executor.artifacts.url(str(claim.evaluation_id), run, 2, OUTCOME)
    await executor.artifacts.write(url, _SETTLEMENT.dump_json(outcome))
    answer = await push(services, run)
    assert (answer.kind, answer.state, answer.attempt) == ("terminal", "succeeded", 4)
    row = await rows.execution(services.database, run)
    assert (row.crashes, row.state) == (0, "succeeded")

"""The whole system with callers known: the queue's pushes and the sweeper carry tokens of the emulator's issuer, and the
service verifies them as it verifies Google's."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from app.database.engine import open_engine
from app.database.session import Database
from app.ledger import Ledger
from app.local.stack import Stack, open_stack
from app.spec import Spec
from tests.conftest import own_database
from tests.system.conftest import NUMBERS, ended, spec, submit
from tests.web.test_evaluations import problem
from tests.web.tokens import bearer

QUEUE = "queue@proctor.iam.gserviceaccount.com"
ALICE, BOB, EVE = "alice@example.com", "bob@example.com", "eve@evil.example"


@pytest.fixture(scope="module")
async def protected(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    settings: dict[str, Any] = {
        "auth": "oidc",
        "queue_service_account": QUEUE,
        "callers": (ALICE, BOB),
        "allowed_tasks": (NUMBERS,),
        "min_backoff": 0.1,
        "sweep_every": 0.5,
        "log_level": "warning",
        "log_format": "json",
    }
    async with (
        own_database(postgres) as url,
        open_stack(tmp_path_factory.mktemp("protected"), database_url=url, **settings) as stack,
    ):
        yield stack


def calling(stack: Stack, email: str | None) -> httpx.AsyncClient:
    headers = bearer(stack.emulator.id_token(email, stack.url)) if email else {}
    return httpx.AsyncClient(base_url=stack.url, timeout=60, headers=headers)


async def test_an_evaluation_runs_through_pushes_that_carry_tokens(protected: Stack) -> None:
    async with calling(protected, ALICE) as alice:
        view = await ended(alice, await submit(alice, spec(task_args={"n": 2})))
    assert (view["state"], view["created_by"], view["samples"]["succeeded"]) == ("succeeded", ALICE, 2)
    assert {record.status for record in protected.emulator.records} == {200}


async def test_the_stack_s_sweeper_carries_one_too(protected: Stack) -> None:
    """Nobody else enqueues what only the ledger knows of."""
    async with open_engine(protected.settings) as engine:
        ledger = Ledger(Database(engine, protected.settings), lease=60, worker="nobody")
        submitted = await ledger.submit(Spec(**spec(task_args={"n": 1})), ALICE)
        await ledger.all_due()
    async with calling(protected, ALICE) as alice:
        assert (await ended(alice, str(submitted.evaluation_id)))["state"] == "succeeded"


async def test_strangers_get_nothing_of_it(protected: Stack) -> None:
    async with calling(protected, None) as stranger:
        for path in ("/evaluations", "/docs", "/openapi.json", f"/evaluations/{uuid4()}"):
            problem(await stranger.get(path), 401)
        problem(await stranger.post("/evaluations", json=spec()), 401)
        pushed = {"X-CloudTasks-TaskName": "t", "X-CloudTasks-QueueName": "proctor"}
        problem(await stranger.post("/tasks/execute", json={"execution_id": "e.1"}, headers=pushed), 401)
        problem(await stranger.post("/tasks/sweep"), 401)
        assert (await stranger.get("/health/ready")).status_code == 200
    for email, path in ((EVE, "/evaluations"), (EVE, "/tasks/sweep"), (ALICE, "/tasks/sweep"), (QUEUE, "/evaluations")):
        async with calling(protected, email) as known:
            assert email in problem(await known.post(path, json=spec()), 403)


async def test_an_idempotency_key_is_its_caller_s_own(protected: Stack) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    ids = []
    for email in (ALICE, BOB, "Alice@Example.com"):
        async with calling(protected, email) as known:
            ids.append((await known.post("/evaluations", json=spec(task_args={"n": 1}), headers=headers)).json()["id"])
    assert ids[0] == ids[2] != ids[1]


async def test_only_allowed_tasks_are_taken(protected: Stack) -> None:
    async with calling(protected, ALICE) as alice:
        refused = await alice.post("/evaluations", json=spec("another/task"))
    assert NUMBERS in problem(refused, 422)


async def test_the_sweeper_and_the_queue_know_unknown_executions(protected: Stack) -> None:
    async with calling(protected, QUEUE) as queue:
        assert (await queue.post("/tasks/sweep")).status_code == 200
        problem(await queue.post("/tasks/execute", json={"execution_id": "nobody.1"}), 404)
        pushed = {"X-CloudTasks-TaskName": "t"}
        assert (await queue.post("/tasks/execute", json={"execution_id": "n.1"}, headers=pushed)).status_code == 200


@pytest.mark.usefixtures("every_log")
async def test_logs_name_the_caller_and_never_the_token(protected: Stack) -> None:
    token = protected.emulator.id_token(QUEUE, protected.url)
    with capture_logs(processors=[merge_contextvars]) as logs:
        async with httpx.AsyncClient(base_url=protected.url, headers=bearer(token)) as queue:
            await queue.post(
                "/tasks/execute", json={"execution_id": "nobody.2"}, headers={"X-CloudTasks-TaskName": "t"}
            )
            await queue.get("/evaluations")
            await queue.get("/evaluations", headers={"Authorization": f"Bearer {token}x"})
    told = {entry["event"]: entry for entry in logs}
    assert told["there is no such execution"]["caller"] == QUEUE
    assert [entry["status"] for entry in logs if entry["event"] == "refused"] == [403, 401]
    assert not [part for part in token.split(".") if part in str(logs)]


async def test_the_command_line_brings_its_token(protected: Stack) -> None:
    good = protected.emulator.id_token(ALICE, protected.url)
    for token, code, says in (
        (good, 0, ""),
        (protected.emulator.id_token(EVE, protected.url), 2, "PROCTOR_CALLERS"),
        ("nonsense", 2, "does not let you in"),
        ("", 2, "PROCTOR_TOKEN"),
        ("two words", 2, "PROCTOR_TOKEN must be an ID token"),
    ):
        ran = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app.cli", "list", "--json"),
            env={**os.environ, "PROCTOR_URL": protected.url, "PROCTOR_TOKEN": token},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = (text.decode() for text in await ran.communicate())
        assert (ran.returncode, len(err.splitlines())) == (code, 1 if code else 0), err
        assert says in err
        assert good not in err
        assert ("evaluations" in out) is (code == 0)

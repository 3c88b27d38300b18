"""A warm forkserver for all tests of a worker, and what it takes to run a child."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app.runner.messages import Done, Job, Message, SampleEnded, SampleResult
from app.runner.supervisor import Crashed, Supervisor
from app.spec import Spec

T = TypeVar("T")

TASKS = Path(__file__).with_name("tasks.py")

MakeJob = Callable[..., Job]
Attempt = Callable[[Job], Awaitable[list[Message | Crashed]]]


@pytest.fixture(scope="session")
async def supervisor() -> AsyncIterator[Supervisor]:
    environment = {**os.environ, "PROCTOR_DATABASE_PASSWORD": "secret", "OPENAI_API_KEY": "kept"}
    environment.pop("ANTHROPIC_API_KEY", None)
    async with Supervisor(environment) as supervisor:
        await supervisor.warm()
        yield supervisor


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    numbers = count(1)

    def make(kind: str, task: str, *, spec: dict[str, Any] | None = None, **fields: Any) -> Job:
        name = task if "/" in task or "@" in task else f"{TASKS}@{task}"
        attempt = next(numbers)
        return Job(
            kind=kind,
            evaluation_id="evaluation",
            execution_id=f"evaluation.{attempt}",
            attempt=attempt,
            spec=Spec(**{"task": name, "model": "mockllm/model", **(spec or {})}),
            directory=str(tmp_path / str(attempt)),
            **fields,
        )

    return make


@pytest.fixture
def attempt(supervisor: Supervisor) -> Attempt:
    async def attempt(job: Job) -> list[Message | Crashed]:
        async with supervisor.run(job) as child:
            return [message async for message in child]

    return attempt


def done(messages: list[Message | Crashed]) -> Done:
    assert isinstance(messages[-1], Done), messages
    return messages[-1]


def only(kind: type[T], messages: list[Message | Crashed]) -> T:
    (found,) = [message for message in messages if isinstance(message, kind)]
    return found


def ended(messages: list[Message | Crashed]) -> list[SampleResult]:
    return [message.result for message in messages if isinstance(message, SampleEnded)]

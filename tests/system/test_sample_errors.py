"""What goes wrong in a sample is the sample's: recorded with whose fault it was, tried again as the spec says, and never
taken for a fault of the service."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.spec import Spec
from tests.faults.models import Models
from tests.system.conftest import NUMBERS, TASKS, fanned_out
from tests.system.inside import Inside, open_inside

TALK = f"{TASKS}@talk"
RATE_LIMITED = "limited"
"""A conversation whose first two requests are refused."""

Ended = tuple[dict[str, Any], dict[str, Any]]
"""An execution and its only sample, as the API shows them."""


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("samples")) as inside:
        yield inside


@pytest.fixture(scope="module")
async def models() -> AsyncIterator[Models]:
    async with Models() as models:
        yield models


@pytest.fixture(scope="module", autouse=True)
async def rate_limited(inside: Inside, models: Models) -> AsyncIterator["asyncio.Task[Ended]"]:
    """It begins before all others, for Inspect waits for 3 to 6 s before its second try, and twice as long before the
    third."""
    models.fail(429, times=2, conversation=RATE_LIMITED)
    task = asyncio.create_task(run(inside, **talking(models, RATE_LIMITED)))
    yield task
    await asyncio.wait({task})


@pytest.fixture(scope="module", autouse=True)
async def waits(inside: Inside, models: Models) -> AsyncIterator["dict[str, asyncio.Task[Ended]]"]:
    """They too begin before all others. Each limit allows for the seconds that a first call may take to be made."""
    models.fail(429, conversation="held", retry_after=50)
    for number in (1, 3):
        models.fail(429, conversation="twice", number=number, retry_after=8)
    models.fail(429, times=2, conversation="between")  # 9 s at least
    specs = {
        "held": talking(models, "held", working_limit=10),
        "twice": talking(models, "twice", turns=2, working_limit=15),
        "between": talking(models, "between", working_limit=9),
    }
    specs["between"]["model_args"] = {**models.model_args, "max_retries": 0}
    tasks = {name: asyncio.create_task(run(inside, **spec)) for name, spec in specs.items()}
    yield tasks
    await asyncio.wait(tasks.values())


def talking(models: Models, name: str, turns: int = 1, **fields: Any) -> dict[str, Any]:
    """The spec of a conversation with a provider."""
    said = {"task_args": {"name": name, "turns": turns}, "model_args": models.model_args}
    return {"task": TALK, "model": "openai-api/scripted/m", **said, **fields}


def going_wrong(how: str, **fields: Any) -> dict[str, Any]:
    return {"task": NUMBERS, "task_args": {"n": 1, "how": how}, **fields}


async def run(inside: Inside, expected: tuple[int, ...] = (200,), **fields: Any) -> Ended:
    """A single sample. `expected`: what its pushes are answered."""
    spec = Spec(**{"model": "mockllm/model", "max_failures": 1, **fields})
    evaluation: UUID = await fanned_out(inside.ledger, spec, [1])
    answers = [await inside.push(f"{evaluation}.1") for _ in expected]
    assert tuple(answer.status_code for answer in answers) == expected, answers[-1].text
    execution = await inside.get(f"/executions/{evaluation}.1")
    (sample,) = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]
    assert execution["crashes"] == 0
    classes = [attempt["error_class"] for attempt in execution["attempts"]] + [
        (sample["error"] or {}).get("error_class")
    ]
    assert "infrastructure" not in classes
    return execution, sample


def failed(ended: Ended, error_class: str, says: str, attempts: int = 1) -> None:
    execution, sample = ended
    assert (execution["state"], sample["state"]) == ("failed", "failed")
    assert [attempt["outcome"] for attempt in execution["attempts"]] == ["failed"] * attempts
    assert execution["failures"] == attempts
    for error in (execution["error"], sample["error"], *(attempt["error"] for attempt in execution["attempts"])):
        assert (error["error_class"], says in error["message"]) == (error_class, True), error
    assert Path(sample["transcript"].removeprefix("file://")).is_file(), "it can be looked into"


def succeeded(ended: Ended, attempts: int = 1) -> None:
    execution, sample = ended
    assert (execution["state"], sample["state"], sample["error"]) == ("succeeded", "succeeded", None)
    assert sample["scores"]["odd"]["value"] == 1
    assert len(execution["attempts"]) == attempts


async def test_a_task_that_raises_has_failed_by_its_own_fault(inside: Inside) -> None:
    failed(await run(inside, **going_wrong("raise")), "evaluation", "it broke <script>")


async def test_a_provider_that_refuses_is_not_asked_again(inside: Inside, models: Models) -> None:
    """Neither by Inspect nor by the queue, whatever the spec allows."""
    models.fail(401, times=10**6, conversation="unauthorized")
    ended = await run(inside, **talking(models, "unauthorized", max_failures=5))
    failed(ended, "model", "401")
    assert len(models.of("unauthorized")) == 1


async def test_a_message_limit_ends_the_sample_and_it_is_scored(inside: Inside, models: Models) -> None:
    ended = await run(inside, **talking(models, "long", turns=10, message_limit=4))
    succeeded(ended)
    assert ended[1]["limit"] == "message"
    assert len(models.of("long")) == 2


async def test_a_token_limit_ends_the_sample_and_it_is_scored(inside: Inside, models: Models) -> None:
    ended = await run(inside, **talking(models, "dear", turns=10, token_limit=30))
    succeeded(ended)
    assert ended[1]["limit"] == "token"
    calls = models.of("dear")
    assert len(calls) == 2
    (usage,) = ended[1]["usage"].values()
    assert usage["total_tokens"] == sum(call.tokens for call in calls), "what was spent before is counted"


async def test_a_time_limit_ends_the_sample_and_it_is_scored(inside: Inside) -> None:
    ended = await run(inside, **going_wrong("hang", time_limit=1))
    succeeded(ended)
    assert ended[1]["limit"] == "time"
    assert ended[1]["duration"] >= 1


async def test_retry_on_error_runs_a_sample_again_within_its_attempt(inside: Inside, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    succeeded(await run(inside, **going_wrong(f"fail:2:{marks}", retry_on_error=2)), attempts=1)
    assert marks.read_text().split() == ["called"] * 3


async def test_both_kinds_of_retry_multiply_and_then_it_has_failed(inside: Inside, tmp_path: Path) -> None:
    """Three attempts, and in each the sample runs twice. A push that comes after that runs nothing."""
    marks = tmp_path / "marks"
    spec = going_wrong(f"fail:100:{marks}", retry_on_error=1, max_failures=3)
    ended = await run(inside, (200, 200), **spec)
    failed(ended, "evaluation", "it broke once more", attempts=3)
    assert marks.read_text().split() == ["called"] * 6


async def test_a_sample_that_succeeds_at_last_has_no_error_left(inside: Inside, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    ended = await run(inside, (200, 200), **going_wrong(f"fail:1:{marks}", max_failures=2))
    succeeded(ended, attempts=2)
    assert [attempt["outcome"] for attempt in ended[0]["attempts"]] == ["failed", "succeeded"]
    assert ended[0]["failures"] == 1
    assert ended[0]["error"] is None


async def test_a_provider_that_limits_the_rate_is_waited_for(
    models: Models, rate_limited: "asyncio.Task[Ended]"
) -> None:
    ended = await rate_limited
    succeeded(ended)
    assert ended[1]["limit"] is None
    assert [request.status for request in models.of(RATE_LIMITED)] == [429, 429, 200]


async def test_a_wait_counts_as_work_as_long_as_the_call_that_makes_it(
    models: Models, waits: "dict[str, asyncio.Task[Ended]]"
) -> None:
    """Of the three, the first is held up for longer than its limit within one call. The second is so only in the sum of its
    calls, and the third between Inspect's own tries."""
    for name, limit in {"held": "working", "twice": None, "between": None}.items():
        ended = await waits[name]
        succeeded(ended)
        assert ended[1]["limit"] == limit, name
    statuses = {name: [request.status for request in models.of(name)] for name in waits}
    assert statuses == {"held": [429], "twice": [429, 200, 429, 200], "between": [429, 429, 200]}


async def test_a_result_that_the_database_refuses_fails_its_sample_alone(inside: Inside) -> None:
    rule = "ALTER TABLE sample_results ADD CONSTRAINT no_two CHECK (sample_id <> '2' OR scores = '{}')"
    await inside.database.run(text(rule))
    try:
        spec = Spec(task=NUMBERS, model="mockllm/model", task_args={"n": 3})
        evaluation = await fanned_out(inside.ledger, spec, [1, 2, 3])
        answer = await inside.push(f"{evaluation}.1")
    finally:
        await inside.database.run(text("ALTER TABLE sample_results DROP CONSTRAINT no_two"))
    assert (answer.status_code, answer.json()["state"]) == (200, "failed")
    first, second, third = (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]
    assert (first["scores"]["odd"]["value"], third["scores"]["odd"]["value"]) == (1, 1)
    assert (second["error"]["error_class"], "no_two" in second["error"]["message"]) == ("infrastructure", True)
    assert second["usage"], "it has cost what it has"
    execution = await inside.get(f"/executions/{evaluation}.1")
    assert (execution["attempt"], execution["crashes"], "no_two" in execution["error"]["message"]) == (1, 0, True)

"""What a model's server answers wrongly is the model's failure; what a task does wrongly says where."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.faults.models import Models
from tests.system.conftest import TASKS
from tests.system.inside import Inside, open_inside
from tests.system.test_sample_errors import going_wrong, run, talking

ANSWER: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
BODIES = {
    "html": "<html><body>Please log in.</body></html>",
    "no-choices": json.dumps(ANSWER | {"choices": []}),
    "null-choices": json.dumps(ANSWER | {"choices": None}),
    "other-object": json.dumps({"error": {"message": "over quota"}}),
    "no-message": json.dumps(ANSWER | {"choices": [{"index": 0, "finish_reason": "stop"}]}),
    "cut": '{"id": ',
    "empty": "",
    "list": "[]",
}


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("answers")) as inside:
        yield inside


@pytest.fixture(scope="module")
async def models() -> AsyncIterator[Models]:
    async with Models() as models:
        yield models


@pytest.mark.parametrize("name", BODIES)
async def test_an_answer_that_is_none_is_the_models_failure(name: str, inside: Inside, models: Models) -> None:
    models.garble(BODIES[name], times=10, conversation=name)
    _, sample = await run(inside, **talking(models, name, max_retries=0))
    error = sample["error"]
    assert error["error_class"] == "model", error
    assert "Future" not in error["message"]


async def test_an_error_of_the_task_says_in_which_line_of_its_code(inside: Inside) -> None:
    _, sample = await run(inside, **going_wrong("raise"))
    line = next(n for n, text in enumerate(TASKS.read_text().splitlines(), 1) if "it broke <script>" in text)
    assert sample["error"]["error_class"] == "evaluation"
    assert sample["error"]["message"].endswith(f"(at {TASKS}:{line}, in _misbehave)")
    assert "RuntimeError: it broke" in sample["error"]["traceback"]


async def test_a_call_is_sent_again_no_more_often_than_the_spec_says(inside: Inside, models: Models) -> None:
    models.fail(429, times=10, conversation="capped", retry_after=0)
    _, sample = await run(inside, **talking(models, "capped", max_retries=1))
    assert sample["error"]["error_class"] == "model"
    assert "429" in sample["error"]["message"]
    assert len(models.of("capped")) <= 2 * 3  # the provider's client sends each up to twice more


async def test_a_try_takes_no_longer_than_the_spec_says(inside: Inside, models: Models) -> None:
    fault = models.hang(conversation="hung")
    _, sample = await run(inside, **talking(models, "hung", attempt_timeout=1, max_retries=0))
    fault.remove()
    assert sample["error"]["error_class"] == "model", sample["error"]

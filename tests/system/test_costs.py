"""What an evaluation has cost is what its provider's bill will say."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from inspect_ai.log import read_eval_log

from app.prices import Prices
from tests.faults.models import Models, Script
from tests.system.conftest import TASKS
from tests.system.inside import Inside, open_inside

MODEL = "openai-api/scripted/m"
OWN = {MODEL: {"input": 2, "output": 8, "cache_read": 0.5, "reasoning": 4}}
USAGE = {
    "prompt_tokens": 1000,
    "prompt_tokens_details": {"cached_tokens": 600},
    "completion_tokens": 200,
    "completion_tokens_details": {"reasoning_tokens": 150},
    "total_tokens": 1200,
}
CALL = 0.0021
"""By hand: of 1,000 tokens in, 600 come from the cache; of 200 out, 150 are thoughts. For a million tokens of each:
400 × 2 $ + 600 × 0.50 $ + 50 × 8 $ + 150 × 4 $ = 800 + 300 + 400 + 600 = 2,100, so 0.0021 $."""


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("costs"), model_prices=json.dumps(OWN)) as inside:
        yield inside


@pytest.fixture(scope="module")
async def models() -> AsyncIterator[Models]:
    async with Models(Script(usage=USAGE)) as models:
        yield models


async def _evaluate(inside: Inside, models: Models, **fields: Any) -> dict[str, Any]:
    spec = {"task": f"{TASKS}@talk", "model": MODEL, "model_args": models.model_args, **fields}
    evaluation = await inside.planned({"task_args": {"name": "x", "turns": 3}, **spec})
    for execution in ("1", "report"):
        await inside.to_the_end(f"{evaluation}.{execution}")
    view: dict[str, Any] = await inside.get(f"/evaluations/{evaluation}")
    return view


async def test_cached_and_reasoning_tokens_are_billed_at_their_own_rates(inside: Inside, models: Models) -> None:
    view = await _evaluate(inside, models)
    assert view["state"] == "succeeded"
    assert view["cost"] == pytest.approx(3 * CALL)
    assert view["versions"]["model prices"] == Prices(inside.settings.model_prices).source()
    (sample,) = (await inside.get(f"/evaluations/{view['id']}/samples"))["samples"]
    assert sample["cost"] == pytest.approx(3 * CALL)
    (attempt,) = (await inside.get(f"/executions/{view['id']}.1"))["attempts"]
    assert attempt["cost"] == pytest.approx(3 * CALL)
    logged = read_eval_log(view["log"])
    assert logged.stats.model_usage[MODEL].total_cost == pytest.approx(3 * CALL)


async def test_a_sample_ends_when_it_has_cost_its_limit(inside: Inside, models: Models) -> None:
    view = await _evaluate(inside, models, cost_limit=1.5 * CALL)
    (sample,) = (await inside.get(f"/evaluations/{view['id']}/samples"))["samples"]
    assert (sample["limit"], sample["state"]) == ("cost", "succeeded")
    assert sample["cost"] == pytest.approx(2 * CALL)


async def test_what_nobody_bills_stays_below_any_limit(inside: Inside, models: Models) -> None:
    fields: dict[str, Any] = {
        "task": f"{TASKS}@numbers",
        "model": "mockllm/model",
        "model_args": {},
        "task_args": {"n": 1},
    }
    view = await _evaluate(inside, models, cost_limit=0.01, **fields)
    assert (view["state"], view["cost"]) == ("succeeded", 0)


async def test_a_limit_on_unknown_costs_is_refused_before_anything_runs(inside: Inside, models: Models) -> None:
    body = {"task": "a/b", "model": MODEL, "model_roles": {"grader": "ollama/m"}, "cost_limit": 1}
    refused = await inside.client.post("/evaluations", json=body)
    assert refused.status_code == 422
    assert "'ollama/m'" in refused.json()["detail"]
    assert "PROCTOR_MODEL_PRICES" in refused.json()["detail"]


async def test_a_model_without_a_price_says_so_once(inside: Inside) -> None:
    submitted = await inside.client.post("/evaluations", json={"task": "a/b", "model": "ollama/m"})
    view = submitted.json()
    (note,) = view["notes"]
    assert "'ollama/m'" in note
    assert (await inside.get(f"/evaluations/{view['id']}"))["notes"] == []

"""The scripted model provider, by itself and through Inspect in a real child."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from app.runner.messages import Done, Job, SampleEnded, SampleRef
from app.runner.supervisor import Supervisor
from app.spec import Spec
from tests.faults.models import Models, Script

TASKS = Path(__file__).parents[1] / "drills" / "tasks.py"

ROLES = {"grader": "openai-api/scripted/judge"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {argument: {}}}}}
    for name, argument in (("bash", "cmd"), ("submit", "answer"))
]


@pytest.fixture
async def models() -> AsyncIterator[Models]:
    async with Models(Script(turns=2, command="echo {turn} of {conversation}")) as models:
        yield models


@pytest.fixture
async def client(models: Models) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=models.url, timeout=30) as client:
        yield client


def conversation(name: str, turns: int = 0) -> dict[str, Any]:
    first = {"role": "user", "content": [{"type": "text", "text": f"Begin conversation {name}. Do it."}]}
    replies = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "done"}] * turns
    return {"model": "m", "messages": [{"role": "system", "content": "s"}, first, *replies], "tools": TOOLS}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def called(answer: dict[str, Any]) -> tuple[str, str]:
    function = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    return function["name"], function["arguments"]


async def test_the_script_is_followed_from_wherever_the_conversation_is(client: httpx.AsyncClient) -> None:
    third, first, second = [called(await ask(client, conversation("a/1", turns))) for turns in (2, 0, 1)]
    assert first == ("bash", '{"cmd": "echo 0 of a/1"}')
    assert second == ("bash", '{"cmd": "echo 1 of a/1"}')
    assert third == ("submit", '{"answer": "done"}')


async def test_a_judge_gets_a_verdict_and_is_told_apart(client: httpx.AsyncClient, models: Models) -> None:
    await ask(client, conversation("a"))
    prompt = {"role": "user", "content": "[Question]: conversation a, and so on. Answer GRADE: C or GRADE: I"}
    answer = await ask(client, {"model": "judge", "messages": [prompt]})
    assert answer["choices"][0]["message"]["content"].endswith("GRADE: C")
    assert [(r.kind, r.conversation, r.number) for r in models.requests] == [("agent", "a", 1), ("judge", "a", 1)]


async def test_every_request_is_recorded_with_what_it_cost(client: httpx.AsyncClient, models: Models) -> None:
    began = time.monotonic()
    usage = [(await ask(client, conversation("a", turns)))["usage"] for turns in (0, 1)]
    assert [u["total_tokens"] for u in usage] == [r.tokens for r in models.requests] == [30, 50]
    assert [(r.turns, r.number, r.status) for r in models.of("a")] == [(0, 1, 200), (1, 2, 200)]
    assert began <= models.requests[0].at <= (models.requests[0].answered or 0) <= models.requests[1].at


async def test_a_fault_befalls_only_what_it_is_meant_for(client: httpx.AsyncClient, models: Models) -> None:
    any_two, only_b = models.fail(429, times=2), models.fail(401, conversation="b", number=2)

    async def status(name: str) -> int:
        return (await client.post("/chat/completions", json=conversation(name))).status_code

    assert [await status(name) for name in ("a", "b", "a", "b", "b")] == [429, 429, 200, 401, 200]
    assert (any_two.happened, only_b.happened) == (2, 1)
    body = (await client.post("/models", json={})).json()
    assert body["error"]["code"] == "404"


async def test_a_request_that_hangs_is_heard_of_at_once_and_answered_when_it_is_let_go(
    client: httpx.AsyncClient, models: Models
) -> None:
    hanging = models.hang(conversation="a", number=2)
    assert called(await ask(client, conversation("a")))[0] == "bash"
    asked = asyncio.create_task(ask(client, conversation("a", turns=1)))
    request = await asyncio.wait_for(models.arrival("a", 2), 10)
    assert request.status is None
    assert not asked.done()
    assert called(await ask(client, conversation("b")))[0] == "bash", "nobody else is kept waiting"
    hanging.remove()
    assert called(await asked)[0] == "bash"
    assert request.status == 200


async def test_each_conversation_can_have_its_own_script() -> None:
    def script(name: str) -> Script:
        return Script(turns=int(name.removeprefix("t")), submission=name, latency=0.05)

    async with Models(script) as models, httpx.AsyncClient(base_url=models.url) as client:
        began = time.monotonic()
        assert called(await ask(client, conversation("t0")))[0] == "submit"
        assert called(await ask(client, conversation("t1")))[0] == "bash"
        assert time.monotonic() - began >= 0.1


def test_it_can_be_used_without_an_event_loop_of_ones_own() -> None:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(Models()) as models:
        httpx.post(f"{models.url}/chat/completions", json=conversation("a")).raise_for_status()
        assert portal.call(models.arrival, "a").number == 1


async def agent(supervisor: Supervisor, folder: Path, tag: str, model: str, **spec: Any) -> list[Any]:
    """What a child says that runs the agent's one sample, with a judge; its conversation is `tag`/1."""
    job = Job(
        kind="run",
        evaluation_id="e",
        execution_id=f"e.{tag}",
        attempt=1,
        spec=Spec(
            task=f"{TASKS}@agent", model=model, task_args={"tag": tag, "judged": True}, model_roles=ROLES, **spec
        ),
        directory=str(folder / tag),
        samples=(SampleRef(id=1, epoch=1),),
    )
    async with supervisor.run(job) as child:
        return [message async for message in child]


async def test_inspect_takes_it_for_a_provider_by_environment_and_by_model_args(models: Models, tmp_path: Path) -> None:
    async with Supervisor({**os.environ, **models.environment()}) as supervisor:
        known = await agent(supervisor, tmp_path, "known", "openai-api/scripted/agent")
        told = await agent(supervisor, tmp_path, "told", "openai-api/unknown/agent", model_args=models.model_args)
    for tag, messages in (("known", known), ("told", told)):
        assert messages[-1] == Done()
        (ended,) = [message.result for message in messages if isinstance(message, SampleEnded)]
        assert ended.error is None
        asked, judged = models.of(f"{tag}/1"), models.of(f"{tag}/1", "judge")
        assert [request.turns for request in asked] == [0, 1, 2]
        assert [request.number for request in judged] == [1]
        assert ended.scores["model_graded_qa"].value == "C"
        tokens = [int(str(usage["total_tokens"])) for usage in ended.usage.values()]
        assert sorted(tokens) == sorted(sum(request.tokens for request in kind) for kind in (asked, judged))

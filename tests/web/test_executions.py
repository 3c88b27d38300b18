"""What the API tells of executions: their attempts, and in words why they are where they are."""

from pathlib import Path
from typing import Any

import httpx

from app.local.stack import Stack
from tests.system.conftest import ended, run, spec, submit, until

SPENDING = f"{Path(__file__).with_name('tasks.py')}@spending"
CALL = 15
"""Tokens of one sample's one model call."""


async def get(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    response = await client.get(path)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def has_spent(view: dict[str, Any]) -> bool:
    """The execution is there, and its first attempt's call was told."""
    return any(attempt["tokens"] for attempt in view.get("attempts", ()))


async def test_a_lost_child_is_an_attempt_with_its_tokens_and_its_evaluation_has_wasted_them(
    client: httpx.AsyncClient, stack: Stack, tmp_path: Path
) -> None:
    how = {"how": f"until:{tmp_path}/go", "then": f"kill-once:{tmp_path}/killed", "n": 2}
    id = await submit(client, spec(SPENDING, task_args=how))
    await until(client, f"/executions/{id}.1", has_spent)
    (tmp_path / "go").touch()
    view = await ended(client, id)
    assert view["state"] == "succeeded", view["error"]
    assert view["tokens"] == {"spent": 3 * CALL, "useful": 2 * CALL, "wasted": CALL}
    assert view["tokens"]["useful"] == view["usage"]["mockllm/model"]["total_tokens"]
    listed = (await get(client, "/evaluations?limit=200"))["evaluations"]
    assert [other["tokens"] for other in listed if other["id"] == view["id"]] == [view["tokens"]]

    execution = await get(client, f"/executions/{view['id']}.1")
    first, second = execution["attempts"]
    keys = ("attempt", "outcome", "error_class", "tokens", "model_calls")
    assert [first[key] for key in keys] == [1, "interrupted", "infrastructure", CALL, 1]
    assert [second[key] for key in keys] == [2, "succeeded", None, CALL, 1]
    for one in (first, second):
        assert one["worker"] == stack.settings.worker
        assert one["push"]["x-cloudtasks-queuename"]
        assert one["seconds"] > 0
    succeeded, lost = execution["explanation"]
    assert succeeded.endswith("ago, in attempt 2.")
    assert lost.startswith("Attempt 1 was interrupted after ")
    assert lost.endswith(f"It had spent {CALL} tokens.")


async def test_what_runs_says_who_holds_it_and_what_its_evaluation_waits_for(
    client: httpx.AsyncClient, stack: Stack, tmp_path: Path
) -> None:
    id = await submit(client, spec(SPENDING, task_args={"how": f"until:{tmp_path}/go", "n": 2}))
    path = f"/executions/{id}.1"
    await until(client, path, has_spent)

    execution = await get(client, path)
    assert (execution["state"], execution["attempts"][0]["tokens"]) == ("running", CALL)
    holds, lasts, sweeper = execution["explanation"]
    assert holds.startswith(f"It runs: worker {stack.settings.worker} (attempt 1) holds it; its lease lasts ")
    assert holds.endswith("and is renewed every 0.5 s.")
    assert f"1 model call, {CALL} tokens" in lasts
    assert sweeper.startswith("The sweeper looks at it next in 2")
    await until(client, f"/executions/{id}.2", lambda view: view["state"] == "succeeded")
    waiting = await get(client, f"/evaluations/{id}/explanation")
    assert waiting["explanation"] == [
        "It runs: 1 of its 2 runs is over; 1 is running.",
        f"It has spent {2 * CALL} tokens.",
    ]
    (worst,) = waiting["executions"]
    assert (worst["id"], worst["explanation"][0][:12]) == (f"{id}.1", holds[:12])

    (tmp_path / "go").touch()
    over = await until(client, f"/evaluations/{id}/explanation", lambda view: view["state"] != "running")
    assert over["explanation"][0].startswith("It succeeded ")
    assert over["executions"] == []


async def test_what_failed_says_what_it_died_of_and_what_to_do(client: httpx.AsyncClient) -> None:
    view = await run(client, spec(SPENDING, task_args={"how": "raise"}, max_failures=2))
    explained = await get(client, f"/evaluations/{view['id']}/explanation")
    assert explained["explanation"][1] == f"It has spent {2 * CALL} tokens, {CALL} of them wasted by retries."
    (failed,) = explained["executions"]
    died, before, todo = failed["explanation"]
    assert "in attempt 2 (evaluation): " in died
    assert "it broke" in died
    assert before.startswith("Attempt 1 failed after ")
    assert todo == f"To run it again: proctor retry {view['id']}"

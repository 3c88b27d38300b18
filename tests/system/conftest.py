"""Helpers to send evaluations through the whole system and wait for what comes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx

from app.ledger import Ledger, Settlement
from app.runner.messages import SampleRef
from app.spec import Spec

TASKS = Path(__file__).with_name("tasks.py")
NUMBERS = f"{TASKS}@numbers"
PATIENCE = 120
"""Seconds: what takes longer is stuck. Nothing here takes more than a few."""


def spec(task: str = NUMBERS, **fields: Any) -> dict[str, Any]:
    return {"task": task, "model": "mockllm/model", "max_failures": 1, **fields}


async def planned(ledger: Ledger, *runs: list[int], **args: Any) -> UUID:
    """An evaluation of the task `numbers` whose plan is settled with these runs."""
    return await fanned_out(
        ledger, Spec(task=NUMBERS, model="mockllm/model", task_args={"n": 4, **args}, max_failures=1), *runs
    )


async def fanned_out(ledger: Ledger, spec: Spec, *runs: Sequence[int | str]) -> UUID:
    evaluation = (await ledger.submit(spec, "me")).evaluation_id
    claim = await ledger.claim(f"{evaluation}.plan", uuid4())
    assert claim
    samples = [[SampleRef(id=id, epoch=1) for id in run] for run in runs]
    await ledger.settle(claim.execution_id, claim.attempt, Settlement("succeeded", runs=samples))
    return evaluation


async def submit(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/evaluations", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def until(client: httpx.AsyncClient, path: str, condition: Any) -> dict[str, Any]:
    """The first answer for which `condition` holds."""
    with anyio.fail_after(PATIENCE):
        while True:
            view: dict[str, Any] = (await client.get(path)).json()
            if condition(view):
                return view
            await anyio.sleep(0.05)


async def ended(client: httpx.AsyncClient, evaluation: str) -> dict[str, Any]:
    return await until(client, f"/evaluations/{evaluation}", lambda view: view["state"] != "running")


async def run(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    return await ended(client, await submit(client, body))


async def samples(client: httpx.AsyncClient, evaluation: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.get(f"/evaluations/{evaluation}/samples")).json()["samples"]
    return found

"""A worker without a working sandbox says so at its start, refuses what needs one in the ledger, and runs everything else."""

from pathlib import Path

from tests.system.conftest import NUMBERS
from tests.system.inside import open_inside

PROGRAMMING = {"task": "proctor/programming", "model": "scripted/agent", "limit": 1}


async def test_what_needs_a_sandbox_is_refused_in_the_ledger(postgres: str, tmp_path: Path) -> None:
    async with open_inside(postgres, tmp_path, sandbox_launchers=("cloud_run",)) as inside:
        submitted = (await inside.client.post("/evaluations", json=PROGRAMMING)).json()
        pushed = await inside.push(f"{submitted['id']}.plan")
        assert (pushed.status_code, pushed.json()["state"]) == (200, "failed")
        error = (await inside.get(f"/executions/{submitted['id']}.plan"))["error"]
        assert error["error_class"] == "infrastructure"
        assert error["message"].startswith("No sandbox works on this worker, so tasks that need one are refused.")
        assert "`sandboxLauncher: true`" in error["message"]
        await inside.planned({"task": NUMBERS, "model": "mockllm/model"})

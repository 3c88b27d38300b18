"""The whole way: HTTP, ledger, queue, pushes, children, results."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.local.stack import Stack
from tests.system.conftest import NUMBERS, TASKS, ended, run, samples, spec, submit, until


async def test_an_evaluation_ends_with_metrics_samples_and_a_log(client: httpx.AsyncClient) -> None:
    view = await run(client, spec(task_args={"n": 4}, tags={"suite": "whole"}))

    assert view["state"] == "succeeded", view["error"]
    (score,) = view["results"]["scores"]
    assert list(score["metrics"]) == ["accuracy", "stderr"]  # in the task's order
    assert score["metrics"]["accuracy"]["value"] == 0.5
    assert score["metrics"]["stderr"]["value"] == pytest.approx(0.2886751)
    assert view["samples"] == {"total": 4, "pending": 0, "running": 0, "succeeded": 4, "failed": 0, "cancelled": 0}
    assert view["usage"]["mockllm/model"]["total_tokens"] == 4 * 15
    assert view["versions"]["inspect_ai"] == "0.3.285"

    rows = await samples(client, view["id"])
    assert [(s["id"], s["scores"]["odd"]["value"]) for s in rows] == [(1, 1), (2, 0), (3, 1), (4, 0)]
    for url in (view["log"], *(s["transcript"] for s in rows)):
        assert Path(url.removeprefix("file://")).stat().st_size > 0


async def test_samples_of_many_epochs_run_apart_and_together_alike(client: httpx.AsyncClient) -> None:
    apart, together = await asyncio.gather(
        run(client, spec(task_args={"n": 3}, epochs=2)),
        run(client, spec(task_args={"n": 3}, epochs=2, samples_per_execution=4)),
    )
    assert apart["results"]["scores"] == together["results"]["scores"]
    assert apart["samples"]["total"] == together["samples"]["total"] == 6
    assert (await client.get(f"/executions/{together['id']}.2")).json()["samples"][0] == {"id": 2, "epoch": 2}


async def test_a_duplicate_push_at_once_and_a_later_one_answer_with_the_first_outcome(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await submit(client, spec(task_args={"n": 1, "how": f"until:{flag}"}))
    execution = f"{evaluation}.1"
    await until(client, f"/executions/{execution}", lambda view: view.get("state") == "running")
    at_once = await asyncio.gather(*(client.post("/tasks/execute", json={"execution_id": execution}) for _ in range(5)))
    assert {r.status_code for r in at_once} == {409}
    assert all("holds it" in r.json()["detail"] for r in at_once)

    flag.touch()
    view = await ended(client, evaluation)
    later = await client.post("/tasks/execute", json={"execution_id": execution})
    assert (later.status_code, later.json()["state"], later.json()["attempt"]) == (200, "succeeded", 1)
    assert view["samples"]["succeeded"] == 1
    assert len((await client.get(f"/executions/{execution}")).json()["attempts"]) == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task": "nobody/knows"}, "nobody/knows"),
        ({"task": f"{TASKS}@missing"}, "missing"),
        ({"task": "no_such_file.py@task"}, "no_such_file.py"),
        ({"task": NUMBERS, "task_args": {"colour": "red"}}, "colour"),
        ({"task": NUMBERS, "model": "acme/gpt"}, "acme"),
        ({"task": NUMBERS, "model": "openai/gpt-5"}, "OPENAI_API_KEY"),
        ({"task": NUMBERS, "model_roles": {"grader": "anthropic/claude"}}, "ANTHROPIC_API_KEY"),
    ],
)
async def test_what_cannot_run_fails_with_an_error_that_names_the_fault(
    client: httpx.AsyncClient, fields: dict[str, object], says: str
) -> None:
    view = await run(client, spec() | fields)
    assert view["state"] == "failed"
    assert says in view["error"]["message"]
    assert "Traceback" not in view["error"]["message"]
    plan = (await client.get(f"/executions/{view['id']}.plan")).json()
    assert (plan["state"], plan["attempt"]) == ("failed", 1)

    inline = {"evaluation": spec() | fields}
    refused = await client.post("/tasks/execute", json=inline, headers={"Idempotency-Key": f"refused {says}"})
    assert refused.status_code == 422
    assert says in refused.json()["detail"]


async def test_a_task_without_samples_fails_and_says_so(client: httpx.AsyncClient) -> None:
    view = await run(client, spec(f"{TASKS}@none"))
    assert view["state"] == "failed"
    assert "no sample" in view["error"]["message"].lower() or "empty" in view["error"]["message"].lower()


async def test_an_errored_sample_fails_the_evaluation_unless_the_spec_allows_it(client: httpx.AsyncClient) -> None:
    broken = {"n": 3, "how": "raise", "sample": 2}
    strict, lenient = await asyncio.gather(
        run(client, spec(task_args=broken)), run(client, spec(task_args=broken, fail_on_error=False))
    )
    assert (strict["state"], lenient["state"]) == ("failed", "succeeded")
    assert "it broke <script>" in strict["error"]["message"]
    for view in (strict, lenient):
        assert view["results"]["completed_samples"] == 2
        assert view["samples"]["failed"] == 1
        (bad,) = [s for s in await samples(client, view["id"]) if s["state"] == "failed"]
        assert bad["error"]["error_class"] == "evaluation"
        assert "it broke" in bad["error"]["message"]


async def test_a_sample_that_fails_once_is_tried_again_and_replaced(client: httpx.AsyncClient, tmp_path: Path) -> None:
    view = await run(client, spec(task_args={"n": 1, "how": f"once:{tmp_path}/flag"}, max_failures=2))
    assert view["state"] == "succeeded"
    execution = (await client.get(f"/executions/{view['id']}.1")).json()
    assert [a["outcome"] for a in execution["attempts"]] == ["failed", "succeeded"]
    assert execution["failures"] == 1


@pytest.mark.parametrize(
    ("how", "says"), [("exit:3", "exit code 3"), ("kill", "SIGKILL")], ids=["exits non-zero", "is killed"]
)
async def test_a_child_that_crashes_is_an_interrupted_attempt_and_in_the_end_a_failure(
    client: httpx.AsyncClient, how: str, says: str
) -> None:
    view = await run(client, spec(task_args={"n": 2, "how": how, "sample": 1}))
    assert view["state"] == "failed"
    assert says in view["error"]["message"]
    execution = (await client.get(f"/executions/{view['id']}.1")).json()
    assert [a["outcome"] for a in execution["attempts"]] == ["interrupted"] * 3 + ["failed"]
    assert {a["error"]["error_class"] for a in execution["attempts"]} == {"infrastructure"}
    assert view["samples"] == {"total": 2, "pending": 0, "running": 0, "succeeded": 1, "failed": 1, "cancelled": 0}


async def test_a_child_that_was_lost_once_is_made_up_for(client: httpx.AsyncClient, tmp_path: Path) -> None:
    view = await run(client, spec(task_args={"n": 2, "how": f"kill-once:{tmp_path}/flag", "sample": 2}))
    assert view["state"] == "succeeded"
    assert view["samples"]["succeeded"] == 2


async def test_a_failed_evaluation_can_be_retried_and_keeps_its_scores(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    failed = await run(client, spec(task_args={"n": 3, "how": f"once:{flag}", "sample": 2}))
    assert failed["state"] == "failed"
    before = {s["id"]: s["transcript"] for s in await samples(client, failed["id"])}

    retried = await client.post(f"/evaluations/{failed['id']}/retry")
    assert (retried.status_code, retried.json()["executions"]) == (202, 1)
    view = await ended(client, failed["id"])
    assert (view["state"], view["samples"]["succeeded"], view["error"]) == ("succeeded", 3, None)
    after = {s["id"]: s["transcript"] for s in await samples(client, failed["id"])}
    assert {i for i in before if before[i] != after[i]} == {2}

    nothing = await client.post(f"/evaluations/{failed['id']}/retry")
    assert nothing.status_code == 409
    assert "nothing to retry" in nothing.json()["detail"]


async def test_a_hanging_evaluation_can_be_cancelled_and_what_was_finished_stays(client: httpx.AsyncClient) -> None:
    evaluation = await submit(client, spec(task_args={"n": 2, "how": "hang", "sample": 2}))
    await until(client, f"/evaluations/{evaluation}", lambda v: v["samples"]["succeeded"] == 1)
    await until(client, f"/executions/{evaluation}.2", lambda v: (v.get("progress") or {}).get("step"))
    for _ in range(2):
        assert (await client.post(f"/evaluations/{evaluation}/cancel")).status_code == 202
    view = await ended(client, evaluation)
    assert view["state"] == "cancelled"
    assert view["samples"] == {"total": 2, "pending": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 1}
    assert view["results"]["completed_samples"] == 1


async def test_a_plan_is_cancelled_before_it_fans_out(client: httpx.AsyncClient, stack: Stack) -> None:
    evaluation = await submit(client, spec())
    await client.post(f"/evaluations/{evaluation}/cancel")
    view = await ended(client, evaluation)
    assert view["state"] in ("cancelled", "succeeded")  # it may have been quicker
    if view["state"] == "cancelled":
        await client.post(f"/evaluations/{evaluation}/retry")
        assert (await ended(client, evaluation))["state"] == "succeeded"


async def test_a_spec_runs_in_one_request_for_a_person_debugging(client: httpx.AsyncClient) -> None:
    body = {"evaluation": spec(task_args={"n": 2})}
    first = await client.post("/tasks/execute", json=body, headers={"Idempotency-Key": "debug-1"})
    assert first.status_code == 200, first.text
    assert first.json()["evaluation"]["state"] == "succeeded"
    assert [s["scores"]["odd"]["value"] for s in first.json()["samples"]] == [1, 0]

    again = await client.post("/tasks/execute", json=body, headers={"Idempotency-Key": "debug-1"})
    assert again.json()["evaluation"] == first.json()["evaluation"]
    other = {"evaluation": spec(task_args={"n": 1})}
    conflict = await client.post("/tasks/execute", json=other, headers={"Idempotency-Key": "debug-1"})
    assert conflict.status_code == 409


async def test_the_same_debugging_request_sent_twice_at_once_runs_once(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    body = {"evaluation": spec(task_args={"n": 1, "how": f"until:{flag}"})}
    headers = {"Idempotency-Key": "debug-3"}
    both = [asyncio.create_task(client.post("/tasks/execute", json=body, headers=headers)) for _ in range(2)]
    await asyncio.wait(
        both, return_when=asyncio.FIRST_COMPLETED
    )  # the one that is refused: the other waits for the flag
    flag.touch()
    done, refused = sorted(await asyncio.gather(*both), key=lambda response: response.status_code)
    assert (done.status_code, refused.status_code) == (200, 409)
    assert f"/evaluations/{done.json()['evaluation']['id']}" in refused.json()["detail"]
    assert done.json()["evaluation"]["state"] == "succeeded"


async def test_more_samples_than_one_request_runs_are_refused_and_leave_no_trace(client: httpx.AsyncClient) -> None:
    body = {"evaluation": spec(task_args={"n": 21}, tags={"trace": "none"})}
    refused = await client.post("/tasks/execute", json=body, headers={"Idempotency-Key": "debug-2"})
    assert refused.status_code == 422
    assert "POST /evaluations" in refused.json()["detail"]
    assert (await client.get("/evaluations", params={"tag": "trace=none"})).json()["evaluations"] == []
    without = await client.post("/tasks/execute", json=body)
    assert without.status_code == 422
    assert "Idempotency-Key" in without.json()["detail"]


def test_the_service_does_not_import_inspect() -> None:
    code = "import sys, app.main, app.cli; sys.exit('inspect_ai' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": os.environ["PATH"]})

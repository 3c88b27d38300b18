"""No value of a secret variable is in the ledger, in a kept outcome, or in any answer of the API, whoever repeats it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from app.spec import Spec
from tests.system.conftest import TASKS
from tests.system.inside import Inside, open_inside
from tests.system.telling_tasks import KEY

VALUE = "sk-proj-0123456789abcdefghij"
PARTS = (VALUE, VALUE[:7], VALUE[-6:], VALUE[8:16])
TELLING = f"{TASKS.with_name('telling_tasks.py')}@telling_task"


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, VALUE)
        async with open_inside(postgres, tmp_path_factory.mktemp("secrets"), max_crashes=1) as inside:
            yield inside


def spec(how: str) -> Spec:
    return Spec(task=TELLING, model="mockllm/model", task_args={"how": how}, max_failures=1)


async def all_told(inside: Inside, evaluation: str) -> str:
    """The ledger's rows, the API's answers, and the outcomes that are kept, as text."""
    executions = [f"{evaluation}.{name}" for name in ("plan", "1", "report")]
    paths = [f"/evaluations/{evaluation}{more}" for more in ("", "/samples", "/explanation")]
    paths += [f"/executions/{execution}" for execution in executions]
    answers = [(await inside.client.get(path)).text for path in paths]
    folder = Path(inside.settings.artifacts.removeprefix("file://"), evaluation)
    kept = [file.read_text() for file in folder.rglob("outcome.json")]
    return "\n".join([json.dumps([list(row) for row in await inside.rows(evaluation)], default=str), *answers, *kept])


@pytest.mark.parametrize("how", ["plan", "raise", "print", ""])
async def test_no_secret_is_told_by_a_child(inside: Inside, how: str) -> None:
    submitted = await inside.client.post("/evaluations", json=spec(how).model_dump(exclude_unset=True))
    evaluation = submitted.json()["id"]
    for execution in ("plan", "1", "report"):
        await inside.client.post("/tasks/execute", json={"execution_id": f"{evaluation}.{execution}"})
        await inside.to_the_end(f"{evaluation}.{execution}")
    assert (await inside.get(f"/evaluations/{evaluation}"))["state"] == ("failed" if how else "succeeded")
    told = await all_told(inside, evaluation)
    assert [part for part in PARTS if part in told] == []
    assert told.count("[redacted]") > 2


def keyed() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid4())}


async def test_nor_by_a_request_that_never_becomes_an_evaluation(inside: Inside) -> None:
    answer = await inside.client.post(
        "/tasks/execute", json={"evaluation": spec("plan").model_dump(exclude_unset=True)}, headers=keyed()
    )
    assert answer.status_code == 422
    assert "no task without [redacted]" in answer.text
    assert VALUE not in answer.text


@pytest.mark.parametrize("path", ["/evaluations", "/tasks/execute"])
async def test_a_spec_with_a_key_is_refused_and_not_told_again(inside: Inside, path: str) -> None:
    body = spec("").model_dump(exclude_unset=True) | {"model_args": {"api_key": "of-the-caller"}}
    for sent in (body, body | {"model_args": {"anything": VALUE}}, body | {"nonsense": VALUE}):
        answer = await inside.client.post(
            path, json=sent if path == "/evaluations" else {"evaluation": sent}, headers=keyed()
        )
        assert answer.status_code == 422, answer.text
        assert "of-the-caller" not in answer.text
        assert VALUE not in answer.text
        assert "must not hold a key" in answer.text or "nonsense" in sent

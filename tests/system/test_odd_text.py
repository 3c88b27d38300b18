"""Text that UTF-8 cannot encode or Postgres cannot store costs no result, wherever it comes from."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.spec import Spec
from tests.system.conftest import fanned_out
from tests.system.inside import Inside, open_inside

TASK = f"{Path(__file__).with_name('odd_text_tasks.py')}@odd_text"
SCORED = ["value", "list", "explanation", "tool", "output", "store", "nothing"]
ERRED = ["error", "scorer"]
ODD = r"half \ud83d and nul \x00"


@pytest.fixture(scope="module")
async def inside(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inside]:
    async with open_inside(postgres, tmp_path_factory.mktemp("odd")) as inside:
        yield inside


async def _run(inside: Inside, where: list[str], pushes: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All of them in one execution."""
    spec = Spec(task=TASK, model="mockllm/model", task_args={"where": where}, max_failures=1)
    ids = list(range(1, len(where) + 1))
    evaluation = await fanned_out(inside.ledger, spec, ids)
    for _ in range(pushes):
        await inside.push(f"{evaluation}.1")
    execution = await inside.get(f"/executions/{evaluation}.1")
    return execution, (await inside.get(f"/evaluations/{evaluation}/samples"))["samples"]


async def test_every_sample_is_recorded_once_whatever_its_text(inside: Inside) -> None:
    execution, samples = await _run(inside, SCORED + ERRED)
    assert (len(execution["attempts"]), execution["crashes"]) == (1, 0)
    by_place = dict(zip(SCORED + ERRED, samples, strict=True))
    assert {name: sample["state"] for name, sample in by_place.items()} == {
        **dict.fromkeys(SCORED, "succeeded"),
        **dict.fromkeys(ERRED, "failed"),
    }
    assert by_place["value"]["scores"]["one"]["value"] == {ODD: ODD, "plain": 1}
    assert by_place["list"]["scores"]["one"]["value"] == [ODD, 1]
    assert by_place["explanation"]["scores"]["one"]["explanation"] == ODD
    for name in ERRED:
        assert ODD in by_place[name]["error"]["message"]


async def test_what_a_child_printed_before_it_crashed_is_kept(inside: Inside) -> None:
    execution, _ = await _run(inside, ["print"])
    (attempt,) = execution["attempts"]
    assert attempt["outcome"] == "interrupted"
    assert r"\x00" in attempt["error"]["message"]

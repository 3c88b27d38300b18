"""The report's results are those of plain Inspect, to the last digit, whatever they are computed with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import EvalLog, read_eval_log

from app.runner.messages import SampleRef
from app.runner.values import NotKept, Values, keep, read, restore, write
from tests.runner import own_tasks
from tests.runner.conftest import Attempt, MakeJob
from tests.runner.own_tasks import OVER, TASKS, Colour, Odd, Pair, Trace
from tests.runner.test_report import merge

pytestmark = pytest.mark.xdist_group("runner")

OWN = f"{own_tasks.__file__}@own"

PLAIN = """
import sys
from inspect_ai import eval
from tests.runner.own_tasks import OVER, TASKS

for name in sys.argv[3:] or TASKS:
    eval(f"{sys.argv[2]}@own", task_args={"name": name}, model="mockllm/model", epochs=OVER.get(name), display="none",
         log_dir=f"{sys.argv[1]}/{name}", log_realtime=False, ctl_server=False)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvalLog]:
    """Each task by Inspect alone."""
    directory = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-c", PLAIN, str(directory), own_tasks.__file__], check=True, capture_output=True)
    return {name: read_eval_log(next((directory / name).glob("*.eval"))) for name in TASKS}


@pytest.mark.parametrize("name", TASKS)
async def test_results_are_those_of_plain_inspect(
    name: str, plain: dict[str, EvalLog], attempt: Attempt, make_job: MakeJob
) -> None:
    merged = await merge(attempt, make_job, OWN, task_args={"name": name}, epochs=OVER.get(name))
    expected = plain[name]
    assert merged.log.status == expected.status, merged.log.error
    if expected.results is None:  # Inspect stopped and says nothing then; the report still counts
        assert merged.log.results is not None
        assert merged.log.results.total_samples == len(merged.log.samples or []) == 4
        return
    assert _picture(merged.log) == _picture(expected)


def _picture(log: EvalLog) -> Any:
    """Early stopping is how an execution skips others' samples; and a score's history is the transcript's."""
    assert log.results is not None
    results = log.results.model_dump(mode="json", exclude={"early_stopping"})
    reductions = [one.model_dump(mode="json") for one in log.reductions or []]
    for reduction in reductions:
        for score in reduction["samples"]:
            score.pop("history", None)
    return json.dumps([results, reductions], indent=1)


async def test_a_metric_that_breaks_costs_neither_the_log_nor_the_counts(attempt: Attempt, make_job: MakeJob) -> None:
    merged = await merge(attempt, make_job, OWN, task_args={"name": "a_metric_that_breaks"})
    failure, error = merged.reported.failure, merged.log.error
    assert failure is not None
    assert error is not None
    assert failure.message == error.message == "The metric 'breaks' failed: RuntimeError: no such luck"
    assert "own_tasks.py" in error.traceback
    assert len(merged.log.samples or []) == 4
    assert merged.reported.results["completed_samples"] == 4


async def test_a_metric_that_misses_a_lost_value_is_named_with_the_remedy(attempt: Attempt, make_job: MakeJob) -> None:
    merged = await merge(attempt, make_job, OWN, task_args={"name": "a_value_that_is_lost"})
    assert merged.reported.failure is not None
    message = merged.reported.failure.message
    assert message.startswith("The metric 'of_odd_values' failed: ZeroDivisionError")
    assert "read values back from JSON if they are of a type that cannot be kept beside it, as Odd here" in message


async def test_an_infinite_value_is_shown_as_what_it_is(attempt: Attempt, make_job: MakeJob) -> None:
    merged = await merge(attempt, make_job, OWN, task_args={"name": "an_infinite_score"})
    metrics = merged.reported.results["scores"][0]["metrics"]
    assert (metrics["mean"]["value"], metrics["endless"]["value"]) == ("Infinity", "Infinity")


@pytest.mark.parametrize(
    "value", [(1, [2]), {1: {"a": (2,)}}, Colour.BLUE, Pair(1, 2), Trace((1,)), {(1, 2): {3}}, 2**70]
)
def test_a_value_that_is_kept_comes_back_as_it_was(value: Any) -> None:
    again = restore(json.loads(json.dumps(keep(value))))
    assert again == value
    assert type(again) is type(value)


def test_nothing_is_imported_because_a_log_says_so() -> None:
    with pytest.raises(NotKept, match="Thing"):
        restore({"kind": "dataclass", "of": {"kind": "dict", "of": []}, "type": ["antigravity", "Thing"]})
    with pytest.raises(NotKept):
        restore({"kind": "dataclass", "of": {"kind": "dict", "of": []}, "type": ["subprocess", "Popen"]})
    with pytest.raises(NotKept, match="Odd"):
        keep([Odd()])


def test_a_log_s_copy_with_values_is_a_log_all_the_same(plain: dict[str, EvalLog], tmp_path: Path) -> None:
    copy = tmp_path / "copy.values.eval"
    copy.write_bytes(Path(plain["dates_in_the_dataset"].location).read_bytes())
    values = {SampleRef(id="a", epoch=1): Values(keep((1, 2)), {"plus": {"metadata": keep({1: 2})}}, ["Odd"])}
    write(copy, values)
    assert read(copy) == values
    assert _picture(read_eval_log(copy)) == _picture(plain["dates_in_the_dataset"])

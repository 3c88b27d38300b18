"""Samples that ran in processes of their own, put together, are one whole evaluation by Inspect."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from anyio import to_thread
from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log

from app.runner.messages import LOGS, Planned, Reported, SampleRef, Transcript
from tests.runner.conftest import Attempt, MakeJob, done, ended, only

pytestmark = pytest.mark.xdist_group("runner")


WHOLE = """
import sys
from inspect_ai import eval
from tests.runner.tasks import many_faced

for errors in (False, True):
    eval(many_faced(errors), display="none", log_dir=f"{sys.argv[1]}/{errors}", log_realtime=False, ctl_server=False)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, EvalLog]:
    """By Inspect alone, in one process; without and with an errored sample."""
    directory = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, "-c", WHOLE, str(directory)], check=True)
    return {errors: read_eval_log(next((directory / str(errors)).glob("*.eval"))) for errors in (False, True)}


class Merged(NamedTuple):
    reported: Reported
    log: EvalLog
    directory: Path


async def merge(
    attempt: Attempt, make_job: MakeJob, task: str, drop: tuple[SampleRef, ...] = (), **spec: Any
) -> Merged:
    plan = make_job("plan", task, spec=spec)
    planned = only(Planned, await attempt(plan))
    transcripts = []
    for n in range(5) if not planned.whole else [None]:  # in executions that mix ids and epochs
        run = make_job("run", task, spec=spec, samples=planned.samples[n::5])
        if run.samples:
            transcripts += [
                Transcript(sample=result.sample, log=Path(run.directory, LOGS, result.log).as_uri())
                for result in ended(await attempt(run))
                if result.sample not in drop
            ]
    report = make_job(
        "report",
        task,
        spec=spec,
        plan_log=str(Path(plan.directory, LOGS, planned.log)),
        transcripts=tuple(reversed(transcripts)),
    )
    messages = await attempt(report)
    assert done(messages).failure is None
    reported = only(Reported, messages)
    directory = Path(report.directory, LOGS)
    return Merged(reported, await to_thread.run_sync(read_eval_log, directory / reported.log), directory)


@pytest.mark.parametrize("errors", [False, True])
async def test_the_parts_together_are_one_whole_evaluation(
    errors: bool, whole: dict[bool, EvalLog], attempt: Attempt, make_job: MakeJob
) -> None:
    merged = await merge(attempt, make_job, "many_faced", task_args={"errors": errors})
    expected, log = whole[errors], merged.log
    assert expected.results is not None
    assert expected.samples is not None
    assert len(expected.results.scores) > 6
    assert log.status == expected.status == "success"
    assert _dump(log.results) == _dump(expected.results)
    assert [_dump(one) for one in log.reductions or []] == [_dump(one) for one in expected.reductions or []]
    assert log.stats.model_usage == expected.stats.model_usage
    assert [(one.id, one.epoch) for one in log.samples or []] == [(one.id, one.epoch) for one in expected.samples]
    assert [one.scores for one in log.samples or []] == [one.scores for one in expected.samples]
    assert all(one.messages for one in log.samples or [])
    for name in ("task", "dataset", "scorers", "metrics", "solver", "model", "task_version", "headline_metric"):
        assert _dump(getattr(log.eval, name)) == _dump(getattr(expected.eval, name)), name
    assert (log.eval.config.epochs, log.eval.config.epochs_reducer) == (3, expected.eval.config.epochs_reducer)
    assert merged.reported.failure is None
    assert merged.reported.results["completed_samples"] == 18 - errors


async def test_the_merged_log_is_a_plain_inspect_log(attempt: Attempt, make_job: MakeJob) -> None:
    merged = await merge(attempt, make_job, "simple")
    logs = await to_thread.run_sync(list_eval_logs, str(merged.directory))
    assert [Path(log.name).name for log in logs] == [merged.reported.log]


@pytest.mark.parametrize(("policy", "fails"), [(None, True), (True, True), (False, False), (0.5, False), (1, True)])
async def test_errors_fail_an_evaluation_as_its_policy_says(
    policy: bool | float | None, fails: bool, attempt: Attempt, make_job: MakeJob
) -> None:
    merged = await merge(attempt, make_job, "one_fails", fail_on_error=policy)
    assert (merged.reported.failure is not None) == fails
    assert merged.log.status == ("error" if fails else "success")
    assert merged.reported.results["total_samples"] == 3
    assert merged.reported.results["completed_samples"] == 2


async def test_a_sample_that_never_ended_counts_as_errored(attempt: Attempt, make_job: MakeJob) -> None:
    merged = await merge(attempt, make_job, "simple", drop=(SampleRef(id=2, epoch=1),))
    assert merged.reported.failure is not None
    assert "1 never ended" in merged.reported.failure.message
    assert [one.id for one in merged.log.samples or []] == [1, 3]


async def test_an_evaluation_of_which_nothing_is_left_is_reported_too(attempt: Attempt, make_job: MakeJob) -> None:
    everything = tuple(SampleRef(id=id, epoch=1) for id in (1, 2, 3))
    merged = await merge(attempt, make_job, "simple", drop=everything, fail_on_error=False)
    assert merged.reported.results["completed_samples"] == 0
    assert merged.log.status == "success"


async def test_samples_that_the_task_stopped_are_not_missing(attempt: Attempt, make_job: MakeJob) -> None:
    merged = await merge(attempt, make_job, "stops_early")
    assert merged.reported.failure is None
    assert len(merged.reported.results["early_stopping"]["early_stops"]) == 2


def _dump(value: Any) -> Any:
    """Numbers within a rounding error of one another are the same."""
    return json.loads(json.dumps(_plain(value), default=str), parse_float=lambda text: round(float(text), 10))


def _plain(value: Any) -> Any:
    match value:
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
    return value.model_dump() if hasattr(value, "model_dump") else value

"""The samples of a run, and of a report, are those that the plan has listed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.runner.messages import Job, Planned, Reported, Transcript
from tests.runner.conftest import Attempt, MakeJob, done, ended, only

pytestmark = pytest.mark.xdist_group("runner")

TASKS = Path(__file__).with_name("same_tasks.py")


@pytest.fixture
def job(make_job: MakeJob) -> MakeJob:
    def make(kind: str, task: str, spec: dict[str, Any] | None = None, **fields: Any) -> Job:
        return make_job(kind, f"{TASKS}@{task}", spec=spec, **fields)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder


async def _planned(attempt: Attempt, plan: Job) -> Planned:
    messages = await attempt(plan)
    assert done(messages).failure is None
    return only(Planned, messages)


@pytest.mark.parametrize("n", [1, 5])
async def test_a_draw_without_a_seed_is_refused_once_with_the_remedy(n: int, attempt: Attempt, job: MakeJob) -> None:
    failure = done(await attempt(job("plan", "drawn", {"task_args": {"n": n}}))).failure
    assert failure is not None
    assert (failure.error_class, failure.final) == ("evaluation", True)
    assert "use a seed" in failure.message


@pytest.mark.parametrize(("task", "says"), [("random_ids", "other ids each time"), ("timed", "keep times")])
async def test_ids_and_values_that_are_made_anew_are_refused(
    task: str, says: str, attempt: Attempt, job: MakeJob
) -> None:
    failure = done(await attempt(job("plan", task))).failure
    assert failure is not None
    assert failure.final
    assert says in failure.message


async def test_loading_is_compared_between_processes_and_not_within_one(attempt: Attempt, job: MakeJob) -> None:
    assert (await _planned(attempt, job("plan", "noted_twice"))).digests


async def test_a_task_that_cannot_be_loaded_twice_at_a_time_is_planned(
    attempt: Attempt, job: MakeJob, tmp_path: Path
) -> None:
    spec = {"task_args": {"folder": str(tmp_path)}}
    assert (await _planned(attempt, job("plan", "breaks_when_loaded_again", spec))).digests


async def test_python_values_and_temporary_files_are_the_same_sample(attempt: Attempt, job: MakeJob) -> None:
    planned = await _planned(attempt, job("plan", "python_values"))
    messages = await attempt(job("run", "python_values", samples=planned.samples, digests=planned.digests))
    assert done(messages).failure is None
    assert len(ended(messages)) == 1


@pytest.mark.parametrize("kind", ["listed", "file_of"])
async def test_a_run_of_what_has_changed_since_the_plan_is_refused(
    kind: str, attempt: Attempt, job: MakeJob, folder: Path
) -> None:
    (folder / "notes.txt").write_text("one")
    spec = {"task_args": {"folder": str(folder)}}
    planned = await _planned(attempt, job("plan", kind, spec))
    (folder / "notes.txt").write_text("two")
    failure = done(await attempt(job("run", kind, spec, samples=planned.samples, digests=planned.digests))).failure
    assert failure is not None
    assert (failure.error_class, failure.final) == ("evaluation", True)
    assert "is not the one that was planned" in failure.message


async def test_a_report_does_not_compute_with_other_samples(attempt: Attempt, job: MakeJob, folder: Path) -> None:
    (folder / "notes.txt").write_text("one")
    spec = {"task_args": {"folder": str(folder)}}
    plan = job("plan", "listed", spec)
    planned = await _planned(attempt, plan)
    run = job("run", "listed", spec, samples=planned.samples, digests=planned.digests)
    (result,) = ended(await attempt(run))
    report = {
        "plan_log": f"{plan.directory}/logs/{planned.log}",
        "transcripts": (
            Transcript(sample=result.sample, log=f"{run.directory}/logs/{result.log}", digest=planned.digests[0]),
        ),
    }
    assert only(Reported, await attempt(job("report", "listed", spec, **report))).failure is None
    (folder / "notes.txt").write_text("two")
    failure = done(await attempt(job("report", "listed", spec, **report))).failure
    assert failure is not None
    assert "is not the one that was planned" in failure.message


def _digests_under(seed: str, task: str) -> str:
    """In an interpreter of its own, as another worker would have it."""
    code = (
        "from app.runner.digest import digest; from tests.runner import same_tasks;"
        f"print([digest(sample) for sample in same_tasks.{task}().dataset])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return told.stdout


def test_a_sample_has_the_same_digest_under_any_hash_seed() -> None:
    assert _digests_under("1", "python_values") == _digests_under("2", "python_values")


def test_the_order_of_a_set_is_seen() -> None:
    assert _digests_under("1", "of_a_set") != _digests_under("2", "of_a_set")

from pathlib import Path
from typing import Any

import pytest

from app.runner.messages import LOGS, Failure, Planned, SampleRef
from tests.runner.conftest import TASKS, Attempt, MakeJob, done, only

pytestmark = pytest.mark.xdist_group("runner")


async def _planned(attempt: Attempt, make_job: MakeJob, task: str, **spec: Any) -> Planned:
    messages = await attempt(make_job("plan", task, spec=spec))
    assert done(messages).failure is None
    return only(Planned, messages)


async def _refused(attempt: Attempt, make_job: MakeJob, task: str, **spec: Any) -> Failure:
    failure = done(await attempt(make_job("plan", task, spec=spec))).failure
    assert failure is not None
    assert failure.final
    assert "[/" not in failure.message  # markup for terminals
    assert "\n" not in failure.message
    return failure


async def test_the_plan_lists_samples_epoch_by_epoch(attempt: Attempt, make_job: MakeJob) -> None:
    planned = await _planned(attempt, make_job, "simple", limit=2, epochs=2)
    assert planned.samples == tuple(SampleRef(id=id, epoch=epoch) for epoch in (1, 2) for id in (1, 2))
    assert not planned.whole
    assert planned.task == "simple"


async def test_the_plan_is_an_inspect_log(attempt: Attempt, make_job: MakeJob) -> None:
    job = make_job("plan", "simple")
    messages = await attempt(job)
    assert Path(job.directory, LOGS, only(Planned, messages).log).is_file()


async def test_ids_stay_numbers_or_text(attempt: Attempt, make_job: MakeJob) -> None:
    planned = await _planned(attempt, make_job, "with_ids", task_args={"ids": [7, "007", "a*"]})
    assert [sample.id for sample in planned.samples] == [7, "007", "a*"]


async def test_a_dataset_without_samples_is_refused(attempt: Attempt, make_job: MakeJob) -> None:
    assert "dataset is empty" in (await _refused(attempt, make_job, "empty")).message


async def test_a_task_that_stops_early_by_itself_is_one_execution(attempt: Attempt, make_job: MakeJob) -> None:
    assert (await _planned(attempt, make_job, "stops_early")).whole


async def test_a_task_may_take_its_models_when_it_is_made(attempt: Attempt, make_job: MakeJob) -> None:
    planned = await _planned(attempt, make_job, "two_models", model="mockllm/a", model_roles={"grader": "mockllm/b"})
    assert planned.samples[0].id == "a b"


async def test_an_argument_of_the_task_may_be_given(attempt: Attempt, make_job: MakeJob) -> None:
    assert len((await _planned(attempt, make_job, "simple", task_args={"n": 5})).samples) == 5


@pytest.mark.parametrize(("seed", "ids"), [(3, False), (None, True)])
async def test_shuffling_with_a_seed_or_ids_is_fine(
    seed: int | None, ids: bool, attempt: Attempt, make_job: MakeJob
) -> None:
    planned = await _planned(attempt, make_job, "shuffled", task_args={"seed": seed, "ids": ids})
    assert len(planned.samples) == 9


async def test_shuffling_without_a_seed_or_ids_is_refused(attempt: Attempt, make_job: MakeJob) -> None:
    assert "use a seed for what is shuffled" in (await _refused(attempt, make_job, "shuffled")).message


@pytest.mark.parametrize("ids", [[7, "7"], ["a", "b", "a"], [1, 1]])
async def test_ids_that_read_the_same_are_refused(ids: list[int | str], attempt: Attempt, make_job: MakeJob) -> None:
    failure = await _refused(attempt, make_job, "with_ids", task_args={"ids": ids})
    assert failure.error_class == "evaluation"
    assert str(ids[-1]) in failure.message


async def test_docker_is_refused_with_advice(attempt: Attempt, make_job: MakeJob) -> None:
    assert "`sandbox: proctor`" in (await _refused(attempt, make_job, "in_docker")).message
    assert (await _planned(attempt, make_job, "in_docker", sandbox="proctor")).samples


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("nothing/like_it", "There is no task 'nothing/like_it'"),
        ("proctor/nothing", "There is no task 'proctor/nothing'"),
        ("nowhere.py@task", "nowhere.py"),
        ("nothing/like_it", "is to be installed where the service runs"),
        (f"{TASKS}@nothing", f"There is no task '{TASKS}@nothing'. Tasks in {TASKS}: "),
        (f"{TASKS}@simpel", "Did you mean 'simple'?"),
        ("tests/runner/tasks.py", "say which of its tasks"),
    ],
)
async def test_a_task_that_does_not_exist_is_refused(task: str, says: str, attempt: Attempt, make_job: MakeJob) -> None:
    failure = await _refused(attempt, make_job, task)
    assert failure.error_class == "evaluation"
    assert says in failure.message


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise RuntimeError('broken on purpose')", "RuntimeError: broken on purpose"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("import sys; sys.exit(4)", "it called exit(4)"),
        ("this is no Python", "SyntaxError"),
    ],
)
async def test_a_task_that_cannot_be_imported_is_refused(
    code: str, says: str, attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    source = f"from inspect_ai import Task, task\n{code}\n@task\ndef broken() -> Task:\n    return Task()\n"
    (tmp_path / "broken.py").write_text(source)
    failure = await _refused(attempt, make_job, f"{tmp_path}/broken.py@broken")
    assert failure.error_class == "evaluation"
    assert says in failure.message


@pytest.mark.parametrize(
    ("task", "arguments", "says"),
    [
        ("simple", {"many": 3}, "takes no argument 'many'; it takes: n"),
        ("with_ids", {}, "missing 1 required positional argument: 'ids'"),
        ("simple", {"n": "three"}, "TypeError"),
    ],
)
async def test_wrong_arguments_are_refused(
    task: str, arguments: dict[str, object], says: str, attempt: Attempt, make_job: MakeJob
) -> None:
    assert says in (await _refused(attempt, make_job, task, task_args=arguments)).message


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"model": "nobody/model"}, "nobody"),
        ({"model": "no-provider"}, "no-provider"),
        ({"model": "anthropic/claude"}, "ANTHROPIC_API_KEY"),
        ({"model": "mistral/large"}, "mistralai"),
        ({"model": "mockllm/model", "model_roles": {"grader": "anthropic/claude"}}, "of the role 'grader'"),
        ({"model": "openai/gpt", "model_args": {"no_such": 1}}, "no_such"),
    ],
)
async def test_a_model_that_cannot_be_used_is_refused(
    spec: dict[str, Any], says: str, attempt: Attempt, make_job: MakeJob
) -> None:
    failure = await _refused(attempt, make_job, "simple", **spec)
    assert failure.error_class == "model"
    assert says in failure.message

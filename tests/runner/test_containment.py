"""Which sandboxes a task may use, and what the child itself may."""

from typing import Any

import pytest

from app.runner.messages import Containment, Failure, SampleRef
from app.spec import SandboxLimits
from tests.runner.conftest import Attempt, MakeJob, done, ended

FIRST = (SampleRef(id=1, epoch=1),)
NONE = Containment(launcher=None, refusal="No sandbox works on this worker: a reason.")


async def _failure(
    attempt: Attempt, make_job: MakeJob, kind: str, task: str, containment: Containment, **spec: Any
) -> Failure:
    job = make_job(kind, task, spec=spec, containment=containment, samples=FIRST if kind == "run" else ())
    failure = done(await attempt(job)).failure
    assert failure is not None
    return failure


@pytest.mark.parametrize("kind", ["plan", "run"])
@pytest.mark.parametrize("by_sample", [False, True])
async def test_a_sandbox_that_is_not_allowed_is_refused_with_advice(
    kind: str, by_sample: bool, attempt: Attempt, make_job: MakeJob
) -> None:
    args = {"kind": "elsewhere", "by_sample": by_sample}
    failure = await _failure(attempt, make_job, kind, "sandboxed", Containment(), task_args=args)
    assert failure.final
    for part in ("'elsewhere'", "PROCTOR_ALLOWED_SANDBOXES", "`sandbox: proctor`"):
        assert part in failure.message


@pytest.mark.parametrize("pattern", ["elsewhere", "else*"])
async def test_one_that_is_allowed_passes_through(pattern: str, attempt: Attempt, make_job: MakeJob) -> None:
    spec = {"task_args": {"kind": "elsewhere"}}
    job = make_job("run", "sandboxed", spec=spec, containment=Containment(allowed=(pattern,)), samples=FIRST)
    (result,) = ended(await attempt(job))
    assert result.error is None
    assert result.scores


async def test_the_spec_s_sandbox_replaces_what_the_task_or_a_sample_declares(
    attempt: Attempt, make_job: MakeJob
) -> None:
    for args in ({"kind": "docker"}, {"kind": "elsewhere", "by_sample": True}):
        job = make_job("run", "sandboxed", spec={"task_args": args, "sandbox": "proctor"}, samples=FIRST)
        (result,) = ended(await attempt(job))
        assert result.error is None, result.error.message


async def test_docker_is_refused_though_it_be_allowed(attempt: Attempt, make_job: MakeJob) -> None:
    held = Containment(allowed=("*",))
    for kind in ("docker", "docker compose.yaml"):
        failure = await _failure(attempt, make_job, "plan", "sandboxed", held, task_args={"kind": kind})
        assert "cannot run here. Set `sandbox: proctor`" in failure.message


async def test_local_must_be_allowed_and_asked_for_by_name(attempt: Attempt, make_job: MakeJob) -> None:
    local = {"task_args": {"kind": "local"}}
    failure = await _failure(attempt, make_job, "plan", "sandboxed", Containment(allowed=("local",)), **local)
    assert "isolates nothing" in failure.message
    failure = await _failure(attempt, make_job, "plan", "sandboxed", Containment(), **local, sandbox="local")
    assert "does not allow" in failure.message
    held = Containment(allowed=("local",))
    (result,) = ended(
        await attempt(make_job("run", "sandboxed", spec={**local, "sandbox": "local"}, containment=held, samples=FIRST))
    )
    assert result.error is None


@pytest.mark.parametrize("kind", ["plan", "run"])
async def test_where_no_launcher_works_only_tasks_that_need_one_are_refused(
    kind: str, attempt: Attempt, make_job: MakeJob
) -> None:
    failure = await _failure(attempt, make_job, kind, "sandboxed", NONE, task_args={"kind": "proctor"})
    assert (failure.error_class, failure.final, failure.message) == ("infrastructure", True, NONE.refusal)
    job = make_job(kind, "simple", containment=NONE, samples=FIRST if kind == "run" else ())
    assert done(await attempt(job)).failure is None


async def test_a_child_that_wants_too_much_memory_fails_by_itself(attempt: Attempt, make_job: MakeJob) -> None:
    held = Containment(child_memory=3 * 2**30)
    spec = {"task_args": {"how": "memory"}}
    (result,) = ended(await attempt(make_job("run", "misbehaving", spec=spec, containment=held, samples=FIRST)))
    assert result.error is not None
    assert "MemoryError" in result.error.message
    assert done(await attempt(make_job("run", "simple", samples=FIRST))).failure is None


async def test_a_spec_s_limits_hold_in_its_samples(attempt: Attempt, make_job: MakeJob) -> None:
    spec = {"task_args": {"kind": "proctor", "command": "ulimit -u"}, "sandbox_limits": {"processes": 16}}
    held = Containment(limits=SandboxLimits(processes=200))
    job = make_job("run", "sandboxed", spec=spec, containment=held, samples=FIRST)
    (result,) = ended(await attempt(job))
    assert result.error is None, result.error.message
    assert result.scores["plain"].answer == "16\n", "what `ulimit -u` says inside"

"""What would fail in every sample for the task's own reason is refused by the plan, once."""

from pathlib import Path
from typing import Any

import pytest

from app.runner.messages import Failure, Planned
from tests.runner.conftest import Attempt, MakeJob, done

pytestmark = pytest.mark.xdist_group("runner")

TASKS = Path(__file__).with_name("hopeless_tasks.py")


async def _plan(attempt: Attempt, make_job: MakeJob, task: str, args: dict[str, Any], **spec: Any) -> Failure | None:
    messages = await attempt(make_job("plan", f"{TASKS}@{task}", spec={"task_args": args, **spec}))
    failure = done(messages).failure
    assert (failure is None) == any(isinstance(message, Planned) for message in messages)
    return failure


async def _refused(attempt: Attempt, make_job: MakeJob, task: str, args: dict[str, Any], **spec: Any) -> str:
    failure = await _plan(attempt, make_job, task, args, **spec)
    assert failure is not None
    assert (failure.error_class, failure.final) == ("evaluation", True)
    assert "\n" not in failure.message
    return failure.message


@pytest.mark.parametrize("how", ["by name", "after another", "in an agent"])
async def test_approval_by_a_human_is_refused(how: str, attempt: Attempt, make_job: MakeJob) -> None:
    assert "asks a human" in await _refused(attempt, make_job, "approved", {"how": how})


@pytest.mark.parametrize(
    "how", ["agent", "solver", "tool", "tool of an agent", "agent of an agent", "within a solver", "in a chain"]
)
async def test_an_agent_that_asks_a_human_is_refused(how: str, attempt: Attempt, make_job: MakeJob) -> None:
    assert "asks a human" in await _refused(attempt, make_job, "asking", {"how": how})


@pytest.mark.parametrize(
    ("task", "how"), [("approved", "automatically"), ("approved", "in an agent, automatically"), ("asking", "nobody")]
)
async def test_what_asks_nobody_is_planned(task: str, how: str, attempt: Attempt, make_job: MakeJob) -> None:
    assert await _plan(attempt, make_job, task, {"how": how}) is None


@pytest.mark.parametrize(
    "args",
    [
        {"count": "many"},
        {"count": [1]},
        {"share": {"of": 1}},
        {"names": 3},
        {"options": "none"},
        {"options": [1]},
    ],
)
async def test_an_argument_of_a_wrong_type_is_refused(
    args: dict[str, Any], attempt: Attempt, make_job: MakeJob
) -> None:
    (name,) = args
    assert f"its argument {name!r}" in await _refused(attempt, make_job, "typed", args)


async def test_arguments_that_code_may_do_with_are_let_through(attempt: Attempt, make_job: MakeJob) -> None:
    """Inspect checks no type: what is text for one task is a number for another."""
    for args in (
        {"count": "5", "share": 1, "names": "abc", "options": {"a": 1}},
        {"count": 1.5, "share": None, "names": ["a"], "options": None, "mode": "c"},
        {"label": 2021, "anything": [{}], "flag": 1},
    ):
        assert await _plan(attempt, make_job, "typed", args) is None


async def test_an_argument_that_the_task_does_not_take_is_refused(attempt: Attempt, make_job: MakeJob) -> None:
    assert "takes no argument 'cuont'" in await _refused(attempt, make_job, "typed", {"cuont": 1})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "compose.yaml").write_text("services:\n  default: {image: a}\n  victim: {image: b}\n")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("task", "how", "sandbox"),
    [
        ("composed", "two", None),
        ("composed", "file", None),
        ("composed", "docker file", "proctor"),
        ("composed_sample", None, None),
    ],
)
async def test_several_sandboxes_for_a_sample_are_refused(
    task: str, how: str | None, sandbox: str | None, folder: str, attempt: Attempt, make_job: MakeJob
) -> None:
    args = {"folder": folder} | ({"how": how} if how else {})
    assert "wants 2 sandboxes" in await _refused(attempt, make_job, task, args, sandbox=sandbox)


async def test_one_sandbox_of_a_compose_file_is_planned(attempt: Attempt, make_job: MakeJob) -> None:
    assert await _plan(attempt, make_job, "composed", {"how": "one"}) is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"id": ""}, "is empty: ''"),
        ({"character": 0xD800}, "half a surrogate pair: 'a\\ud800'"),
        ({"character": 0}, "a NUL character: 'a\\x00'"),
        ({"id": "é" * 501}, "has 1002 bytes"),
        ({"id": "fine"}, "both have the id 'fine'"),
    ],
)
async def test_an_id_that_cannot_be_kept_is_refused_in_a_short_line(
    args: dict[str, Any], says: str, attempt: Attempt, make_job: MakeJob
) -> None:
    message = await _refused(attempt, make_job, "odd_id", args)
    assert says in message
    assert "ample" in message
    assert " 2 of " in message
    assert message.isprintable()
    assert len(message) < 250


async def test_the_longest_id_is_planned(attempt: Attempt, make_job: MakeJob) -> None:
    assert await _plan(attempt, make_job, "odd_id", {"id": "é" * 500}) is None

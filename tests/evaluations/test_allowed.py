"""The operator's bounds on what may be evaluated hold on every way in."""

from unittest.mock import Mock, sentinel

import pytest

from app.errors import InvalidRequest
from app.evaluations.allowed import Allowed
from app.evaluations.submit import Submissions
from app.inline import Inline
from app.spec import Spec
from app.tracing import NO_TRACER

BOUNDED = Allowed(("suite/*", "proctor/programming"), ("openai/*", "mockllm/model"))


def spec(task: str = "suite/one", model: str = "mockllm/model", **roles: str) -> Spec:
    return Spec(task=task, model=model, model_roles=roles)


@pytest.mark.parametrize(
    "allowed",
    [
        spec(),
        spec("suite/sub/one.py@it"),
        spec("proctor/programming"),
        spec(model="openai/gpt-5", grader="openai/gpt-5-mini"),
    ],
)
def test_what_fits_a_pattern_is_allowed(allowed: Spec) -> None:
    BOUNDED.check(allowed)


@pytest.mark.parametrize(
    ("refused", "field"),
    [
        (spec("other/one"), "task"),
        (spec("Suite/one"), "task"),
        (spec("my/suite/one"), "task"),
        (spec("suite/../other/one.py@it"), "task"),
        (spec("proctor/programming2"), "task"),
        (spec(model="anthropic/claude"), "model"),
        (spec(model="mockllm/model2"), "model"),
        (spec(grader="anthropic/claude"), "model_roles.grader"),
    ],
)
def test_what_fits_none_is_refused_with_what_is_allowed(refused: Spec, field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        BOUNDED.check(refused)
    assert [one["field"] for one in error.value.errors] == [field]
    assert ("suite/*, proctor/programming" if field == "task" else "openai/*, mockllm/model") in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "task"),
    [
        ("suite/*", "suite/one.py@it"),
        ("suite/one.py", "suite/one.py@it"),
        ("suite/*.py@it", "suite/sub/one.py@it"),
        ("*@it", "any/one.py@it"),
        ("a@b/*", "a@b/one.py@it"),
        ("a@b/one.py@it", "a@b/one.py@it"),
        ("suite/*", "suite/one"),
    ],
)
def test_each_side_of_the_at_sign_fits_its_side_of_a_pattern(pattern: str, task: str) -> None:
    Allowed((pattern,)).check(spec(task))


@pytest.mark.parametrize(
    ("pattern", "task"),
    [
        ("suite/*", "suite/one.py@other/it"),  # a task of an installed package
        ("suite/*", "suite/one.py@suite/../other"),
        ("suite/*.py@*", "suite/one.py@other/it"),
        ("*/it", "evil.py@x/it"),
        ("*it", "evil.py@it"),
        ("suite/*it", "suite/evil.py@it"),
        ("suite/*@it", "suite/one.py@it@other"),
        ("suite/*@it", "suite/one.py@"),
        ("suite/one.py@it", "suite/one.py"),
        ("suite/*", "suite/..@it"),
        ("suite/*", "suite/sub/../../other.py@it"),
        ("suite/*.py@it", "../suite/one.py@it"),
        ("suite/*", "./suite/one.py@it"),
        ("suite/*", "/elsewhere/suite/one.py@it"),
        ("suite/on?", "suite/*?"),  # as a glob it finds more than it fits
        ("suite/o*", "suite/o[n-z]*"),
    ],
)
def test_neither_side_of_the_at_sign_reaches_past_the_patterns(pattern: str, task: str) -> None:
    with pytest.raises(InvalidRequest, match=r"task: .* is not allowed here"):
        Allowed((pattern,)).check(spec(task))


def test_a_queue_is_one_of_those_that_push_here() -> None:
    allowed = Allowed(queues=("proctor", "openai"))
    allowed.check(spec().model_copy(update={"queue": "openai"}))
    with pytest.raises(InvalidRequest, match=r"queue: 'anthropic' is not allowed here\. Allowed are: proctor, openai"):
        allowed.check(spec().model_copy(update={"queue": "anthropic"}))


def test_by_default_everything_is_allowed() -> None:
    Allowed().check(spec("../anything.py@it", "any/model", grader="any/other"))


async def test_it_is_refused_before_anything_is_written_or_run() -> None:
    """Neither the ledger nor a child is there to be used."""
    submissions = Submissions(sentinel.ledger, sentinel.queue, BOUNDED)
    inline = Inline(Mock(spec_set=["tracer"], tracer=NO_TRACER), submissions, sentinel.reader)
    with pytest.raises(InvalidRequest, match="not allowed here"):
        await submissions.submit(spec("other/one"), "me")
    with pytest.raises(InvalidRequest, match="not allowed here"):
        await inline.run(spec("other/one"), "me", "key")

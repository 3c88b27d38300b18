"""A task gets the Python values that `inspect eval` gives it for the same text, though a spec is JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from inspect_ai._util.config import parse_cli_args
from pydantic import ValidationError

from app.runner.messages import SampleEnded, SampleRef
from app.spec import Spec
from app.yaml_text import MAX_YAML, YAML, carried, python
from tests.runner.conftest import Attempt, MakeJob, done, only

pytestmark = pytest.mark.xdist_group("runner")

TEXTS = [
    "2021-02-03",
    "2021-02-03T10:00:00",
    "2021-02-03 10:00:00+02:00",
    "{1: a, day: 2021-01-01}",
    "[1, 2021-01-01, {2.5: x}]",
    "!!set {a, b}",
    "!!binary aGVsbG8=",
    "!!omap [a: 1]",
    ".inf",
    "1",
    "0.5",
    "yes",
    "null",
    "1:30",
    "{a: {b: [1, null]}}",
    '"007"',
    "some text",
    "123456789012345678901234567890",
]
TAKEN = f"{Path(__file__).with_name('argument_tasks.py')}@given"


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_what_inspect_reads_after_the_way_through_json(text: str) -> None:
    spec = Spec(task="a/b", model="mockllm/model", task_args={"it": carried(text)})
    stored = Spec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json"))))
    (value,) = python(stored.task_args).values()
    expected = parse_cli_args([f"it={text}"])["it"]
    assert (value, type(value)) == (expected, type(expected))


def test_only_what_json_cannot_carry_is_sent_as_yaml() -> None:
    assert [carried(text) for text in ("1", "[a, 1]", "{a: null}")] == [1, ["a", 1], {"a": None}]
    assert carried("{1: a}") == {YAML: "{1: a}"}
    assert python({"really": {YAML: f"{{{YAML}: x}}"}}) == {"really": {YAML: "x"}}


@pytest.mark.parametrize(
    "value",
    [
        {YAML: 1},
        {YAML: "1", "more": 1},
        {YAML: "[1"},
        {YAML: "2021-13-01"},
        {YAML: "[" * 1_000},
        {YAML: "x" * (MAX_YAML + 1)},
        {YAML: "!!python/object/apply:os.getcwd []"},
        [{"deep": {YAML: "[1"}}],
    ],
)
def test_yaml_that_cannot_be_read_is_refused_at_submit(value: Any) -> None:
    for field in ("task_args", "model_args"):
        with pytest.raises(ValidationError, match="YAML"):
            Spec.model_validate({"task": "a/b", "model": "mockllm/model", field: {"it": value}})


async def test_the_task_itself_gets_them(attempt: Attempt, make_job: MakeJob) -> None:
    """Also where its types say so; and Inspect can write its log of them."""
    arguments = {"day": carried("2021-02-03"), "names": carried("{1: a}"), "kinds": carried("!!set {a, b}")}
    for kind, samples in (("plan", ()), ("run", (SampleRef(id=1, epoch=1),))):
        messages = await attempt(make_job(kind, TAKEN, spec={"task_args": arguments}, samples=samples))
        assert done(messages).failure is None
    assert only(SampleEnded, messages).result.error is None

import json

import pytest
from pydantic import JsonValue

from app.runner.excerpt import LENGTH, excerpt
from app.runner.messages import ScoreValue

SHORT: list[JsonValue] = [None, True, 1.5, 10**40, "x" * LENGTH, ["a", 2], {"a": [1, {"b": None}]}, [], {}]
LONG: dict[str, JsonValue] = {
    "a text": "x" * (LENGTH + 1),
    "a list of numbers": list(range(10_000)),
    "a list of texts": ["x" * 900] * 5,
    "a mapping": {f"key {n}": n for n in range(1_000)},
    "a mapping with a long key": {"k" * 5_000: 1, "next": 2},
    "one that is nested": {"judges": [{"says": "y" * 1_500, "notes": list(range(500))}, "z" * 5_000]},
    "one of many empty lists": [[[], {}] for _ in range(5_000)],
}


@pytest.mark.parametrize("value", SHORT, ids=repr)
def test_what_is_short_stays_as_it_is(value: JsonValue) -> None:
    assert excerpt(value) == value


@pytest.mark.parametrize("value", LONG.values(), ids=list(LONG))
def test_what_is_long_keeps_its_beginning_and_says_that_more_was_there(value: JsonValue) -> None:
    kept = excerpt(value)
    assert type(kept) is type(value)
    text = json.dumps(kept, ensure_ascii=False)
    assert len(text) < 1.1 * LENGTH
    assert "…" in text
    assert json.dumps(value, ensure_ascii=False).startswith(text.partition("…")[0].removesuffix('"').rstrip(", "))


def test_nothing_is_said_of_cuts_where_there_are_none() -> None:
    """So that a version of Proctor which knows of none reads it too."""
    assert "cut" not in ScoreValue(value=1).model_dump()
    assert ScoreValue(value="…", cut=("value",)).model_dump(mode="json")["cut"] == ["value"]

import json
from collections import OrderedDict
from decimal import Decimal
from typing import Any

import numpy
import pytest

from app.runner.storable import DEEPEST, storable, storable_text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("plain é 😀 \n\t", "plain é 😀 \n\t"),
        ("half \ud83d.", r"half \ud83d."),
        ("\udc00\ud800", r"\udc00\ud800"),
        ("a whole pair: \ud83d\ude00", "a whole pair: 😀"),
        ("nul \0", r"nul \x00"),
    ],
)
def test_text_that_nothing_can_keep_stays_visible(text: str, kept: str) -> None:
    assert storable_text(text) == kept
    kept.encode()


class _Speechless:
    def __str__(self) -> str:
        raise RuntimeError("no")


def _endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"a": ["\0", {"\ud800": ("\udc00",)}]}, {"a": [r"\x00", {r"\ud800": [r"\udc00"]}]}),
        ({1: "number", "1": "text"}, {"1": "number", "1 (2)": "text"}),
        ({"\0": 1, r"\x00": 2}, {r"\x00": 1, r"\x00 (2)": 2}),
        (b"bytes \xff", r"bytes \xff"),
        (frozenset({7}), [7]),
        (OrderedDict(a=None), {"a": None}),
        ([numpy.int64(3), numpy.float64(0.5), numpy.array([1, 2])], [3, 0.5, [1, 2]]),
        (Decimal("1.5"), "1.5"),
        (_Speechless(), "<_Speechless: no text: RuntimeError>"),
        (True, True),
    ],
)
def test_any_value_becomes_plain_json_and_no_key_replaces_another(value: object, kept: object) -> None:
    assert storable(value) == kept
    json.dumps(storable(value)).encode()


def test_what_has_no_end_is_cut() -> None:
    text = json.dumps(storable([_endless(), 10**5_000]))
    assert text.startswith("[" * DEEPEST)
    assert "[cut:" in text

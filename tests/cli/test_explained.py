"""What is shown of an explanation, for the API's JSON as it may come."""

from typing import Any

from app import explained
from app.client import Json
from tests.cli.test_display import lines

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def attempt(number: int, **fields: Any) -> Json:
    return {
        "attempt": number,
        "worker": "host:99",
        "revision": "",
        "started_at": "2026-01-01T00:00:00Z",
        "seconds": 312.4,
        "outcome": "succeeded",
        "error_class": None,
        "tokens": None,
        "model_calls": None,
        "cost": None,
        **fields,
    }


def execution(*attempts: Json, **fields: Any) -> Json:
    return {
        "id": f"{ID}.1",
        "evaluation_id": ID,
        "state": "failed",
        "samples": [{"id": 7, "epoch": 1}],
        "explanation": ["It failed [bold]\x1b[31m.", "To run it again: …"],
        "attempts": list(attempts),
        **fields,
    }


def test_an_attempt_s_row_has_a_column_for_what_any_attempt_has() -> None:
    bare = lines(explained.attempts([attempt(1)]))
    assert bare[0] == "attempt outcome worker began lasted"
    assert bare[2].startswith("1 succeeded host:99 ")
    assert bare[2].endswith(" 5 min 12 s")
    lost = attempt(1, outcome="interrupted", error_class="infrastructure", tokens=12_340, model_calls=9, cost=0.25)
    full = lines(explained.attempts([lost | {"revision": "r-7"}, attempt(2, outcome=None)]), width=160)
    assert full[0] == "attempt outcome error worker revision began lasted model calls tokens cost"
    assert full[2].startswith("1 interrupted infrastructure host:99 r-7 ")
    assert full[2].endswith(" 5 min 12 s 9 12,340 $0.2500")
    assert full[3].startswith("2 running host:99 ")


def test_an_execution_without_attempts_has_no_table_of_them() -> None:
    assert len(lines(explained.explanation(execution()))) == 3
    assert len(lines(explained.explanation(execution(attempt(1))))) == 7


def test_what_others_wrote_is_neither_markup_nor_control() -> None:
    shown = lines(explained.explanation(execution()))
    assert shown[1] == "It failed [bold]\N{REPLACEMENT CHARACTER}[31m."


def test_samples_are_named_up_to_three() -> None:
    some = [{"id": 7, "epoch": 1}, {"id": "[x]", "epoch": 2}]
    for samples, said in {(): "", tuple(range(1)): " sample 7", tuple(range(2)): " samples 7, [x] (epoch 2)"}.items():
        shown = lines(explained.explanation(execution(samples=[some[n] for n in samples])))
        assert shown[0] == f"execution {ID}.1 failed{said}"
    many = [{"id": n, "epoch": 1} for n in range(5)]
    assert lines(explained.explanation(execution(samples=many)))[0].endswith("samples 0, 1, 2 and 2 more")


def test_a_narrow_terminal_folds_sentences_and_loses_nothing() -> None:
    long = execution(explanation=["word " * 40])
    shown = lines(explained.explanation(long), width=60)
    assert sum(line.count("word") for line in shown) == 40

"""What the tables say, for the API's JSON as it may come."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from app import cells, display, explained
from app.client import Json, Seen


@pytest.mark.parametrize(("state", "says"), [("running", "not known yet"), ("failed", "none were planned")])
def test_samples_of_a_plan_that_failed_are_not_waited_for(state: str, says: str) -> None:
    nothing = dict.fromkeys(VIEW["samples"], 0)
    assert display.counts(VIEW | {"state": state, "samples": nothing}).plain == says


def lines(shown: RenderableType, width: int = 100) -> list[str]:
    """As on a terminal of that width, which reads markup: data must not depend on its console for being safe."""
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(shown)
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def score(name: str = "verify", scorer: str = "verify", *, reducer: str | None = None, **metrics: Any) -> Json:
    named = {key: {"name": key, "value": value} for key, value in metrics.items()}
    return {"name": name, "scorer": scorer, "reducer": reducer, "scored_samples": 4, "metrics": named}


def results(*scores: Json) -> Json:
    return {"total_samples": 4, "completed_samples": 4, "scores": list(scores)}


def sample(id: int | str = 1, epoch: int = 1, error: str | None = None, **scores: Any) -> Json:
    return {
        "id": id,
        "epoch": epoch,
        "state": "failed" if error else "succeeded",
        "scores": {name: {"value": value} for name, value in scores.items()},
        "usage": {"m": {"total_tokens": 1500}, "judge": {"total_tokens": 34}},
        "duration": 12.3,
        "error": {"error_class": "model", "message": error} if error else None,
    }


VIEW: Json = {
    "id": "0f8fad5b-d9cb-469f-a165-70867728950e",
    "state": "failed",
    "cancel_requested": False,
    "spec": {"task": "package/a_task_with_a_long_name", "model": "provider/a_model_with_a_long_name"},
    "samples": {"total": 2, "pending": 0, "running": 0, "succeeded": 1, "failed": 1, "cancelled": 0},
    "results": results(score(accuracy=0.5, stderr=0.25)),
    "tokens": {"spent": 0, "useful": 0, "wasted": 0},
    "usage": None,
    "cost": None,
    "error": None,
    "log": None,
    "created_at": "2026-01-01T00:00:00Z",
    "finished_at": "2026-01-01T02:05:09.5Z",
}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"accuracy": 0.5, "stderr": 0.1}, ["accuracy 0.500 ± 0.100"]),
        ({"accuracy": 1, "stderr": 0.0}, ["accuracy 1.000 ± 0.000"]),
        ({"mean": 7.25, "std": 1.5, "stderr": 0.1}, ["mean 7.250 ± 0.100", "std 1.500"]),
        ({"f1": 0.5, "bootstrap_stderr": 0.1}, ["f1 0.500 ± 0.100"]),
        ({"package/f1": 0.5, "package/stderr": 0.1}, ["package/f1 0.500 ± 0.100"]),
        ({"f1": 0.5, "recall": 0.5, "stderr": 0.1}, ["f1 0.500", "recall 0.500", "stderr 0.100"]),
        (
            {"mean": 0.5, "stderr": 0.1, "bootstrap_stderr": 0.2},
            ["mean 0.500", "stderr 0.100", "bootstrap_stderr 0.200"],
        ),
        ({"accuracy": None, "stderr": None}, ["accuracy – ± –"]),
        ({"tiny": 0.00001, "count": 12, "large": 1234567.8}, ["tiny 1.00e-05", "count 12", "large 1,234,568"]),
        ({"stderr": 0.1}, ["stderr 0.100"]),
    ],
)
def test_a_standard_error_stands_beside_its_mean_and_else_by_itself(metrics: Json, expected: list[str]) -> None:
    shown = lines(display.metrics(results(score(**metrics))))[2:]
    assert shown == [f"verify {line} 4" for line in expected]


def test_the_reducer_is_shown_where_there_are_several() -> None:
    one = lines(display.metrics(results(score(reducer="mean", accuracy=0.5))))
    two = lines(display.metrics(results(score(reducer="mean", accuracy=0.5), score(reducer="pass_at_2", accuracy=1.0))))
    assert (one[0], one[2]) == ("scorer metric value samples scored", "verify accuracy 0.500 4")
    assert two[2:] == ["verify mean accuracy 0.500 4", "verify pass_at_2 accuracy 1.000 4"]


def test_a_scorer_of_several_scores_names_each_and_unscored_samples_are_told() -> None:
    style = score("style", "judge", mean=1.0) | {"unscored_samples": 2}
    assert lines(display.metrics(results(style)))[2:] == ["judge: style mean 1.000 4 of 6"]


@pytest.mark.parametrize("none", [{}, {"scores": []}, {"accuracy": 1}])
def test_results_without_scores_have_no_metrics(none: Json) -> None:
    assert lines(display.metrics(none)) == ["No metrics."]


def test_a_sample_has_a_column_for_each_score_up_to_five() -> None:
    few = [sample(1, verify="C", style=0.123456), sample("x", verify={"a": True})]
    assert lines(display.sample_table(few))[::2][0] == "sample epoch state verify style tokens time"
    assert lines(display.sample_table(few))[2:] == [
        "1 1 succeeded C 0.1235 1,534 12 s",
        'x 1 succeeded {"a": true} – 1,534 12 s',
    ]
    many = lines(display.sample_table([sample(s0=0, s1=1, s2=2, s3=3, s4=4, s5=5)]))
    assert many[0] == "sample epoch state scores tokens time"
    assert "s0 0, s1 1, s2 2, s3 3, s4 4, s5 5" in many[2]


def test_an_error_is_one_line_that_is_cut_to_the_terminal() -> None:
    failed = [sample("[/]x", 2, "slow\ndown [bold] " + "x" * 200)]
    shown = lines(display.evaluation(VIEW, failed), width=60)
    (error,) = [line for line in shown if line.startswith("sample [/]x")]
    assert error.startswith("sample [/]x (epoch 2): model: slow down [bold] xxx")
    assert error.endswith("x…")
    assert len(error) == 60


def test_a_narrow_list_keeps_what_is_short_and_a_wide_one_has_whole_ids() -> None:
    narrow = lines(display.evaluations([VIEW], 80), width=80)
    assert len(narrow) == 3
    assert narrow[2].startswith("0f8fad5b failed 2/2 package/")
    assert "… 0.500 ± 0.250" in narrow[2]
    wide = lines(display.evaluations([VIEW], 200), width=200)
    named = [
        VIEW["id"],
        "failed",
        "2/2",
        VIEW["spec"]["task"],
        VIEW["spec"]["model"],
        "accuracy",
        "0.500",
        "±",
        "0.250",
    ]
    assert wide[2].startswith(" ".join(named))


def test_tokens_are_told_with_what_retries_have_wasted_if_any() -> None:
    few = VIEW | {"tokens": {"spent": 12_340, "useful": 12_340, "wasted": 0}}
    some = VIEW | {"tokens": {"spent": 13_574, "useful": 12_340, "wasted": 1_234}}
    assert "tokens 12,340" in lines(display.evaluation(few))
    assert "tokens 13,574 spent, 1,234 wasted by retries" in lines(display.evaluation(some))
    assert not any("tokens" in line for line in lines(display.evaluation(VIEW)))


def test_watching_tells_what_retries_have_wasted() -> None:
    view = VIEW | {"tokens": {"spent": 13_574, "useful": 12_340, "wasted": 1_234}}
    plain, drawn = StringIO(), StringIO()
    with display.Watch(Console(file=plain, width=200)) as watch:
        watch.update(Seen(VIEW))
        watch.update(Seen(view))
    first, second = plain.getvalue().splitlines()
    assert "tokens" not in first
    assert second.endswith("; tokens: 1,234 wasted by retries")
    with display.Watch(Console(file=drawn, width=200, force_terminal=True, color_system=None)) as watch:
        watch.update(Seen(view))
    assert "tokens: 13,574 spent, 1,234 wasted by retries" in drawn.getvalue()


HOSTILE = "[red]r[/red] [link=http://evil.example]l[/link] :boom: \x1b]8;;http://evil.example\x07u\x1b[2J\x9b31m\u202ex"


def hostile(view: Any, key: str = "") -> Any:
    """With every text that somebody else may have written, names included, written by an attacker."""
    if isinstance(view, dict):
        return {name: hostile(value, name) for name, value in view.items()}
    if isinstance(view, list):
        return [hostile(value, key) for value in view]
    return view if not isinstance(view, str) or key.endswith("_at") else HOSTILE


def test_no_text_of_others_is_read_as_markup_or_reaches_the_terminal_as_control() -> None:
    view = hostile(VIEW | {"error": {"error_class": "model", "message": ""}, "log": ""})
    view["spec"] |= {"tags": {HOSTILE: HOSTILE}, "task_args": {HOSTILE: [HOSTILE]}, HOSTILE: HOSTILE}
    bad = hostile(sample(error="", scorer="")) | {"id": HOSTILE, "scores": {HOSTILE: {"value": HOSTILE}}}
    execution = {"id": "", "evaluation_id": "", "state": "", "samples": [{"id": HOSTILE, "epoch": 2}], "attempts": []}
    told = hostile(execution | {"explanation": [""]})
    written = StringIO()
    console = Console(file=written, width=2000, force_terminal=True, color_system=None, legacy_windows=False)
    parts = [
        display.evaluation(view, [bad], more=True),
        display.evaluations([view], 2000),
        display.sample_table([bad] * 2),
        explained.explanation(told),
        explained.explanation({"id": "", "state": HOSTILE, "explanation": [HOSTILE], "executions": [told]}),
    ]
    for part in parts:
        before = written.tell()
        console.print(part)
        shown = written.getvalue()[before:]
        assert "[red]r[/red] [link=http://evil.example]l[/link] :boom: " in shown
        assert not [c for c in shown if not c.isprintable() and c != "\n"]
    with display.Watch(Console(file=written, width=2000)) as watch:
        watch.update(Seen(view))
    assert not [c for c in written.getvalue() if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (7509.5, "2 h 5 min"),
        (172_799, "47 h 59 min"),
        (200_000, "2 days"),
    ],
)
def test_durations_are_in_their_two_largest_units(seconds: float, expected: str) -> None:
    assert cells.duration(seconds) == expected


def test_what_was_mixed_and_what_is_gone_are_told() -> None:
    mixed = [
        {"name": "inspect_ai", "samples": {"0.3.285": 1, "0.3.286": 1500}, "flagged": True},
        {"name": "container image", "samples": {"sha256:[a]": 1, "sha256:[b]": 1500}, "flagged": False},
    ]
    shown = lines(
        display.evaluation({**VIEW, "mixed_versions": mixed, "transcripts_deleted_at": "2026-04-01T12:00:00Z"})
    )
    assert "mixed inspect_ai: 1 sample by 0.3.285, 1,500 samples by 0.3.286" in shown
    assert "mixed container image: 1 sample by sha256:[a], 1,500 samples by sha256:[b]" in shown
    assert "transcripts deleted on 2026-04-01, being older than is kept" in shown


def test_a_samples_traceback_is_shown_as_it_is_indented_and_without_control_characters() -> None:
    error = {
        "error_class": "evaluation",
        "message": "it broke",
        "traceback": '  File "t.py", line 7\n    f()\x1b[31m\n',
    }
    samples: list[Json] = [{"id": 1, "epoch": 1, "error": error}, {"id": 2, "epoch": 1, "error": None}]
    out = Console(file=StringIO(), width=100)
    out.print(display.chosen(samples, traceback=True))
    assert isinstance(out.file, StringIO)
    shown = [line.rstrip() for line in out.file.getvalue().splitlines()]
    assert shown[0] == "sample 1: evaluation: it broke"
    assert shown[1:3] == ['  File "t.py", line 7', "    f()\N{REPLACEMENT CHARACTER}[31m"]

"""The form that benchmarks and drills share: the same facts as JSON and as a table."""

import io
import json
import os
import platform
import socket

import pytest
from rich.console import Console

from tests.benchmarks import __main__ as benchmarks
from tests.report import Goal, Report, Value, as_json, cell, show

ROWS: list[dict[str, Value]] = [
    {"what": "[bold]ours", "seconds": 1234.567, "count": 15},
    {"what": "theirs", "seconds": 0.012345, "count": None},
]
GOALS = [Goal("ratio", "above 1", 2.345, True), Goal("lost", "none", "3 of 10", False)]
REPORT = Report("speed", ROWS, GOALS, {"cpus": 2})


def table(report: Report, width: int = 100) -> list[str]:
    written = io.StringIO()
    show(report, Console(file=written, width=width))
    return written.getvalue().splitlines()


def test_json_has_the_form_that_programs_read() -> None:
    assert json.loads(as_json(REPORT)) == {
        "name": "speed",
        "machine": {"cpus": 2},
        "rows": ROWS,
        "goals": [
            {"name": "ratio", "goal": "above 1", "measured": 2.345, "met": True},
            {"name": "lost", "goal": "none", "measured": "3 of 10", "met": False},
        ],
    }


def test_several_reports_are_a_list_and_so_is_a_list_of_one() -> None:
    assert [report["name"] for report in json.loads(as_json([REPORT, REPORT]))] == ["speed", "speed"]
    assert len(json.loads(as_json([REPORT]))) == 1


def test_a_report_is_met_if_every_goal_is() -> None:
    assert not REPORT.met
    assert Report("speed", ROWS, GOALS[:1]).met
    assert Report("speed", ROWS).met


def test_columns_of_numbers_are_set_to_the_right_and_others_to_the_left() -> None:
    ours, theirs = (line for line in table(REPORT) if "ours" in line or "theirs" in line)
    assert ours.index("[bold]ours") == theirs.index("theirs")
    assert ours.index("1,235") + len("1,235") == theirs.index("0.0123") + len("0.0123")
    assert ours.index("15") + len("15") == theirs.index("–") + len("–")


def test_a_narrow_terminal_loses_no_column() -> None:
    row = {f"{i} quantities": i for i in range(9)} | {"last": 7777}
    assert "7777" in "".join(table(Report("wide", [row]), width=60))


def test_goals_stand_below_the_rows_with_their_marks() -> None:
    assert table(REPORT)[-2:] == ["✓ ratio: 2.35 (goal: above 1)", "✗ lost: 3 of 10 (goal: none)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1,234"),
        (99.94, "99.9"),
        (-12.34, "-12.3"),
        (1.005, "1.00"),
        (0.5, "0.5"),
        (0.00012345, "0.000123"),
        (0.0, "0.00"),
        (123456, "123456"),
        (True, "yes"),
        (False, "no"),
        (None, "–"),
    ],
)
def test_a_cell_shows_what_its_precision_is_worth(value: Value, text: str) -> None:
    assert cell(value) == text


def test_rows_that_differ_in_their_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="speed differ"):
        Report("speed", [{"a": 1}, {"b": 1}])


def test_the_machine_is_described_but_not_named() -> None:
    described = Report("speed", []).machine
    assert described["cpus"] == len(os.sched_getaffinity(0))
    assert described["python"] == platform.python_version()
    text = json.dumps(described)
    assert "/" not in text
    assert f"{socket.gethostname()} " not in text


def benchmark(monkeypatch: pytest.MonkeyPatch, goals: list[Goal], *arguments: str) -> int:
    """`python -m tests.benchmarks` with two benchmarks, a and b; only b has these goals."""

    async def measure(quick: bool) -> Report:
        return Report("a", [{"quick": quick}])

    async def measure_with_goals(quick: bool) -> Report:
        return Report("b", [{"quick": quick}], goals)

    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"a": measure, "b": measure_with_goals})
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    return benchmarks.main()


def test_one_named_benchmark_prints_an_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(monkeypatch, GOALS, "a", "--json", "--quick") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"quick": True}]


def test_all_benchmarks_print_a_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(monkeypatch, GOALS[:1], "--json") == 0
    assert [report["name"] for report in json.loads(capsys.readouterr().out)] == ["a", "b"]


def test_a_goal_that_is_not_met_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(monkeypatch, GOALS) == 1
    assert "✗ lost" in capsys.readouterr().out

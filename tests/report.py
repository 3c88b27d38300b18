"""The one form in which benchmarks and drills say what they found: as JSON for programs, as a table for people."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Literal

import psutil
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Value = str | float | bool | None
"""A cell; None where the row has nothing of the kind. An int is a float to the type checker."""

NONE = "–"
UNBOUNDED = 1000
"""Columns where there is no terminal: nothing is folded that a program may look for."""


def machine() -> dict[str, Value]:
    """What figures depend on; nothing that would tell whose machine it is."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "proctor": version("proctor"),
        "inspect": version("inspect_ai"),
    }


@dataclass(frozen=True)
class Goal:
    """`goal` says what is wanted in words ("above 1"), of what `name` names; `measured` is what there was."""

    name: str
    goal: str
    measured: float | str
    met: bool


@dataclass(frozen=True)
class Report:
    """Rows have the same keys, which name the unit; a benchmark without goals only measures."""

    name: str
    rows: Sequence[Mapping[str, Value]]
    goals: Sequence[Goal] = ()
    machine: Mapping[str, Value] = field(default_factory=machine)

    def __post_init__(self) -> None:
        if len({tuple(row) for row in self.rows}) > 1:
            raise ValueError(f"the rows of {self.name} differ in their keys")

    @property
    def met(self) -> bool:
        return all(goal.met for goal in self.goals)


def as_json(reports: Report | Sequence[Report]) -> str:
    """One object, or a list of them: {"name", "machine", "rows", "goals": [{"name", "goal", "measured", "met"}]}."""
    form = _form(reports) if isinstance(reports, Report) else [_form(report) for report in reports]
    return json.dumps(form, indent=2, ensure_ascii=False, allow_nan=False)


def _form(report: Report) -> dict[str, object]:
    return {
        "name": report.name,
        "machine": dict(report.machine),
        "rows": [dict(row) for row in report.rows],
        "goals": [asdict(goal) for goal in report.goals],
    }


def show(report: Report, console: Console | None = None) -> None:
    """A table of the rows, the goals below it."""
    console = console or _console()
    machine = ", ".join(f"{name} {cell(value)}" for name, value in report.machine.items())
    console.print(Text(report.name, style="bold"), Text(machine, style="dim"))
    if report.rows:
        console.print(_table(report.rows), crop=False)  # rather wrapped by the terminal than lost
    for goal in report.goals:
        mark = Text("✓", style="green") if goal.met else Text("✗", style="red")
        console.print(mark, Text(f"{goal.name}: {cell(goal.measured)} (goal: {goal.goal})"))


def _console() -> Console:
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = UNBOUNDED
    return made


def _table(rows: Sequence[Mapping[str, Value]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in rows[0]:
        column = [row[name] for row in rows]
        words = " ".join([name, *map(cell, column)]).split()
        justify: Literal["left", "right"] = "right" if _is_of_numbers(column) else "left"
        table.add_column(Text(name), justify=justify, min_width=max(map(len, words)))
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row.values()))
    return table


def _is_of_numbers(column: Sequence[Value]) -> bool:
    return all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in column)


def cell(value: Value) -> str:
    """A fraction with about three digits that mean something; whole numbers as they are."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 or not value else f"{value:.3g}"

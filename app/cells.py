"""What tables and lines for people are made of: values as text.

What they contain is other people's text (tasks' errors, models' answers): it is never read as markup, and control
characters do not reach the terminal.
"""

import json
from datetime import UTC, datetime
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "pending": "dim"}
NONE = "–"
NUMBERS = {
    *("samples", "created", "epoch", "tokens", "time", "value", "samples scored"),
    *("attempt", "lasted", "model calls", "cost"),
}
"""Columns set to the right."""

SHRINKING = {"task", "model", "sample", "worker", "revision"}
"""Columns that give way first where the terminal is narrow."""


def plain(value: object) -> str:
    """On one line, and without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(value).split()))


def text(value: object, style: str = "") -> Text:
    return Text(plain(value), style=style)


def state(name: str) -> Text:
    return text(name, STYLES.get(name, ""))


def number(value: Any) -> str:
    if not isinstance(value, float):
        return plain(NONE if value is None else value)
    if value and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 10_000 else f"{value:,.0f}"


def short(value: Any, most: int = 60) -> str:
    """One value for a cell: numbers rounded, anything longer cut."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    shown = plain(value if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False))
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 5 min`, `3 days`."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def ago(moment: str) -> str:
    """In its largest unit: `3 min ago`."""
    number, unit = duration(since(moment)).split()[:2]
    return f"{float(number):.0f} {unit} ago"


def since(moment: str) -> float:
    return max((datetime.now(UTC) - moment_of(moment)).total_seconds(), 0)


def moment_of(moment: str) -> datetime:
    return datetime.fromisoformat(moment)


def titled(*titles: str) -> Table:
    """A table without rows as yet."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for title in titles:
        justify: Literal["left", "right"] = "right" if title in NUMBERS else "left"
        overflow: Literal["fold", "ellipsis"] = "fold" if title == "sample" else "ellipsis"
        table.add_column(text(title), justify=justify, no_wrap=title not in SHRINKING, overflow=overflow)
    return table

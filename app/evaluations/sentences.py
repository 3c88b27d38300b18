"""What the sentences of an explanation are made of."""

from collections.abc import Mapping
from typing import Any

LONGEST_MESSAGE = 300
"""Characters of an error's message; GET /executions/{id} has it whole."""


def because(error: Mapping[str, Any] | None) -> str:
    """The end of a sentence: whose fault it was, and why."""
    if not error or not error.get("message"):
        return "."
    fault = f" ({error['error_class']})" if error.get("error_class") else ""
    message = one_line(error["message"], LONGEST_MESSAGE)
    return f"{fault}: {message}{'' if message[-1:] in '.!?…' else '.'}"


def one_line(text: object, most: int) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def span(seconds: float) -> str:
    """`0.4 s`, `312 s`, `25 min`, `23 h 58 min`, `3 days`."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 999.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes} min" if hours >= 2 else f"{hours * 60 + minutes} min"


def many(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"

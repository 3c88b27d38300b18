"""What people see of an explanation: sentences, and the attempts at one execution."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.cells import duration, moment_of, state, text, titled
from app.client import Json

SHOWN_SAMPLES = 3


def explanation(view: Json) -> RenderableType:
    """The API's answer for an execution, or for an evaluation."""
    if "evaluation_id" in view:
        parts: list[RenderableType] = [_execution(view)]
        return Group(*parts, "", attempts(view["attempts"])) if view["attempts"] else parts[0]
    worst = [part for execution in view["executions"] for part in ("", _execution(execution))]
    return Group(_titled("evaluation", view), *worst)


def _execution(view: Json) -> Table:
    return _titled("execution", view, _samples(view.get("samples") or ()))


def _titled(what: str, view: Json, of: str = "") -> Table:
    """A sentence a line, below what they are about."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(what, Text(" ").join([text(view["id"], "bold"), state(view["state"]), text(of, "dim")]))
    for sentence in view["explanation"]:
        grid.add_row("", text(sentence))
    return grid


def _samples(samples: Sequence[Json]) -> str:
    names = [f"{one['id']}" if one["epoch"] == 1 else f"{one['id']} (epoch {one['epoch']})" for one in samples]
    more = f" and {len(names) - SHOWN_SAMPLES} more" if len(names) > SHOWN_SAMPLES else ""
    return f"sample{'' if len(names) == 1 else 's'} {', '.join(names[:SHOWN_SAMPLES])}{more}" if names else ""


def attempts(views: Sequence[Json]) -> Table:
    """A line for each; `error` is whose fault its end was. What no attempt has gets no column."""
    columns = {
        "attempt": [text(view["attempt"]) for view in views],
        "outcome": [state(view["outcome"] or "running") for view in views],
        "error": [text(view["error_class"] or "") for view in views],
        "worker": [text(view["worker"]) for view in views],
        "revision": [text(view["revision"]) for view in views],
        "began": [text(f"{moment_of(view['started_at']).astimezone():%m-%d %H:%M:%S}") for view in views],
        "lasted": [text(duration(view["seconds"])) for view in views],
        "model calls": [_count(view["model_calls"]) for view in views],
        "tokens": [_count(view["tokens"]) for view in views],
        "cost": [text("" if view["cost"] is None else f"${view['cost']:,.4f}") for view in views],
    }
    filled = {title: cells for title, cells in columns.items() if any(cell.plain for cell in cells)}
    table = titled(*filled)
    for row in zip(*filled.values(), strict=True):
        table.add_row(*row)
    return table


def _count(n: int | None) -> Text:
    return text(f"{n:,}" if n else "")

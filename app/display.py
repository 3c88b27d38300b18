"""What people see of evaluations: tables, and bars while one runs.

Everything takes the API's own JSON objects.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from app.cells import NONE, STYLES, ago, duration, moment_of, number, plain, short, since, state, text, titled
from app.client import Json, Running, Seen
from app.versions import PRICES

STATES = ("succeeded", "failed", "cancelled", "running", "pending")
MAX_SCORE_COLUMNS = 5
UNBOUNDED = 1000
"""Columns where there is no terminal: nothing is folded or cut that a program may look for."""

ROOMY = 130
"""Columns from which on a list shows whole ids and names."""


def console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = UNBOUNDED
    return made


# Evaluations ----------------------------------------------------------------------------------------------------------


def evaluation(view: Json, samples: Sequence[Json] = (), *, more: bool = False) -> RenderableType:
    """All of one evaluation; `more`: it has more samples than are given."""
    parts: list[RenderableType] = [_head(view)]
    if samples:
        parts += ["", sample_table(samples)]
        if more:
            parts.append(text(f"and more: these are the first {len(samples)} (--samples shows others).", "dim"))
        errors = [sample for sample in samples if sample.get("error")]
        parts += ["", *_errors(errors)] if errors else []
    if view.get("results"):
        parts += ["", metrics(view["results"])]
    return Group(*parts)


def evaluations(views: Sequence[Json], width: int) -> Table:
    """A list, newest first. `width`: columns there are; where they are few, ids are cut to what `proctor show` still
    takes, and the first metric goes without its name."""
    roomy = width >= ROOMY
    table = titled("id", "state", "samples", "task", "model", "score", "created")
    for view in views:
        table.add_row(
            text(view["id"] if roomy else view["id"][:8]),
            state(view["state"]),
            text(f"{done(view)}/{view['samples']['total']}"),
            text(view["spec"].get("task", NONE)),
            text(view["spec"].get("model", NONE)),
            _headline(view.get("results"), roomy),
            text(ago(view["created_at"]), "dim"),
        )
    return table


def _head(view: Json) -> Table:
    spec = dict(view["spec"])
    rows: list[tuple[str, Text | None]] = [
        ("evaluation", Text(" ").join([text(view["id"], "bold"), state(view["state"])])),
        ("", text("is being cancelled", "yellow") if _stopping(view) else None),
        ("", text(view["stop_reason"], "yellow") if view.get("stop_reason") and view["state"] == "running" else None),
        ("task", text(spec.pop("task", NONE))),
        ("model", text(spec.pop("model", NONE))),
        ("spec", text(", ".join(f"{key} {short(value)}" for key, value in spec.items())) if spec else None),
        ("created", _times(view)),
        ("samples", counts(view)),
        ("tokens", spent(view["tokens"]) if view["tokens"]["spent"] else None),
        ("cost", _cost(view) if view.get("cost") is not None else None),
        ("log", text(view["log"]) if view.get("log") else None),
        ("", text(f"without transcripts: {why}", "yellow") if (why := _slim_because(view)) else None),
        ("", _deleted(view["transcripts_deleted_at"]) if view.get("transcripts_deleted_at") else None),
        *(("mixed", _mixture(mixture)) for mixture in view.get("mixed_versions") or []),
        ("error", _error(view["error"]) if view.get("error") else None),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            grid.add_row(name, value)
    return grid


def _slim_because(view: Json) -> str | None:
    because: str | None = (view.get("results") or {}).get("log_without_transcripts")
    return because


def _cost(view: Json) -> Text:
    """`$0.1234`, and by which prices."""
    prices = (view.get("versions") or {}).get(PRICES)
    shown = text(f"${view['cost']:,.4f}")
    return Text.assemble(shown, text(f" by the prices of {prices}", "dim")) if prices else shown


def _deleted(moment: str) -> Text:
    return text(f"transcripts deleted on {moment_of(moment).astimezone():%Y-%m-%d}, being older than is kept", "dim")


def _mixture(mixture: Json) -> Text:
    """`inspect_ai: 3 samples by 0.3.285, 5 samples by 0.3.286`. What may change a result's meaning is in yellow."""
    made = [f"{_many(n, 'sample')} by {version}" for version, n in mixture["samples"].items()]
    return text(f"{mixture['name']}: {', '.join(made)}", "yellow" if mixture["flagged"] else "dim")


def _times(view: Json) -> Text:
    created = moment_of(view["created_at"])
    end = moment_of(view["finished_at"]) if view.get("finished_at") else datetime.now(UTC)
    verb = "took" if view.get("finished_at") else "for"
    return text(f"{created.astimezone():%Y-%m-%d %H:%M:%S %Z}, {verb} {duration((end - created).total_seconds())}")


def _stopping(view: Json) -> bool:
    return bool(view.get("cancel_requested")) and view["state"] == "running"


def counts(view: Json) -> Text:
    """An evaluation's: `5 of 12 done: 4 succeeded, 1 failed, 3 running …`"""
    samples = view["samples"]
    if not samples["total"]:
        return text("not known yet" if view["state"] == "running" else "none were planned", "dim")
    parts = [Text(f"{samples[name]} {name}", STYLES[name]) for name in STATES if samples[name]]
    return Text.assemble(f"{_done(samples)} of {samples['total']} done: ", Text(", ").join(parts))


def spent(tokens: Json) -> Text:
    """`13,574`, or `13,574 spent, 1,234 wasted by retries`."""
    if not tokens["wasted"]:
        return text(f"{tokens['spent']:,}")
    return Text.assemble(f"{tokens['spent']:,} spent, ", text(_wasted(tokens), "yellow"))


def _wasted(tokens: Json) -> str:
    return f"{tokens['wasted']:,} wasted by retries"


def done(view: Json) -> int:
    return _done(view["samples"])


def _done(samples: Json) -> int:
    return int(samples["succeeded"] + samples["failed"] + samples["cancelled"])


# Samples --------------------------------------------------------------------------------------------------------------


def sample_table(samples: Sequence[Json]) -> Table:
    scorers = list(dict.fromkeys(name for sample in samples for name in sample["scores"]))
    separate = len(scorers) <= MAX_SCORE_COLUMNS
    limits = any(sample.get("limit") for sample in samples)
    titles = scorers if separate else ["scores"]
    table = titled("sample", "epoch", "state", *titles, "tokens", "time", *(["limit"] if limits else []))
    for sample in samples:
        scores = sample["scores"]
        cells = [_score(scores.get(name)) for name in scorers] if separate else [_scores(scores)]
        table.add_row(
            text(sample["id"]),
            text(sample["epoch"]),
            state(sample["state"]),
            *cells,
            text(f"{tokens(sample['usage']):,}" if sample["usage"] else NONE),
            text(NONE if sample.get("duration") is None else duration(sample["duration"])),
            *([text(sample.get("limit") or "")] if limits else []),
        )
    return table


def _errors(samples: Sequence[Json]) -> Iterable[Text]:
    """One line each."""
    for sample in samples:
        epoch = f" (epoch {sample['epoch']})" if sample["epoch"] > 1 else ""
        line = Text.assemble(f"sample {plain(sample['id'])}{epoch}: ", _error(sample["error"]))
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line


def chosen(samples: Sequence[Json], *, traceback: bool) -> RenderableType:
    """Some samples by themselves. `traceback`: of each error, as it was recorded: the end of a long one."""
    if not traceback:
        return Group(sample_table(samples), "", *_errors([sample for sample in samples if sample.get("error")]))
    parts: list[RenderableType] = []
    for sample in samples:
        if error := sample.get("error"):
            lines = str(
                error.get("traceback") or "There is no traceback: it is no error of the task's code."
            ).splitlines()
            parts += [*_errors([sample]), *(_code(line) for line in lines), ""]
    return Group(*parts) if parts else text("None of these samples has an error.", "dim")


def _code(line: str) -> Text:
    """As it is indented."""
    return Text(line[: len(line) - len(line.lstrip(" "))] + plain(line))


def _error(error: Json) -> Text:
    fault = f"{error['error_class']}: " if error.get("error_class") else ""
    return text(f"{fault}{error.get('message') or error}", "red")


def _score(score: Json | None) -> Text:
    return text(NONE if score is None else short(score.get("value")))


def _scores(scores: Json) -> Text:
    return text(", ".join(f"{name} {short(score.get('value'))}" for name, score in scores.items()) or NONE)


def tokens(usage: Json) -> int:
    """Of all models."""
    return sum(int(one.get("total_tokens") or 0) for one in usage.values())


# Metrics --------------------------------------------------------------------------------------------------------------


def metrics(results: Json) -> RenderableType:
    """Inspect's `EvalResults`: each metric, beside it its standard error."""
    scores = results.get("scores") or []
    if not scores:
        return text("No metrics.", "dim")
    reducers = len({score.get("reducer") for score in scores}) > 1
    table = titled("scorer", *(["reducer"] if reducers else []), "metric", "value", "samples scored")
    for score in scores:
        for name, value in _with_errors(score.get("metrics") or {}):
            reducer = [text(score.get("reducer") or NONE)] if reducers else []
            table.add_row(_scorer(score), *reducer, text(name), text(value, "bold"), _scored(score))
    return table


def _with_errors(metrics: Json) -> list[tuple[str, str]]:
    """Name and value. A standard error is that of the mean, and stands beside it; where there is none, by itself."""
    errors = {name: m for name, m in metrics.items() if _last(m.get("name", name)) in ("stderr", "bootstrap_stderr")}
    others = {name: m for name, m in metrics.items() if name not in errors}
    means = [name for name, m in others.items() if _last(m.get("name", name)) in ("accuracy", "mean")]
    beside = means or (list(others) if len(others) == 1 else [])
    if len(errors) != 1 or not beside:
        return [(name, number(m["value"])) for name, m in metrics.items()]
    (error,) = (number(m["value"]) for m in errors.values())
    return [
        (name, f"{number(_float(m['value']))} ± {error}" if name in beside else number(m["value"]))
        for name, m in others.items()
    ]


def _float(value: float | None) -> float | None:
    """Beside its error, a count is a number like any other."""
    return None if value is None else float(value)


def _last(name: str) -> str:
    """A metric's own name, without its package's."""
    return name.rpartition("/")[2]


def _scorer(score: Json) -> Text:
    scorer, name = score.get("scorer") or NONE, score.get("name")
    return text(scorer if name in (None, scorer) else f"{scorer}: {name}")


def _scored(score: Json) -> Text:
    scored, unscored = score.get("scored_samples"), score.get("unscored_samples")
    if scored is None:
        return text(NONE)
    return text(f"{scored} of {scored + unscored}" if unscored else scored)


def _headline(results: Json | None, named: bool) -> Text:
    """The first metric, as `EvalResults.headline` has it where the task names none."""
    for score in (results or {}).get("scores") or []:
        for name, value in _with_errors(score.get("metrics") or {}):
            return text(f"{name} {value}" if named else value)
    return text(NONE)


# While it runs --------------------------------------------------------------------------------------------------------


class Watch:
    """Shows an evaluation while it runs: bars on a terminal, which leave nothing behind; else a line whenever something
    changed. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: Seen | None = None
        self._line = ""
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)
        self._spinner = Spinner("dots", style="cyan")

    @property
    def details(self) -> bool:
        """Whether it shows what runs now."""
        return self._console.is_terminal

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, seen: Seen) -> None:
        self._seen = seen
        line = _line(seen)
        if not self._console.is_terminal and line != self._line:
            self._console.print(text(f"{datetime.now(UTC).astimezone():%H:%M:%S} {line}"))
        self._line = line

    def _render(self) -> RenderableType:
        if self._seen is None:
            return ""
        view = self._seen.view
        total = view["samples"]["total"]
        bar = Table.grid(padding=(0, 1))
        what = "stopping" if _stopping(view) else view["state"]
        bar.add_row(
            self._spinner,
            text(f"{view['id'][:8]} {what}", "bold"),
            ProgressBar(total=total or None, completed=done(view), width=32, pulse=not total),
            text(f"{done(view)}/{total}" if total else ""),
            text(duration(since(view["created_at"])), "dim"),
        )
        return Group(bar, *_below(self._seen))


def _below(seen: Seen) -> Iterable[Text]:
    yield Text.assemble("  ", counts(seen.view))
    if seen.view["tokens"]["spent"]:
        yield Text.assemble("  tokens: ", spent(seen.view["tokens"]))
    for running in seen.running:
        yield Text.assemble("  ", text(_running(running), "cyan"))
    if seen.away:
        yield Text.assemble("  ", text(seen.away, "yellow"))


def _running(running: Running) -> str:
    progress = running.progress
    parts = [progress.get("step") or "", _many(progress.get("model_calls"), "model call")]
    used = progress.get("tokens")
    parts.append(f"{used:,} tokens" if used else "")
    return f"{running.what}: {', '.join(part for part in parts if part)}".removesuffix(": ")


def _many(n: int | None, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}" if n else ""


def _line(seen: Seen) -> str:
    if seen.away:
        return "The service is away; the evaluation is not. Waiting for it to answer again."
    stopping = ", being cancelled" if _stopping(seen.view) else ""
    samples = counts(seen.view).plain
    wasted = f"; tokens: {_wasted(seen.view['tokens'])}" if seen.view["tokens"]["wasted"] else ""
    return f"{seen.view['id'][:8]} {seen.view['state']}{stopping}; samples: {samples}{wasted}"

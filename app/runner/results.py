"""An evaluation's results, computed from its samples as Inspect computes them at the end of a run, to the last digit.

With the task's own scorer, metric and reducer objects: a log's header knows their functions by name only.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from inspect_ai import Task

# Private. `recompute_metrics`, which is public, makes metrics and reducers anew from names and plain arguments; and
# `inspect_ai.score` runs scorers. New parameters of this one have had defaults so far, and a test holds its results to
# those of a whole run.
from inspect_ai._eval.task.results import eval_results
from inspect_ai.log import EvalError, EvalLog, EvalResults, EvalSample
from inspect_ai.scorer import SampleScore, Scorer
from inspect_ai.util import EarlyStoppingSummary, registry_info

from app.runner.messages import SampleRef
from app.runner.values import Names, NotKept, Values, names_of, restore, restored


def compute(
    log: EvalLog,
    task: Task,
    samples: Sequence[EvalSample],
    values: Mapping[SampleRef, Values],
    *,
    planned: int,
    early_stopping: EarlyStoppingSummary | None,
) -> EvalError | None:
    """Fills in the results and reductions of `log`. `samples`: in the order of a whole evaluation, slim ones are enough.
    `planned`: how many there should be. Returns why the metrics could not be computed: the counts stand all the same."""
    completed = len(samples) - sum(sample.error is not None for sample in samples)
    log.results = EvalResults(total_samples=planned, completed_samples=completed, early_stopping=early_stopping)
    log.reductions = None
    lost: set[str] = set()
    try:
        if scores := list(_sample_scores(task, samples, values, lost)):
            log.results, log.reductions = eval_results(
                samples=planned,
                scores=scores,
                reducers=task.epochs_reducer,  # stays the task's own where the spec gives a number of epochs
                scorers=task.scorer,
                metrics=task.metrics,
                scorer_names=scorer_names(task.scorer) or None,
                early_stopping=early_stopping,
                completed_samples=completed,
                headline_metric=task.headline_metric,
            )
    except Exception as error:  # the task's own: whatever it raises
        return _explained(error, lost)
    return None


def _sample_scores(
    task: Task, samples: Sequence[EvalSample], values: Mapping[SampleRef, Values], lost: set[str]
) -> Iterator[dict[str, SampleScore]]:
    """As a run has them in memory. With a scorer's score comes the dataset's metadata, copied before the solver ran; with one
    that the solver set, the solver's. The scorers' come first. Errored samples without a score are left out; `score_on_error`
    gives some that have both."""
    names = names_of(task.scorer, task.metrics, task.solver)
    own = dict(zip(scorer_names(task.scorer), task.scorer or (), strict=True))
    metadata = {sample.id: sample.metadata for sample in task.dataset}
    for sample in samples:
        if not sample.scores:
            continue
        kept = values.get(SampleRef(id=sample.id, epoch=sample.epoch), Values(None, {}, []))
        lost.update(kept.lost)
        yield {
            name: SampleScore(
                score=_as_it_was(restored, sample.scores[name], kept.scores.get(name), names, lost),
                sample_id=sample.id,
                sample_metadata=metadata.get(sample.id, sample.metadata)
                if name in own
                else _as_it_was(lambda _, *form: restore(*form), sample.metadata, kept.metadata, names, lost),
                scorer=_unqualified(own[name])
                if name in own
                else None,  # None: Inspect looks for a scorer of that name
            )
            for name in sorted(sample.scores, key=lambda name: name not in own)
        }


def _as_it_was(make: Any, read: Any, form: Any, names: Names, lost: set[str]) -> Any:
    """What was read from the log, or what was kept of it where JSON has lost something."""
    if form is None:
        return read
    try:
        return make(read, form, names)
    except NotKept as error:
        lost.add(str(error))
        return read


def scorer_names(scorers: list[Scorer] | None) -> list[str]:
    """Inspect's names of a task's scorers: the second of one name gets a 1, the third a 2."""
    names: list[str] = []
    for scorer in scorers or ():
        name, number = _unqualified(scorer), 0
        while name in names:
            number += 1
            name = f"{_unqualified(scorer)}{number}"
        names.append(name)
    return names


def _unqualified(registered: Any) -> str:
    return registry_info(registered).name.rpartition("/")[2]


def _explained(error: Exception, lost: set[str]) -> EvalError:
    message = f"The {_culprit(error.__traceback__)} failed: {type(error).__name__}: {error}"
    if lost:
        message += (
            f" Metrics of the report read values back from JSON if they are of a type that cannot be kept beside it, as"
            f" {', '.join(sorted(lost))} here: let the scorer put plain values, dates or dataclasses into Score.metadata."
        )
    return EvalError(message=message, traceback="".join(traceback.format_exception(error)), traceback_ansi="")


def _culprit(at: TracebackType | None) -> str:
    """The metric's name, from Inspect's own call of it; else the first function that is not Inspect's: a reducer, say."""
    first = None
    while at is not None:
        frame = at.tb_frame
        inspects = str(frame.f_globals.get("__name__", "")).startswith(("inspect_ai.", __name__))
        if inspects and callable(metric := frame.f_locals.get("metric")):
            return f"metric {_unqualified(metric)!r}"
        if not inspects and first is None:
            first = getattr(frame.f_code, "co_qualname", frame.f_code.co_name).partition(".")[0]
        at = at.tb_next
    return f"function {first!r}" if first else "results"

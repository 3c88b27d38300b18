"""Tasks whose results depend on objects that a log's header knows by name only, and on values that JSON loses."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage
from inspect_ai.scorer import (
    Metric,
    SampleScore,
    Score,
    Scorer,
    ScoreReducer,
    Target,
    accuracy,
    at_least,
    grouped,
    includes,
    max_score,
    mean,
    mean_score,
    median_score,
    metric,
    mode_score,
    pass_at,
    score_reducer,
    scorer,
    std,
    stderr,
)
from inspect_ai.solver import Generate, Solver, TaskState, solver


class Colour(Enum):
    RED = 3
    BLUE = 4


class Pair(NamedTuple):
    left: int
    right: int


@dataclass(frozen=True)
class Trace:
    steps: tuple[int, ...]


class Odd:
    """Of a kind that nothing keeps."""


@solver
def say(fails: tuple[int, ...] = (), scores: bool = False, notes: bool = False) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output = ModelOutput.from_content("mockllm/model", "fine" if int(state.sample_id) % 3 else "poor")
        state.output.usage = ModelUsage(input_tokens=10, output_tokens=5, total_tokens=15)
        if state.sample_id in fails:
            raise RuntimeError("broken on purpose")
        if notes:
            state.metadata["n"] = 1000
        if scores:
            state.metadata["seen"] = (date(2021, 1, 1), {1: "one"})
            state.scores = {"by_solver": Score(value=int(state.sample_id) / 7)}
        return state

    return solve


def dataset(n: int = 4) -> list[Sample]:
    return [
        Sample(id=i, input=f"q{i}", target="fine", metadata={"n": i, "on": date(2020 + i, 1, 1), "by": {i: (i, i + 1)}})
        for i in range(1, n + 1)
    ]


def summed(look: Callable[[SampleScore], Any]) -> Metric:
    """Its argument's annotation tells Inspect what to give it."""

    def compute(scores: list[SampleScore]) -> float:
        return float(sum(look(score) for score in scores))

    return compute


@metric
def total(key: str = "n") -> Metric:
    return summed(lambda one: (one.sample_metadata or {})[key])


@metric
def years() -> Metric:
    return summed(lambda one: (one.sample_metadata or {})["on"].year)


@metric
def by_number() -> Metric:
    return summed(lambda one: (one.sample_metadata or {})["by"][(one.sample_metadata or {})["n"]][1])


@metric
def of_everything() -> Metric:
    def look(one: SampleScore) -> float:
        held = one.score.metadata or {}
        red, pair, trace, when, spent = (held[name] for name in ("colour", "pair", "trace", "when", "spent"))
        assert isinstance(red, Colour)
        assert isinstance(held["words"], Counter)
        assert isinstance(held["set"], frozenset)
        return float(red.value + pair.left + sum(trace.steps) + when[0].days + float(spent) + held["counts"][0][1])

    return summed(look)


@metric
def of_pairs() -> Metric:
    return summed(lambda one: isinstance(one.score.value, tuple))


@metric
def of_the_solver() -> Metric:
    def look(one: SampleScore) -> int:
        day, words = (one.sample_metadata or {})["seen"]
        return int(day.year) + len(words[1])

    return summed(look)


@metric
def of_odd_values() -> Metric:
    return summed(lambda one: isinstance((one.score.metadata or {})["odd"], Odd) / 0)


@metric
class Spread:
    def __init__(self, times: float = 2.0) -> None:
        self.times = times

    def __call__(self, scores: list[SampleScore]) -> float:
        values = [score.score.as_float() for score in scores]
        return self.times * (max(values) - min(values))


@metric
def breaks() -> Metric:
    def compute(scores: list[SampleScore]) -> float:
        raise RuntimeError("no such luck")

    return compute


@metric
def endless() -> Metric:
    return summed(lambda _: float("inf"))


@score_reducer
def thirds(by: Any = None) -> ScoreReducer:
    return lambda scores: Score(value=(by or float)(sum(score.as_float() for score in scores)) / 3)


@scorer(metrics=[mean(), std(), stderr(cluster="n")])
def plus(by: int = 0) -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=int(state.sample_id) / 7 + state.epoch + by)

    return score


@scorer(metrics=[of_everything()])
def laden() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        metadata = {
            "colour": Colour.RED,
            "pair": Pair(int(state.sample_id), 2),
            "trace": Trace((1, state.epoch)),
            "when": (timedelta(days=2),),
            "spent": Decimal("0.25"),
            "words": Counter("aab"),
            "set": frozenset({1}),
            "counts": {0: {1: 5}},
        }
        return Score(value=1, metadata=metadata)

    return score


@scorer(metrics=[of_pairs()])
def paired() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=(1, 2))

    return score


@scorer(metrics=[of_odd_values()])
def odd() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=1, metadata={"odd": Odd()})

    return score


@scorer(metrics=[mean(), std()])
def some_unscored() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score | None:
        if state.sample_id == 1:
            return Score.unscored()
        return None if state.sample_id == 2 else Score(value=int(state.sample_id))

    return score


@scorer(metrics={"*": [mean(), stderr()]})
def by_key() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value={"a": int(state.sample_id), "b": state.epoch / 3})

    return score


@scorer(metrics=[{"a": [mean()], "b": [mean(), Spread(times=3.0)]}, mean()])
def grouped_keys() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value={"a": int(state.sample_id), "b": 0.1 * state.epoch})

    return score


@scorer(metrics=[breaks()])
def unlucky() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=1)

    return score


@scorer(metrics=[mean(), endless()])
def infinite() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=float("inf") if state.sample_id == 1 else 1.0)

    return score


def half(value: Any) -> float:
    return float(value == "C") / 2 if isinstance(value, str) else float(value) / 2


TASKS: dict[str, dict[str, Any]] = {
    "a_function_in_a_metric": {"scorer": includes(), "metrics": [accuracy(to_float=half), total()]},
    "a_function_in_a_reducer": {"scorer": plus(), "epochs": Epochs(2, [mean_score(value_to_float=half)])},
    "a_function_in_the_scorer_s_metric": {"scorer": [includes(), plus(by=3)], "metrics": [mean(to_float=half)]},
    "several_reducers": {
        "scorer": plus(),
        "epochs": Epochs(3, [mean_score(), median_score(), max_score(half), mode_score()]),
    },
    "reducers_that_count": {"scorer": includes(), "epochs": Epochs(3, [pass_at(2), at_least(1)])},
    "a_reducer_of_its_own": {"scorer": plus(), "epochs": Epochs(2, thirds(by=half))},
    "no_reducer": {"scorer": plus(), "epochs": Epochs(2, [])},
    "epochs_laid_over": {"scorer": plus(), "epochs": Epochs(1, mean_score(value_to_float=half))},
    "dates_in_the_dataset": {"scorer": plus(), "metrics": [years(), total()], "epochs": 2},
    "numbers_as_keys": {"scorer": plus(), "metrics": [by_number()]},
    "values_of_all_kinds": {"scorer": laden(), "epochs": 2},
    "a_tuple_as_value": {"scorer": paired()},
    "a_solver_s_notes": {"scorer": plus(), "metrics": [total()], "solver": say(notes=True)},
    "a_solver_s_scores": {"scorer": plus(), "solver": say(scores=True)},
    "a_solver_s_scores_alone": {"scorer": None, "solver": say(scores=True), "metrics": [of_the_solver(), mean()]},
    "a_class_as_metric": {"scorer": plus(), "metrics": [Spread(times=4.0)]},
    "groups": {"scorer": plus(), "metrics": [grouped(mean(), "n"), grouped(mean(to_float=half), "n", all="samples")]},
    "metrics_by_key": {"scorer": by_key(), "epochs": 2},
    "metrics_by_some_keys": {"scorer": grouped_keys(), "epochs": 2},
    "one_scorer_twice": {"scorer": [includes(), includes(ignore_case=False)]},
    "two_scorers_of_one_name": {"scorer": [plus(), plus(by=1), plus(by=2)]},
    "unscored_samples": {"scorer": some_unscored(), "epochs": Epochs(2, mean_score())},
    "errored_samples": {"scorer": plus(), "epochs": 2, "solver": say(fails=(1, 3)), "fail_on_error": False},
    "errored_and_scored": {
        "scorer": plus(),
        "solver": say(fails=(1, 3)),
        "fail_on_error": False,
        "score_on_error": True,
    },
    "errored_at_the_threshold": {"scorer": plus(), "solver": say(fails=(1, 3)), "fail_on_error": 0.5},
    "no_scorer": {"scorer": None},
    "an_infinite_score": {"scorer": infinite()},
    "a_metric_that_breaks": {"scorer": unlucky()},
    "a_value_that_is_lost": {"scorer": odd()},
}
OVER: dict[str, int] = {"epochs_laid_over": 3}
"""Epochs that the spec lays over the task's own."""


@task
def own(name: str) -> Task:
    return Task(**{"dataset": dataset(), "solver": say(), "name": name, **TASKS[name]})

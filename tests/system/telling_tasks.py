"""Tasks that repeat the model provider's key wherever they can, as providers' errors, tasks and judges do."""

import os
import sys
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Metric, SampleScore, Score, Target, accuracy, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

KEY = "SCRIPTED_API_KEY"


@metric
def telling() -> Metric:
    def of(scores: list[SampleScore]) -> dict[str, Any]:
        return {f"of {os.environ[KEY]}": 1.0}

    return of


@scorer(metrics=[accuracy(), telling()])
def repeating():  # type: ignore[no-untyped-def]  # Inspect's decorator gives it its type
    async def score(state: TaskState, target: Target) -> Score:
        key = os.environ[KEY]
        return Score(value="C", answer=f"it is {key}", explanation=f"{'so ' * 661}{key}", metadata={"key": key})

    return score


@solver
def repeat(how: str) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        key = os.environ[KEY]
        if how == "raise":
            raise RuntimeError(
                f"Incorrect API key provided: {key[:7]}***{key[-4:]}, that is {key!r}. {'so ' * 300}{key}"
            )
        if how == "print":
            print(f"the key {key} is not accepted", file=sys.stderr, flush=True)
            os._exit(3)
        return state

    return solve


@task
def telling_task(how: str = "") -> Task:
    if how == "plan":
        raise ValueError(f"no task without {os.environ[KEY]}")
    return Task(dataset=[Sample("?", target="x", id=1)], solver=repeat(how), scorer=repeating())

"""An Inspect task whose samples all run at the same time: each marks that it has begun, and waits for a sign."""

from pathlib import Path

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, solver


@solver
def gather(marks: str) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        Path(marks, f"{state.sample_id}.begun").touch()
        while not Path(marks, "go").exists():
            await anyio.sleep(0.1)
        return state

    return solve


@task
def gathering(n: int = 1, marks: str = ".", first: int = 1) -> Task:
    samples = [Sample(id=i, input="?", target="!") for i in range(first, first + n)]
    return Task(dataset=samples, solver=gather(marks), scorer=includes())

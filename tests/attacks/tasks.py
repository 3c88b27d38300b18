"""One sample for each attack, and a neighbour whose workspace is another sample's."""

import os
from typing import Any

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import sandbox

from tests.attacks.attacks import ATTACKS, NEIGHBOUR, SECONDS

_IS_THERE = "neighbour"


class _Together:
    """The neighbour is there before the first attack and stays until the last is over."""

    def __init__(self) -> None:
        self.there = anyio.Event()
        self.over = anyio.Event()
        self.left = 0


@task
def attacks(names: list[str], targets: dict[str, Any]) -> Task:
    samples = [Sample(id=name, input=f"Try this: {name}") for name in (_IS_THERE, *names)]
    return Task(dataset=MemoryDataset(samples), solver=attack(len(names), targets), scorer=got_through())


@solver
def attack(count: int, targets: dict[str, Any]) -> Solver:
    together = _Together()
    together.left = count
    seen = targets | {"harness": os.getpid(), "neighbour": NEIGHBOUR}

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output = ModelOutput.from_content("attacker", "I tried.")
        if state.sample_id == _IS_THERE:
            await sandbox().write_file("neighbour.txt", NEIGHBOUR)
            together.there.set()
            with anyio.fail_after(SECONDS * 5):
                await together.over.wait()
            return state
        await together.there.wait()
        try:
            state.metadata["reached"] = await ATTACKS[str(state.sample_id)].run(sandbox(), seen)
        finally:
            together.left -= 1
            if together.left == 0:
                together.over.set()
        return state

    return solve


@scorer(metrics=[mean()])
def got_through() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=int(state.metadata.get("reached", 0)))

    return score

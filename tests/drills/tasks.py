"""Inspect tasks for the drills: given to children by the path of this file. Light, and told apart by their `tag`.

A sample's score follows from its id alone (`score_of`), so that a wrong or foreign result shows.
"""

import os
import signal
from pathlib import Path

import anyio
from inspect_ai import Task, task
from inspect_ai.agent import react
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Scorer, Target, mean, model_graded_qa, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import Tool, tool


def score_of(sample: int) -> float:
    """Inspect's own scorers are not what is drilled; this one can be computed by the checker too."""
    return sample % 7 / 7


@scorer(metrics=[mean(), stderr()])
def known() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=score_of(int(state.sample_id)), answer=state.metadata["tag"])

    return score


@solver
def work(seconds: float, how: str, flags: str) -> Solver:
    """One model call whose usage is known, in `seconds`. `how`: "" | "raise" (always) | "once" (raises the first time) |
    "kill" (ends its own process the first time) | "wait" (for the flag); in the first sample only. `flags`: a folder that
    outlives processes."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        await anyio.sleep(seconds)
        if state.sample_id == 1:
            await _misbehave(how, Path(flags, state.metadata["tag"]))
        output = ModelOutput.from_content("mockllm/model", "fine")
        output.usage = ModelUsage(input_tokens=10, output_tokens=5, total_tokens=15)
        state.output = await get_model("mockllm/model", custom_outputs=[output], memoize=False).generate(state.messages)
        return state

    return solve


async def _misbehave(how: str, flag: Path) -> None:
    while how == "wait" and not flag.exists():
        await anyio.sleep(0.05)
    if how == "raise":
        raise RuntimeError("it breaks each time")
    if how in ("once", "kill") and not flag.exists():
        flag.touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("it broke this once")


@task
def plain(tag: str, n: int = 4, seconds: float = 0.0, how: str = "", flags: str = "") -> Task:
    samples = [Sample(id=i, input=f"number {i}", target="x", metadata={"tag": tag}) for i in range(1, n + 1)]
    return Task(dataset=samples, solver=work(seconds, how, flags), scorer=known())


@tool
def bash() -> Tool:
    """No sandbox: what a turn costs here is the turn, not a process."""

    async def execute(command: str) -> str:
        """Runs a command.

        Args:
            command: The command to run.
        """
        return f"ran {command}"

    return execute


@task
def agent(tag: str, n: int = 1, judged: bool = False) -> Task:
    """Asks its model for turns until it submits. Its conversations are named `TAG/ID`. `judged`: by a model, too."""
    samples = [
        Sample(id=i, input=f"This is conversation {tag}/{i}", target="x", metadata={"tag": tag})
        for i in range(1, n + 1)
    ]
    return Task(
        dataset=samples, solver=react(tools=[bash()]), scorer=[known(), *([model_graded_qa()] if judged else [])]
    )

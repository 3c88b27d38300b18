"""Inspect tasks for tests: small, quick, and wrong in every way that a task can be.

`mockllm` answers; usage is set, or it would download a tokenizer to count tokens.
"""

import os
import signal
from pathlib import Path

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver


@scorer(metrics=[accuracy(), stderr()])
def odd():  # type: ignore[no-untyped-def]  # Inspect's decorator gives it its type
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=int(state.sample_id) % 2, answer="<b>bold</b> [red]red[/red]")

    return score


@solver
def ask() -> Solver:
    """One model call whose usage is known."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        output = ModelOutput.from_content("mockllm/model", "fine")
        output.usage = ModelUsage(input_tokens=10, output_tokens=5, total_tokens=15)
        state.output = await get_model("mockllm/model", custom_outputs=[output], memoize=False).generate(state.messages)
        return state

    return solve


@solver
def misbehave(how: str, sample: int) -> Solver:
    """`how` it goes wrong, in that sample only. `flag` files outlive a process, so that only a first attempt fails."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if int(state.sample_id) != sample:
            return state
        kind, _, argument = how.partition(":")
        if kind == "raise":
            raise RuntimeError("it broke <script>alert(1)</script>")
        if kind == "exit":
            os._exit(int(argument))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "mark":
            with Path(argument).open("a") as file:
                file.write(f"{sample}\n")
        if kind == "hang":
            await anyio.sleep_forever()
        if kind == "wait":
            await anyio.sleep(float(argument))
        if kind == "until":
            while not Path(argument).exists():
                await anyio.sleep(0.05)
        if kind in ("once", "kill-once") and not Path(argument).exists():
            Path(argument).touch()
            if kind == "kill-once":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("it broke this once")
        return state

    return solve


@task
def numbers(n: int = 4, how: str = "", sample: int = 1, epochs: int = 1) -> Task:
    """Scores 1 for odd ids, 0 for even ones."""
    samples = [Sample(id=i, input=f"number {i}", target="x") for i in range(1, n + 1)]
    return Task(dataset=samples, solver=[misbehave(how, sample), ask()], scorer=odd(), epochs=epochs)


@task
def none() -> Task:
    """Lists no sample when asked for the first 0 of them: an empty dataset is what Inspect refuses itself."""
    return Task(dataset=[], solver=[], scorer=odd())

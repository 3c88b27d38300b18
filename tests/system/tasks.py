"""Inspect tasks for tests: small, quick, and wrong in every way that a task can be.

`mockllm` answers; usage is set, or it would download a tokenizer to count tokens.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalSpec
from inspect_ai.model import ChatMessageUser, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import EarlyStop
from pydantic import JsonValue


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
    """`how` it goes wrong, in that sample only."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if int(state.sample_id) == sample:
            await _misbehave(how, sample)
        return state

    return solve


@solver
def misbehave_each(hows: list[str]) -> Solver:
    """The first sample by the first of them, and so on."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        await _misbehave(hows[int(state.sample_id) - 1], int(state.sample_id))
        return state

    return solve


async def _misbehave(how: str, sample: int) -> None:
    """`flag` files outlive a process, so that only a first attempt fails."""
    kind, _, argument = how.partition(":")
    if kind == "raise":
        raise RuntimeError("it broke <script>alert(1)</script>")
    if kind == "exit":
        os._exit(int(argument))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "kill-until":
        await _kill_until(*map(Path, argument.split(":")))
    if kind == "memory":
        _take_all_memory(argument)
    if kind == "mark":
        with Path(argument).open("a") as file:
            file.write(f"{sample}\n")
    if kind == "fail":
        _fail(*argument.split(":"))
    if kind == "hang":
        await anyio.sleep_forever()
    if kind == "spawn":
        _start_another_and_be_deaf(argument)
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


async def _kill_until(mark: Path, flag: Path) -> None:
    """Takes its process with it the first time, and from then on waits to be killed, until there is the flag."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not flag.exists():
        await anyio.sleep(0.05)


def _fail(times: str, marks: str) -> None:
    """The first so many times that it is called. Each leaves a line in `marks`."""
    with Path(marks).open("a") as file:
        file.write("called\n")
    if len(Path(marks).read_text().split()) <= int(times):
        raise RuntimeError("it broke once more")


def _take_all_memory(cgroup: str) -> NoReturn:
    """Until the kernel ends it, in a memory cgroup; without one it is ended the same way."""
    if not cgroup:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while True:
        taken.append(b"x" * 2**20)


def _start_another_and_be_deaf(file: str) -> NoReturn:
    """A process of its own that writes to `file` as long as it lives, its pid first. Interrupts are not heard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = "import os, sys, time\nprint(os.getpid(), flush=True)\nwhile print(0, flush=True) is None: time.sleep(0.02)"
    with Path(file).open("w") as output:
        subprocess.Popen([sys.executable, "-c", code], stdout=output, stdin=subprocess.DEVNULL)
    while True:
        time.sleep(1)


@task
def numbers(n: int = 4, how: str = "", sample: int = 1, epochs: int = 1) -> Task:
    """Scores 1 for odd ids, 0 for even ones."""
    samples = [Sample(id=i, input=f"number {i}", target="x") for i in range(1, n + 1)]
    return Task(dataset=samples, solver=[misbehave(how, sample), ask()], scorer=odd(), epochs=epochs)


@task
def named(name: str) -> Task:
    """Its log's file is named after it."""
    samples = [Sample(id=i, input=f"number {i}", target="x") for i in (1, 2)]
    return Task(dataset=samples, solver=ask(), scorer=odd(), name=name)


@solver
def leak(marker: str, quiet: int) -> Solver:
    """Says it wherever a sample can, and ends in each of the ways that samples do. `quiet`: the sample that ends well."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        print(marker, flush=True)
        print(marker, file=sys.stderr, flush=True)
        if state.sample_id == quiet:
            return state
        if state.sample_id == quiet + 1:
            raise RuntimeError(marker)
        if state.sample_id == quiet + 2:
            raise OSError(marker)
        os.kill(os.getpid(), signal.SIGKILL)
        return state

    return solve


@task
def marked(marker: str) -> Task:
    """Four samples whose prompt is the marker: one is scored, two raise it, one crashes after printing it."""
    samples = [Sample(id=i, input=marker, target=marker) for i in range(1, 5)]
    return Task(dataset=samples, solver=[leak(marker, 1), ask()], scorer=odd())


@task
def versioned(file: str) -> Task:
    """Its own version is what the file says: a deploy may change it."""
    samples = [Sample(id=i, input=f"number {i}", target="x") for i in (1, 2, 3)]
    return Task(dataset=samples, solver=[ask()], scorer=odd(), version=Path(file).read_text())


@task
def each(hows: list[str]) -> Task:
    """A sample for each."""
    samples = [Sample(id=i, input=f"number {i}", target="x") for i in range(1, len(hows) + 1)]
    return Task(dataset=samples, solver=[misbehave_each(hows), ask()], scorer=odd())


@solver
def converse(turns: int) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        for _ in range(turns):
            state = await generate(state)
            state.messages.append(ChatMessageUser(content="Go on."))
        return state

    return solve


@task
def talk(name: str, turns: int = 1) -> Task:
    """Turn after turn with the spec's model, which knows it by its name."""
    sample = Sample(id=1, input=f"This is conversation {name}.", target="x")
    return Task(dataset=[sample], solver=converse(turns), scorer=odd())


@task
def slow(flag: str) -> Task:
    """Takes until there is such a file to be loaded."""
    while not Path(flag).exists():
        time.sleep(0.05)
    return numbers()


@task
def lethal(flag: str) -> Task:
    """Takes its process with it as it is loaded, unless there is such a file."""
    if not Path(flag).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers()


@task
def none() -> Task:
    """Lists no sample when asked for the first 0 of them: an empty dataset is what Inspect refuses itself."""
    return Task(dataset=[], solver=[], scorer=odd())


class StopAfter:
    """Begins so many samples."""

    def __init__(self, most: int) -> None:
        self._left = most

    async def start_task(self, task: EvalSpec, samples: list[Sample], epochs: int) -> str:
        return "stop after"

    async def schedule_sample(self, id: str | int, epoch: int) -> EarlyStop | None:
        self._left -= 1
        return EarlyStop(id=id, epoch=epoch, reason="enough") if self._left < 0 else None

    async def complete_sample(self, id: str | int, epoch: int, scores: object) -> None: ...

    async def complete_task(self) -> dict[str, JsonValue]:
        return {}


@task
def stops_early(flag: str) -> Task:
    """The first time after three samples, of which the third fails; then after two."""
    first = not Path(flag).exists()
    samples = [Sample(id=n, input=f"question {n}") for n in range(1, 5)]
    return Task(
        dataset=samples,
        solver=[misbehave(f"once:{flag}", 3), ask()],
        scorer=odd(),
        early_stopping=StopAfter(3 if first else 2),
    )

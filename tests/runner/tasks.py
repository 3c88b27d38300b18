"""Inspect tasks for the tests: given to children by the path of this file. No network, no downloads."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from typing import Any, cast

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import EvalSpec
from inspect_ai.model import Model, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import (
    SampleScore,
    Score,
    Scorer,
    Target,
    accuracy,
    grouped,
    mean,
    metric,
    scorer,
    stderr,
)
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver
from inspect_ai.util import EarlyStop, sandbox, sandboxenv
from inspect_ai.util._sandbox.local import LocalSandboxEnvironment


def model() -> Model:
    """Its outputs come with their usage: Inspect would count the tokens otherwise, with a tokenizer to download."""

    def answer(*_: object) -> ModelOutput:
        output = ModelOutput.from_content("mockllm/model", "x")
        output.usage = ModelUsage(input_tokens=10, output_tokens=5, total_tokens=15)
        return output

    return get_model("mockllm/model", custom_outputs=answer)


def chance(*of: object) -> int:
    """The same for the same arguments, in each process."""
    return int.from_bytes(sha256(repr(of).encode()).digest()[:4])


@metric
def spread() -> Any:
    def compute(scores: list[SampleScore]) -> float:
        values = [score.score.as_float() for score in scores]
        return max(values) - min(values)

    return compute


@scorer(metrics=[accuracy(), stderr(), grouped(accuracy(), "category"), spread()])
def right() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value="C" if chance(state.sample_id, state.epoch) % 2 else "I", answer=str(state.epoch))

    return score


@scorer(metrics=[accuracy()])
def plain() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value="C", answer=state.output.completion)

    return score


@metric
def of_two() -> Any:
    def compute(scores: list[SampleScore]) -> float:
        return scores[1].score.as_float()

    return compute


@scorer(metrics=[of_two()])
def needs_two() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=1)

    return score


@scorer(metrics={"*": [mean(), stderr(cluster="category")]})
def graded() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value={name: chance(name, state.sample_id, state.epoch) % 10 / 10 for name in ("style", "speed")})

    return score


@scorer(metrics=[mean()])
def undefined() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=float("nan"), explanation="long " * 1_000)

    return score


@solver
def fail_at(id: str, epoch: int) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if state.sample_id == id and state.epoch == epoch:
            raise RuntimeError("this sample fails")
        return state

    return solve


@task
def simple(n: int = 3) -> Task:
    samples = [Sample(input=f"question {place}", target="x") for place in range(n)]
    return Task(dataset=MemoryDataset(samples, name="simple"), solver=generate(), scorer=plain(), model=model())


@task
def many_faced(errors: bool = False) -> Task:
    """Odd ids, epochs with three reducers, grouped and clustered metrics, and on request a sample that fails."""
    ids: list[int | str] = ["a*", "a[1]", "007", 7, "ab", "a/b"]
    samples = [
        Sample(id=id, input=f"question {id}", target="x", metadata={"category": "ab"[place % 2]})
        for place, id in enumerate(ids)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="many"),
        solver=[fail_at("a[1]" if errors else "", 2), generate()],
        scorer=[right(), graded()],
        epochs=Epochs(3, ["mean", "pass_at_2", "at_least_2"]),
        model=model(),
        fail_on_error=0.5,
    )


@task
def not_a_number() -> Task:
    return Task(dataset=[Sample(id="n", input="?", target="x")], scorer=undefined(), model=model())


@scorer(metrics=[accuracy()])
def talkative() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        long = "é" * 3_000
        return Score(value={"words": long, "count": 1.5, "rest": "dropped"}, answer=long, explanation="short")

    return score


@task
def says_much() -> Task:
    return Task(dataset=[Sample(id="n", input="?", target="x")], scorer=talkative(), model=model())


@task
def metric_of_two() -> Task:
    return Task(dataset=[Sample(input="?"), Sample(input="?")], scorer=needs_two(), model=model())


@task
def empty() -> Task:
    return Task(dataset=MemoryDataset([]), solver=generate(), scorer=plain(), model=model())


@task
def with_ids(ids: list[int | str]) -> Task:
    return Task(dataset=[Sample(id=id, input="?", target="x") for id in ids], scorer=plain(), model=model())


@task
def shuffled(seed: int | None = None, ids: bool = False) -> Task:
    samples = [Sample(id=f"s{place}" if ids else None, input=f"question {place}") for place in range(9)]
    dataset = MemoryDataset(samples)
    dataset.shuffle(seed)
    return Task(dataset=dataset, scorer=plain(), model=model())


class StopAfterTwo:
    def __init__(self) -> None:
        self._begun = 0

    async def start_task(self, task: EvalSpec, samples: list[Sample], epochs: int) -> str:
        return "after two"

    async def schedule_sample(self, id: str | int, epoch: int) -> EarlyStop | None:
        self._begun += 1
        return EarlyStop(id=id, epoch=epoch, reason="two are enough") if self._begun > 2 else None

    async def complete_sample(self, id: str | int, epoch: int, scores: object) -> None: ...

    async def complete_task(self) -> dict[str, Any]:
        return {}


@task
def stops_early() -> Task:
    samples = [Sample(input=str(place)) for place in range(4)]
    return Task(dataset=samples, scorer=plain(), model=model(), early_stopping=StopAfterTwo())


@task
def in_docker() -> Task:
    return Task(dataset=[Sample(input="?")], scorer=plain(), model=model(), sandbox="docker")


@sandboxenv(name="elsewhere")
class Elsewhere(LocalSandboxEnvironment):
    """Stands for a provider that runs agents' code on other machines."""


@solver
def run_a_command(command: str) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        state.output.completion = (await sandbox().exec(["bash", "-c", command])).stdout
        return state

    return solve


@task
def sandboxed(kind: str, by_sample: bool = False, command: str = "echo hello") -> Task:
    declared = tuple(kind.split(" ")) if " " in kind else kind  # with its configuration, or without
    sample = Sample(input="?", target="x", sandbox=cast(Any, declared) if by_sample else None)
    own: Any = None if by_sample else declared
    return Task(dataset=[sample], solver=run_a_command(command), scorer=plain(), model=model(), sandbox=own)


@solver
def misbehave(how: str) -> Solver:
    def to_the_pipe(data: bytes) -> None:
        for descriptor in os.listdir("/proc/self/fd"):
            if descriptor not in ("0", "1", "2") and os.path.realpath(f"/proc/self/fd/{descriptor}").count("pipe:"):
                os.write(int(descriptor), data)

    def hang() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Event().wait()

    def spawn(**options: bool) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **options)  # type: ignore[call-overload]
        print("grandchild", child.pid, flush=True)

    def spawn_and_hang() -> None:
        spawn()
        hang()

    def exit_at_once() -> None:
        print("last words", file=sys.stderr)
        os._exit(3)

    deeds: dict[str, Callable[[], None]] = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "exit": exit_at_once,
        "garbage": lambda: to_the_pipe(b"no message\n"),
        "hang": hang,
        "memory": lambda: print(len(bytearray(2**32))),
        "spawn and hang": spawn_and_hang,
        "leave an orphan": lambda: spawn(start_new_session=True),
    }

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        deeds[how]()
        return state

    return solve


@task
def misbehaving(how: str) -> Task:
    return Task(dataset=[Sample(input="?")], solver=misbehave(how), scorer=plain(), model=model())


@solver
def wait_for_ever() -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        import anyio

        await generate(state)
        if state.sample_id == 2:
            await anyio.sleep_forever()
        return state

    return solve


@task
def waits() -> Task:
    samples = [Sample(id=1, input="?"), Sample(id=2, input="?")]
    return Task(dataset=samples, solver=wait_for_ever(), scorer=plain(), model=model())


@solver
def look_around() -> Solver:
    """Tells what a task's code can see of the service."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        with open("/proc/self/environ", "rb") as file:
            state.metadata["process"] = file.read().decode().split("\0")
        state.metadata["environment"] = dict(os.environ)
        state.metadata["random"] = random.random()
        numpy: Any = sys.modules.get("numpy")
        state.metadata["numpy"] = numpy.random.random() if numpy else None
        return state

    return solve


@scorer(metrics=[mean()])
def metadata() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        leaked = [line for line in state.metadata["process"] if "PROCTOR_" in line]
        leaked += [name for name in state.metadata["environment"] if name.startswith("PROCTOR_")]
        kept = state.metadata["environment"].get("OPENAI_API_KEY", "")
        return Score(value={"leaked": len(leaked), "numpy": state.metadata["numpy"] or 0}, answer=kept)

    return score


@task
def environment() -> Task:
    return Task(dataset=[Sample(input="?")], solver=look_around(), scorer=metadata(), model=model())


@task
def two_models() -> Task:
    """Takes its models when it is made, as some tasks do."""
    names = f"{get_model().name} {get_model(role='grader').name}"
    return Task(dataset=[Sample(id=names, input="?")], scorer=plain())


@task
def one_fails() -> Task:
    samples = [Sample(id=id, input="?", target="x") for id in ("a", "b", "c")]
    return Task(dataset=samples, solver=[fail_at("b", 1), generate()], scorer=plain(), model=model())

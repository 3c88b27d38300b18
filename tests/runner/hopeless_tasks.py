"""Tasks of which each sample would fail, for one reason or another; and tasks that only look so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from inspect_ai import Task, task
from inspect_ai.agent import agent_with, as_solver, handoff, human_cli, react
from inspect_ai.approval import ApprovalPolicy, auto_approver, human_approver
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.solver import Generate, Solver, TaskState, chain, generate, human_agent, solver, use_tools
from inspect_ai.tool import ask_user, think
from inspect_ai.util import ComposeConfig, ComposeService

from tests.runner.tasks import model, plain


def _task(**more: Any) -> Task:
    return Task(dataset=[Sample(input="?")], scorer=plain(), model=model(), **more)


@task
def approved(how: str) -> Task:
    human = ApprovalPolicy(human_approver(), "bash*")
    policies: dict[str, Any] = {
        "by name": "human",
        "after another": [ApprovalPolicy(auto_approver(), "think"), human],
        "automatically": "auto",
    }
    within = {"in an agent": [human], "in an agent, automatically": [ApprovalPolicy(auto_approver(), "*")]}
    if how in within:
        return _task(solver=react(approval=within[how]))
    return _task(approval=policies[how])


@solver
def after_asking(asked: Solver) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await asked(state, generate)

    return solve


@task
def asking(how: str) -> Task:
    renamed = agent_with(human_cli(), name="helper", description="It helps.")
    solvers: dict[str, Any] = {
        "agent": human_cli,
        "solver": human_agent,
        "tool": lambda: [use_tools([think(), ask_user()]), generate()],
        "tool of an agent": lambda: react(tools=[ask_user()]),
        "agent of an agent": lambda: react(tools=[handoff(renamed)]),
        "within a solver": lambda: after_asking(as_solver(human_cli())),
        "in a chain": lambda: chain(generate(), as_solver(human_cli())),
        "nobody": lambda: chain(use_tools(think()), react(tools=[think()]), generate()),
    }
    return _task(solver=solvers[how]())


@solver
def taking(value: object) -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return state

    return solve


@task
def typed(
    count: int = 1,
    share: float | None = None,
    names: Sequence[str] = (),
    options: dict[str, int] | None = None,
    mode: Literal["a", "b"] | int = "a",
    label: str = "",
    anything: Any = None,
    flag: bool = False,
) -> Task:
    return _task(solver=taking((count, share, names, options, mode, label, anything, flag)))


@task
def composed(how: str, folder: str = "") -> Task:
    one, two = {"default": ComposeService(image="a")}, {"victim": ComposeService(image="b")}
    configs: dict[str, Any] = {
        "one": ("proctor", ComposeConfig(services=one)),
        "two": ("proctor", ComposeConfig(services={**one, **two})),
        "file": ("proctor", f"{folder}/compose.yaml"),
        "docker file": ("docker", f"{folder}/compose.yaml"),
    }
    return _task(sandbox=configs[how])


@task
def composed_sample(folder: str) -> Task:
    sample = Sample(input="?", sandbox=("proctor", str(Path(folder, "compose.yaml"))))
    return Task(dataset=MemoryDataset([sample]), scorer=plain(), model=model())


@task
def odd_id(id: str = "", character: int | None = None) -> Task:
    own = id if character is None else f"a{chr(character)}"
    return Task(dataset=[Sample(input="?", id="fine"), Sample(input="?", id=own)], scorer=plain(), model=model())

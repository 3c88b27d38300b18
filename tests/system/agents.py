"""Inspect tasks with an agent, for tests of what becomes of one that is interrupted."""

from inspect_ai import Task, task
from inspect_ai.agent import react
from inspect_ai.dataset import Sample
from inspect_ai.scorer import model_graded_qa
from inspect_ai.tool import Tool, bash, tool


@tool
def note() -> Tool:
    async def execute(text: str) -> str:
        """Does nothing.

        Args:
            text: Anything.
        """
        return f"noted: {text}"

    return execute


@task
def notes(name: str = "notes") -> Task:
    """The same without a sandbox: its checkpoints are quick."""
    return Task(
        dataset=[Sample(id="a", input="Do the steps.", target="done")],
        solver=react(tools=[note()]),
        scorer=model_graded_qa(),
        name=name,
    )


@task
def steps(sandbox: str = "proctor") -> Task:
    """One sample; the model decides how many turns."""
    return Task(
        dataset=[Sample(id="a", input="Do the steps.", target="done")],
        solver=react(tools=[bash(timeout=60)]),
        scorer=model_graded_qa(),
        sandbox=sandbox,
    )

"""An Inspect task that spends tokens before it goes wrong."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample

from tests.system.tasks import ask, misbehave, odd


@task
def spending(how: str = "", then: str = "", n: int = 1) -> Task:
    """Each sample asks once (15 tokens); then sample 1 does as `how` and `then` say."""
    samples = [Sample(id=i, input=f"number {i}", target="x") for i in range(1, n + 1)]
    return Task(dataset=samples, solver=[ask(), misbehave(how, 1), misbehave(then, 1)], scorer=odd())

"""A task that takes what JSON has no form for."""

from collections.abc import Iterable
from datetime import date

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample

from tests.runner.tasks import model, plain


@task
def given(day: date, names: dict[int, str], kinds: Iterable[str]) -> Task:
    if (day, names, kinds) != (date(2021, 2, 3), {1: "a"}, {"a", "b"}):
        raise ValueError(f"these are others: {day!r}, {names!r}, {kinds!r}")
    return Task(dataset=MemoryDataset([Sample(id=1, input=f"{day.year}")]), scorer=plain(), model=model())

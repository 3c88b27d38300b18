"""Tasks whose samples are not the same in each process, in one way or another; and tasks that only look so."""

import os
import random
import tempfile
import uuid
from datetime import UTC, date, datetime
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample

from tests.runner.tasks import model, plain

_MADE: list[int] = []


def _task(samples: list[Sample]) -> Task:
    return Task(dataset=MemoryDataset(samples, name="same"), scorer=plain(), model=model())


@task
def drawn(n: int = 5) -> Task:
    return _task([Sample(input=f"question {place}") for place in random.sample(range(1_000), n)])


@task
def random_ids() -> Task:
    return _task([Sample(id=str(uuid.uuid4()), input=f"question {place}") for place in range(3)])


@task
def timed() -> Task:
    return _task([Sample(id="a", input="?", metadata={"made": datetime.now(UTC)})])


@task
def noted_twice() -> Task:
    """The second loading in one process would give another; but each process loads once."""
    _MADE.append(1)
    return _task([Sample(input=f"question {len(_MADE)}")])


@task
def python_values() -> Task:
    kept = Path(tempfile.mkdtemp(), "notes.txt")
    kept.write_text("the same wherever it lies")
    values = {
        "day": date(2020, 1, 2),
        "kinds": {"a", "b", "c", "d"},
        "of": (1, {2: frozenset("xyz")}),
        "made": str(kept),
    }
    return _task([Sample(input="?", metadata={"values": values}, files={"notes.txt": str(kept)})])


@task
def of_a_set() -> Task:
    """In another order under another hash seed."""
    return _task([Sample(input=text) for text in {f"question {place}" for place in range(20)}])


@task
def listed(folder: str) -> Task:
    return _task([Sample(input=Path(folder, name).read_text()) for name in sorted(os.listdir(folder))])


@task
def file_of(folder: str) -> Task:
    return _task([Sample(id="a", input="?", files={"notes.txt": f"{folder}/notes.txt"})])


@task
def breaks_when_loaded_again(folder: str) -> Task:
    """As one that takes a lock does."""
    Path(folder, "lock").open("x").close()
    return _task([Sample(input="?")])

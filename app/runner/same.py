"""Holds the samples of this process to those that the plan has listed."""

from collections.abc import Iterable, Mapping

from inspect_ai import Task
from inspect_ai.dataset import Sample

from app.runner.digest import digest
from app.runner.failures import refusal

REMEDY = (
    "Give each sample an id of its own that stays the same; use a seed for what is shuffled or drawn; sort sets and directory"
    " listings before they are returned; keep times and random values out of samples."
)
_SHOWN = 60


def check_same(task: Task, planned: Mapping[int | str, int]) -> None:
    """`planned`: digests by id. The dataset must have its ids."""
    by_id: dict[int | str | None, Sample] = {sample.id: sample for sample in task.dataset if sample.id in planned}
    missing = [id for id in planned if id not in by_id]
    if missing:
        raise refusal(
            f"The dataset of {task.name!r} has no sample {shown(missing[0])} any more, which the plan had: it must give the"
            f" same samples each time the task is loaded. {REMEDY}"
        )
    _refuse(task, (id for id, known in planned.items() if digest(by_id[id]) != known))


def _refuse(task: Task, differing: Iterable[int | str]) -> None:
    for id in differing:
        raise refusal(
            f"The sample {shown(id)} of {task.name!r} is not the one that was planned: its input, target, choices, metadata,"
            " files, setup or sandbox are others in this process, or have changed since. If they changed, submit the"
            f" evaluation anew. If they change each time: {REMEDY[0].lower()}{REMEDY[1:]}"
        )


def shown(id: int | str) -> str:
    """Shortened, and printable."""
    text = ascii(id)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"

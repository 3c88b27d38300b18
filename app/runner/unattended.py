"""Refuses a task that asks a human: nobody sits at a worker, so each of its samples would fail or wait for ever."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from inspect_ai import Task
from inspect_ai.model import Model

from app.runner.failures import refusal

_HUMAN = {
    "inspect_ai.agent._human.agent": "the agent `human_cli`",
    "inspect_ai.solver._human_agent": "the solver `human_agent`",
    "inspect_ai.tool._tools._ask_user": "the tool `ask_user`",
    "inspect_ai.approval._human.approver": "the approver `human`",
}
"""Where Inspect's functions that ask somebody are made, each within another. By their modules, for an agent may be given
any name."""

_MOST = 20_000
"""Objects that are looked at: a task is made of some hundreds."""


def refuse_humans(task: Task) -> None:
    """As far as the objects of the task show it: what a solver makes only when it runs is not seen."""
    for part in (task.approval, task.setup, task.solver, task.scorer):
        for asks in _that_ask(part):
            raise refusal(
                f"The task {task.name!r} asks a human ({asks}), and nobody sits at the machine where it runs. Give it an"
                " agent, tools and an approval policy that do without."
            )


def _that_ask(root: object) -> Iterator[str]:
    """What is reachable from there, through the variables that functions hold and through what objects are made of."""
    waiting, seen = [root], set[int]()
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, FunctionType) and value.__module__ in _HUMAN and "<locals>" in value.__qualname__:
                yield _HUMAN[value.__module__]
            waiting += _parts(value)


def _parts(value: Any) -> Iterator[object]:
    match value:
        case None | bool() | int() | float() | str() | bytes() | type() | ModuleType() | Model():
            return
        case Mapping():
            yield from value.values()
        case list() | tuple() | set() | frozenset():
            yield from value
        case functools.partial():
            yield from (value.func, *value.args, *value.keywords.values())
        case MethodType():
            yield from (value.__self__, value.__func__)
        case FunctionType():
            yield from (*_closed_over(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            yield getattr(value, "__wrapped__", None)
        case _ if is_dataclass(value):
            yield from (getattr(value, field.name, None) for field in fields(value))
        case _:
            yield from getattr(value, "__dict__", {}).values()


def _closed_over(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue

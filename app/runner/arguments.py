"""Whether the arguments of a task can be right at all, before a sample is run."""

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from inspect_ai import Task
from inspect_ai._util.registry import registry_lookup  # private: a Task keeps no hold of the function that made it
from inspect_ai.util import registry_info

from app.runner.failures import refusal
from app.spec import Spec
from app.yaml_text import python

_NUMBERS = (int, float, complex)


def check_arguments(spec: Spec, task: Task, passed: Mapping[str, Any]) -> None:
    """`passed`: those that reached the task's function. Inspect only warns of what it does not take, and of a wrong type
    only the code knows that uses it: often each sample, at its first step."""
    info = registry_info(task)
    ignored = spec.task_args.keys() - passed.keys()
    if ignored:
        takes = ", ".join(info.metadata.get("params", [])) or "none"
        raise refusal(f"The task {spec.task!r} takes no argument {min(ignored)!r}; it takes: {takes}.")
    hints = _hints(registry_lookup("task", info.name))
    for name, value in python(spec.task_args).items():
        if name in hints and not _can_be(value, set(_leaves(hints[name]))):
            raise refusal(
                f"The task {spec.task!r} takes {_written(hints[name])} for its argument {name!r}, not {value!r}."
            )


def _hints(function: object) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except Exception:  # names that only a type checker knows
        return {}


def _leaves(hint: Any) -> Iterator[Any]:
    """The types that a hint allows, without what is in them: `list`, `NoneType` for `list[int] | None`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _leaves(part)
    elif origin is Annotated:
        yield from _leaves(get_args(hint)[0])
    else:
        yield origin or hint


def _can_be(value: Any, leaves: set[Any]) -> bool:
    """Whether code written for these types may do with the value. Only plain types say anything, and text does for much: a
    number in it may be read, and its characters be gone through."""
    numbers = [leaf for leaf in leaves if leaf in _NUMBERS]
    mappings = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, Mapping)]
    lists = [leaf for leaf in leaves if leaf not in mappings and _is_iterable(leaf)]
    if value is None or len(numbers) + len(mappings) + len(lists) + (types.NoneType in leaves) < len(leaves):
        return True
    match value:
        case str():
            return bool(lists) or (bool(numbers) and _is_number(value))
        case dict():
            return bool(mappings or lists)
        case list() | tuple() | set():
            return bool(lists)
        case _:
            return bool(numbers)


def _is_iterable(leaf: Any) -> bool:
    return isinstance(leaf, type) and issubclass(leaf, Iterable) and not issubclass(leaf, str | bytes)


def _is_number(text: str) -> bool:
    try:
        complex(text)
    except ValueError:
        return False
    return True


def _written(hint: Any) -> str:
    return f"`{hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint}`"

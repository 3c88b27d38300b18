"""Lets Inspect log a sample whose text UTF-8 cannot encode.

By itself it ends the whole evaluation, with the neighbours that were under way, for half a surrogate pair in an error's
message or in a key of a sample's store or metadata; in values it replaces it. The names that this lays itself over are
private and pinned by Inspect's version.
"""

import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import inspect_ai.log._log as log
import pydantic_core
from inspect_ai._util.rich import format_traceback
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from app.runner.storable import storable_text

Formatted = tuple[str, str]


def tolerate() -> None:
    """Once in a process, before anything runs."""
    vars(log)["format_traceback"] = _format_traceback
    pydantic_core.to_jsonable_python = _to_jsonable_python
    for name, module in list(sys.modules.items()):
        if name.startswith("inspect_ai.") and vars(module).get("to_jsonable_python") is to_jsonable_python:
            vars(module)["to_jsonable_python"] = _to_jsonable_python


def _format_traceback(
    exc_type: type[BaseException], exc_value: BaseException, exc_traceback: TracebackType | None
) -> Formatted:
    try:
        return _storable(format_traceback(exc_type, exc_value, exc_traceback))
    except UnicodeEncodeError:  # it lies in the message: the traceback is of the same type, at the same place
        instead = _Unencodable(exc_type, storable_text(str(exc_value)))
        return _storable(format_traceback(instead.type, instead.error, exc_traceback))


class _Unencodable:
    """An exception of the same name with a message that can be encoded."""

    def __init__(self, of: type[BaseException], message: str) -> None:
        self.type = type(of.__name__, (Exception,), {"__module__": of.__module__, "__qualname__": of.__qualname__})
        self.error = self.type(message)


def _storable(formatted: Formatted) -> Formatted:
    text, ansi = formatted
    return storable_text(text), storable_text(ansi)


def _to_jsonable_python(value: Any, **options: Any) -> Any:
    make: Callable[..., Any] = to_jsonable_python
    try:
        return make(value, **options)
    except UnicodeEncodeError:
        return make(_with_storable_keys(value), **options)


def _with_storable_keys(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {
            storable_text(key) if isinstance(key, str) else key: _with_storable_keys(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_with_storable_keys(item) for item in value]
    return value

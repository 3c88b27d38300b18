"""What of a child's words is told on: all but the secrets that the service knows.

A child has the model providers' keys, and what it says goes to the ledger, to ``outcome.json`` and so to everybody who may
use the API. Providers' errors, tasks and judges repeat keys; no answer of theirs needs one.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from app.redaction import Secrets

_EXACT = frozenset(
    [
        "type",
        "error_class",
        "sample",
        "samples",
        "digests",
        "log",
        "limit",
        "versions",
        "task_version",
        "providers",
        "usage",
        "pid",
        "number",
    ]
)
"""Fields of messages that others are compared with, or found by: they name, and quote nobody."""

_Told = TypeVar("_Told", bound=BaseModel)


def discreet(message: _Told, secrets: Secrets) -> _Told:
    """The same, without any secret in its texts."""
    told = {name: getattr(message, name) for name in type(message).model_fields if name not in _EXACT}
    new = {name: _discreet(value, secrets) for name, value in told.items()}
    changed = {name: value for name, value in new.items() if value != told[name]}
    return message.model_copy(update=changed) if changed else message


def _discreet(value: Any, secrets: Secrets) -> Any:
    if isinstance(value, str):
        return secrets.redact(value)
    if isinstance(value, BaseModel):
        return discreet(value, secrets)
    if isinstance(value, Mapping):
        return {_discreet(key, secrets): _discreet(one, secrets) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_discreet(one, secrets) for one in value)
    return value

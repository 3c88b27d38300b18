"""What the client counts on in the API's answers, so that another server's are told from them before anything is read."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

Shape = type | tuple[type, ...] | Mapping[str, Any] | list[Any]
"""A type, several, an object with these fields (and others), or a list of such."""


class Moment(str):
    """A time in ISO 8601. Never made: a shape."""


_COUNTS = dict.fromkeys(("total", "pending", "running", "succeeded", "failed", "cancelled"), int)
_TEXT = (str, type(None))

STATE: Shape = {"id": str, "state": str}
EVALUATION: Shape = {
    "id": str,
    "state": str,
    "spec": dict,
    "samples": _COUNTS,
    "tokens": {"spent": int, "useful": int, "wasted": int},
    "created_at": Moment,
}
EVALUATIONS: Shape = {"evaluations": [EVALUATION], "next": _TEXT}
SAMPLES: Shape = {
    "samples": [{"id": (int, str), "epoch": int, "state": str, "scores": dict, "usage": dict, "execution": str}],
    "next": _TEXT,
}
EXECUTION: Shape = {"id": str, "evaluation_id": str, "state": str, "attempts": [dict], "explanation": [str]}
EXPLANATION: Shape = {
    "id": str,
    "state": str,
    "explanation": [str],
    "executions": [{"id": str, "kind": str, "state": str, "explanation": [str]}],
}
RETRIED: Shape = {"id": str, "executions": int}


def fits(value: Any, shape: Shape) -> bool:
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(name in value and fits(value[name], shape[name]) for name in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    return _is_moment(value) if shape is Moment else isinstance(value, shape)


def _is_moment(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True

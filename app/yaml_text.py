"""Arguments that JSON has no form for, as it carries them all the same: `{"$yaml": "2021-02-03"}`, the YAML that
`inspect eval -T when=2021-02-03` would read, which the child that runs the task reads in the same way.

Nothing else is imported here: the command line client needs it in a moment.
"""

import json
from collections.abc import Mapping
from typing import Any

YAML = "$yaml"
"""The only field of an object that stands for what its text, read as YAML, says."""

MAX_YAML = 2_000
"""Characters of one such text. Ours: dates and small mappings; the parser is slow, and recurses."""


def read(text: str) -> Any:
    """Raises `ValueError`: it is no YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a 13th month
        raise ValueError("is not YAML; put text into quotes") from error


def carried(text: str) -> Any:
    """What `text` says as YAML, in a form that JSON carries. Raises `ValueError`."""
    value = read(text)
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return value
    except (TypeError, ValueError, RecursionError):
        pass
    return {YAML: text}


def check(value: Any) -> None:
    """Raises `ValueError`: below it, an object with the field `$yaml` is not what one must be."""
    _each(value)


def python(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they were meant."""
    return {name: _each(value) for name, value in arguments.items()}


def _each(value: Any) -> Any:
    if isinstance(value, list):
        return [_each(one) for one in value]
    if not isinstance(value, dict):
        return value
    if YAML not in value:
        return {name: _each(one) for name, one in value.items()}
    text = value[YAML]
    if len(value) > 1 or not isinstance(text, str) or len(text) > MAX_YAML:
        raise ValueError(
            f"an object with the field {YAML!r} must have no other, and at most {MAX_YAML} characters of YAML"
        )
    return read(text)

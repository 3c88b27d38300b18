"""Python values that a log's JSON loses, kept beside it: metrics of the report then see what those of plain Inspect see.

A log gives a tuple back as a list, a date as text, a key 1 as "1". What differs is kept in a member of the log's copy that
Inspect does not read. It is plain JSON, never a pickle: reading a log must run nothing.
"""

import json
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path, PosixPath, PurePosixPath
from types import CellType, FunctionType
from typing import Any, NamedTuple
from uuid import UUID
from zipfile import ZipFile

from inspect_ai.log import EvalSample
from inspect_ai.scorer import Score
from pydantic import BaseModel

from app.runner.messages import SampleRef

MEMBER = "proctor/values.json"

_PLAIN = (str, int, float, bool, type(None))
Names = Mapping[str, Mapping[str, Any]]
"""What stands in a module, by the module's name."""

_Kind = tuple[type, Callable[[Any], Any], Callable[[Any], Any]]
_KINDS: dict[str, _Kind] = {
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "dict": (dict, lambda value: [list(pair) for pair in value.items()], dict),
    "counter": (Counter, lambda value: [list(pair) for pair in value.items()], lambda pairs: Counter(dict(pairs))),
    "ordered": (OrderedDict, lambda value: [list(pair) for pair in value.items()], OrderedDict),
    "default": (
        defaultdict,
        lambda value: [list(pair) for pair in value.items()],
        lambda pairs: defaultdict(None, pairs),
    ),
    "date": (date, date.isoformat, date.fromisoformat),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (timedelta, lambda value: [value.days, value.seconds, value.microseconds], lambda n: timedelta(*n)),
    "timezone": (timezone, lambda value: value.utcoffset(None), timezone),
    "decimal": (Decimal, str, Decimal),
    "fraction": (Fraction, str, Fraction),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "uuid": (UUID, str, UUID),
    "path": (PosixPath, str, Path),
    "pure_path": (PurePosixPath, str, PurePosixPath),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
}


class NotKept(ValueError):
    """A value of a type that has no form here. The message is the type's name."""


def keep(value: Any) -> Any:
    """Plain JSON from which `restore` makes an equal value of the same type. Raises `NotKept`."""
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [keep(item) for item in value]
    for name, (kind, take, _) in _KINDS.items():
        if type(value) is kind:
            return {"kind": name, "of": keep(take(value))}
    if isinstance(value, Enum):
        return _named("enum", value, value.name)
    if is_dataclass(value) and not isinstance(value, type):
        return _named("dataclass", value, {field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, BaseModel):
        return _named("model", value, dict(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _named("namedtuple", value, list(value))
    if isinstance(value, str | int | float):  # a subclass that JSON takes for what it is a subclass of; so do metrics
        base = next(kind for kind in (str, int, float) if isinstance(value, kind))
        return base(value)
    raise NotKept(type(value).__name__)


def _named(kind: str, value: Any, of: Any) -> dict[str, Any]:
    return {"kind": kind, "of": keep(of), "type": [type(value).__module__, type(value).__qualname__]}


def restore(kept: Any, names: Names | None = None) -> Any:
    """The value that `keep` was given. Classes are looked up in `names`, then among the modules that are loaded: nothing is
    imported because a log says so. Raises `NotKept` where one is no longer what it was."""
    if isinstance(kept, list):
        return [restore(item, names) for item in kept]
    if not isinstance(kept, dict):
        return kept
    of = restore(kept["of"], names)
    if kind := _KINDS.get(kept["kind"]):
        return kind[2](of)
    module, name = kept["type"]
    return _instance(kept["kind"], _type(module, name, names or {}), of)


def _type(module: str, name: str, names: Names) -> type:
    first, *rest = name.split(".")
    found: Any = names[module].get(first) if module in names else getattr(sys.modules.get(module), first, None)
    for part in rest:
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise NotKept(name)
    return found


def names_of(*objects: Any) -> Names:
    """Of the modules that these functions and objects come from. A task's file is none of `sys.modules`: Inspect runs it."""
    found: dict[str, Mapping[str, Any]] = {}
    seen, left = set[int](), list(objects)
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, FunctionType):
            found[one.__globals__.get("__name__", "")] = one.__globals__
            left += [one.__wrapped__] if hasattr(one, "__wrapped__") else []
            left += [cell.cell_contents for cell in one.__closure__ or () if _is_set(cell)]
        elif callable(one) and not isinstance(one, type):
            left.append(getattr(type(one).__call__, "__func__", type(one).__call__))
        elif isinstance(one, list | tuple):
            left += one
        elif isinstance(one, dict):
            left += one.values()
    return found


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _instance(kind: str, type_: type, of: Any) -> Any:
    made: Any
    if kind == "enum" and issubclass(type_, Enum):
        return type_[of]
    if kind == "model" and issubclass(type_, BaseModel):
        return type_.model_construct(**of)
    if kind == "namedtuple" and issubclass(type_, tuple):
        return type_(*of)
    if kind == "dataclass" and is_dataclass(type_):
        made = object.__new__(type_)  # as it was, not as __init__ would make it anew
        for name, value in of.items():
            object.__setattr__(made, name, value)
        return made
    raise NotKept(type_.__name__)


def is_plain(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    if type(value) in _PLAIN:
        return True
    if type(value) is list:
        return all(map(is_plain, value))
    return type(value) is dict and all(type(key) is str and is_plain(item) for key, item in value.items())


class Values(NamedTuple):
    """What a sample's record has that JSON loses, each part None where it loses nothing. `metadata`: the sample's, as the
    solver left it. `scores`: by name, those fields of the score. `lost`: types of values that could not be kept."""

    metadata: Any
    scores: dict[str, dict[str, Any]]
    lost: list[str]

    @property
    def empty(self) -> bool:
        return self.metadata is None and not self.scores and not self.lost


_FIELDS = ("value", "metadata")


def values_of(sample: EvalSample, scorers: Collection[str]) -> Values:
    """`scorers`: the names of the task's. Metrics see what the solver made of the metadata only beside scores of its own."""
    lost: list[str] = []

    def kept(value: Any) -> Any:
        if is_plain(value):
            return None
        try:
            return keep(value)
        except (NotKept, RecursionError) as error:
            lost.append(str(error))
            return None

    scores = {}
    for name, score in (sample.scores or {}).items():
        if found := {field: form for field in _FIELDS if (form := kept(getattr(score, field))) is not None}:
            scores[name] = found
    own = set(sample.scores or {}) - set(scorers)
    return Values(kept(sample.metadata) if own else None, scores, sorted(set(lost)))


def write(log: Path, values: Mapping[SampleRef, Values]) -> None:
    """Adds the member to a log that has none yet."""
    entries = [{"id": ref.id, "epoch": ref.epoch, **one._asdict()} for ref, one in values.items()]
    with ZipFile(log, "a") as archive:
        archive.writestr(MEMBER, json.dumps(entries))


def read(log: Any) -> dict[SampleRef, Values]:
    """`log`: a file, open for reading."""
    with ZipFile(log) as archive:
        entries: Iterable[dict[str, Any]] = json.loads(archive.read(MEMBER))
    return {
        SampleRef(id=one["id"], epoch=one["epoch"]): Values(one["metadata"], one["scores"], one["lost"])
        for one in entries
    }


def restored(score: Score, values: dict[str, Any], names: Names) -> Score:
    return score.model_copy(update={field: restore(form, names) for field, form in values.items()})

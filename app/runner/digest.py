"""What a sample is, as a number: 64 bits that say whether two processes mean the same sample by one id.

Each process makes the task's dataset anew. Where it does not come out the same (an unseeded draw, a set, a directory
listing, a file that changed), an id or a place stands for another sample in each of them. The digest is made of the values
themselves, never of their `repr`, for that can hold addresses and a set's order.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageBase, ContentAudio, ContentDocument, ContentImage, ContentVideo
from pydantic import BaseModel

_FIELDS = ("input", "target", "choices", "metadata", "files", "setup", "sandbox")
_MEDIA = (ContentImage, ContentAudio, ContentVideo, ContentDocument)
_DEEPEST = 50
"""Levels of values within values that are looked at: a metric that reads further down is not known."""
_FILE_PART = 2**20
"""Bytes of a file that are read at each of its ends; of what lies between, only the length counts."""


def digest(sample: Sample) -> int:
    """Signed, as databases have 64-bit numbers."""
    content = [getattr(sample, name) for name in _FIELDS]
    files = [sample.setup, *(sample.files or {}).values(), getattr(sample.sandbox, "config", None)]
    return _number(b"".join((_plainly(content) or _encode(content), *map(_file, files))))


def _plainly(content: object) -> bytes | None:
    """What is made of plain values alone, as most samples are, in a sixth of the time; None: it is not."""
    try:
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        return None
    return _without_own_folder(text).encode(errors="surrogatepass")


def text_digest(text: str) -> int:
    return _number(text.encode(errors="surrogatepass"))


def _number(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), signed=True)


def _file(name: object) -> bytes:
    """What a file that a sample names holds, for that may change under its name; nothing if it names none here."""
    is_name = isinstance(name, str) and 0 < len(name) < 4096 and not name.startswith("data:") and "\n" not in name
    return _read(str(name)) if is_name else b""


@lru_cache(maxsize=4096)
def _read(name: str) -> bytes:
    path = Path(name.removeprefix("file://"))
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(_FILE_PART)
            file.seek(max(size - _FILE_PART, 0))
            return blake2b(b"%d:" % size + start + file.read(_FILE_PART)).digest()
    except (OSError, ValueError):
        return b""


def _encode(value: Any, above: tuple[int, ...] = ()) -> bytes:
    """The same bytes for the same value in each process. `above`: what it lies in, for a value may hold itself."""
    match value:
        case None | bool() | int() | float() | complex() if type(value).__module__ == "builtins":
            return _tagged(type(value).__name__, repr(value).encode())
        case str() if type(value) is str:
            return _tagged("str", _without_own_folder(value).encode(errors="surrogatepass"))
        case bytes() | bytearray() | memoryview():
            return _tagged("bytes", bytes(value))
        case Enum():
            return _tagged("enum", f"{_name(type(value))}.{value.name}".encode())
        case type() | FunctionType() | BuiltinFunctionType() | ModuleType():
            return _tagged("named", _name(value).encode())
    if id(value) in above or len(above) > _DEEPEST:
        return _tagged("further", _name(type(value)).encode())
    return _encode_parts(value, (*above, id(value)))


def _encode_parts(value: Any, above: tuple[int, ...]) -> bytes:
    def all_of(values: Iterable[Any]) -> Iterator[bytes]:
        return (_encode(one, above) for one in values)

    name = _name(type(value)).encode()
    match value:
        case list() | tuple():
            return _tagged("list", *all_of(value))
        case set() | frozenset():
            return _tagged("set", *sorted(all_of(value)))
        case Mapping():
            return _tagged("map", *sorted(all_of(value.items())))
        case BaseModel():
            # Inspect gives each message an id that no other process would
            left_out = {"id"} if isinstance(value, ChatMessageBase) else set()
            fields = {key: one for key, one in value.__dict__.items() if key not in left_out}
            files = map(_file, fields.values()) if isinstance(value, _MEDIA) else ()
            return _tagged("model", name, _encode(fields, above), _encode(value.__pydantic_extra__, above), *files)
        case MethodType():
            return _tagged("method", name, *all_of((value.__self__, value.__func__)))
    if dataclasses.is_dataclass(value):
        return _tagged("data", name, *all_of(getattr(value, field.name, None) for field in dataclasses.fields(value)))
    return _tagged("object", name, *all_of(_state(value)))


def _state(value: object) -> Iterable[object]:
    """What it would be pickled as: dates, paths, patterns, arrays and most objects say it of themselves."""
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # it cannot be: a generator, a lock
        return ()
    if isinstance(reduced, str):
        return (reduced,)
    _, arguments, *rest = (*reduced, None, None, None)
    state, items, pairs = rest[:3]
    return arguments, state, list(items or ()), list(pairs or ())


def _tagged(tag: str, *parts: bytes) -> bytes:
    """Long ones as their hash, so that what lies deep is not copied at each level."""
    joined = b"".join(b"%s:%d:%s" % (tag.encode(), len(part), part) for part in parts) or tag.encode()
    return joined if len(joined) < 64 else blake2b(joined, digest_size=16).digest()


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _without_own_folder(text: str) -> str:
    """A file that the task has made in a temporary folder lies elsewhere in each process."""
    own = tempfile.gettempdir()
    return re.sub(re.escape(own) + r"/[^/\s\"]+", "temporary", text) if own in text else text

"""What every part on the way can keep: text in UTF-8 without NUL, and plain JSON.

Tasks, agents and models may produce any text. UTF-8 cannot encode half a surrogate pair, Postgres keeps no NUL, and JSON
has no sets, bytes or objects.
"""

import re
from collections.abc import Iterable, Mapping, Set
from numbers import Integral, Real

from pydantic import JsonValue

DEEPEST = 100
"""Lists and objects within one another. The parser that reads messages takes 200; what is deeper is cut."""

_LARGEST_INTEGER = 10**1000
"""Python turns integers of more than 4,300 digits into text only if told to; what is larger goes as hexadecimal text."""

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def storable_text(text: str) -> str:
    r"""The text with NUL and half surrogate pairs as the escapes `\x00` and `\ud800`: what was there stays visible. Whole
    pairs become the character that they stand for."""
    if not _NOT_STORABLE.search(text):
        return text
    whole = _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    return _NOT_STORABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), whole)


def storable(value: object, *, longest: int | None = None, depth: int = DEEPEST) -> JsonValue:
    """Any Python value as JSON. `longest`: characters of a text, beyond which it is cut, and says so. NaN and the infinities
    stay what they are."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, Integral):
        whole = int(value)
        return whole if abs(whole) < _LARGEST_INTEGER else _cut(hex(whole), longest or 1000)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return _text(str.__str__(value), longest)
    if depth == 0:
        return "…"
    if isinstance(value, Mapping):
        return _object(value, longest, depth)
    if isinstance(value, bytes | bytearray | memoryview):
        return _text(bytes(value).decode(errors="backslashreplace"), longest)
    if isinstance(value, Set) or (isinstance(value, Iterable) and hasattr(value, "__getitem__")):
        return [storable(item, longest=longest, depth=depth - 1) for item in value]
    return _text(_shown(value), longest)


def _object(value: Mapping[object, object], longest: int | None, depth: int) -> dict[str, JsonValue]:
    """Keys that come out alike are told apart, so that none replaces another."""
    made: dict[str, JsonValue] = {}
    for key, item in value.items():
        name = unique = _text(key if isinstance(key, str) else _shown(key), longest)
        number = 1
        while unique in made:
            number += 1
            unique = f"{name} ({number})"
        made[unique] = storable(item, longest=longest, depth=depth - 1)
    return made


def _text(text: str, longest: int | None) -> str:
    return _cut(storable_text(text), longest)


def _cut(text: str, longest: int | None) -> str:
    if longest is None or len(text) <= longest:
        return text
    return f"{text[:longest]}… [cut: {len(text)} characters in all]"


def _shown(value: object) -> str:
    """Its own text, unless that fails."""
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__}: no text: {type(error).__name__}>"

"""The beginning of what a scorer said, for the ledger: a judge may quote a whole conversation. The log has it whole."""

import json

from pydantic import JsonValue

LENGTH = 2_000
"""Characters of a text; of any other value, of its JSON. Ours: what a row may hold for people and still be read in pages."""

MARK = "…"
"""Stands where something is left out: at the end of a text or a list, or as a mapping's last key."""


def excerpt(value: JsonValue) -> JsonValue:
    """The same value if it is short enough."""
    if isinstance(value, str):
        return text_excerpt(value)
    if not isinstance(value, list | dict) or len(json.dumps(value, ensure_ascii=False)) <= LENGTH:
        return value
    return _beginning(value, LENGTH)[0]


def text_excerpt(text: str, room: int = LENGTH) -> str:
    return text if len(text) <= room else text[: max(room - 1, 0)] + MARK


def _beginning(value: JsonValue, room: int) -> tuple[JsonValue, int]:
    """What fits, and the room that is left after it."""
    match value:
        case str():
            return text_excerpt(value, room), room - len(value) - 2
        case list():
            return _of_list(value, room)
        case dict():
            return _of_mapping(value, room)
        case _:
            return value, room - len(json.dumps(value))


def _of_list(values: list[JsonValue], room: int) -> tuple[JsonValue, int]:
    kept: list[JsonValue] = []
    for value in values:
        if room <= 0:
            kept.append(MARK)
            break
        item, room = _beginning(value, room - 2)
        kept.append(item)
    return kept, room - 2


def _of_mapping(values: dict[str, JsonValue], room: int) -> tuple[JsonValue, int]:
    kept: dict[str, JsonValue] = {}
    for key, value in values.items():
        if room <= 0:
            kept[MARK] = f"{len(values) - len(kept)} more"
            break
        name = text_excerpt(key, room)
        kept[name], room = _beginning(value, room - len(key) - 6)
    return kept, room - 2

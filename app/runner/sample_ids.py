"""Which ids samples may have: what the database, the logs and the API keep as it is."""

from collections.abc import Sequence

from app.runner.failures import refusal
from app.runner.same import shown

MOST_BYTES = 1_000
"""Of an id, in UTF-8. Ours: an index takes some 2,700, with an evaluation's id and an epoch beside it."""


def refuse_odd_ids(task: str, ids: Sequence[int | str | None]) -> None:
    """Before Inspect writes them to its log."""
    places = dict[str, int]()
    for place, id in enumerate(ids, start=1):
        if id is None:
            continue
        if wrong := _wrong(str(id)):
            raise refusal(f"Sample {place} of {task!r} has an id that {wrong}: {shown(id)}. Give it another id.")
        if (first := places.setdefault(str(id), place)) != place:
            raise refusal(
                f"Samples {first} and {place} of {task!r} both have the id {shown(str(id))}, as text or as a number, and are"
                " told apart by nothing else: give each an id of its own."
            )


def _wrong(id: str) -> str | None:
    if not id:
        return "is empty"
    if "\0" in id:
        return "has a NUL character"
    try:
        size = len(id.encode())
    except UnicodeEncodeError:
        return "has half a surrogate pair"
    return f"has {size} bytes, more than {MOST_BYTES}" if size > MOST_BYTES else None

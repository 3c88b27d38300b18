"""Where a task stands: the stack of what it awaits, which asyncio shows only the outermost frame of."""

import asyncio
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any


def stack_of(task: "asyncio.Task[Any]") -> str:
    """As a traceback prints it, the outermost call first. Of a greenlet it shows what it awaits, not its own frames."""
    return "".join(traceback.StackSummary.extract(_frames(task.get_coro())).format())


def _frames(awaited: Any) -> Iterator[tuple[FrameType, int]]:
    while awaited is not None:
        frame = next((f for kind in ("cr", "gi", "ag") if (f := getattr(awaited, f"{kind}_frame", None))), None)
        if frame is None:
            return
        yield frame, frame.f_lineno
        awaited = next(
            (a for name in ("cr_await", "gi_yieldfrom", "ag_await") if (a := getattr(awaited, name, None))), None
        )

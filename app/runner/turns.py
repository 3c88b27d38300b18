"""Turns: how many samples use a sandbox on this worker at once, where nothing bounds all the memory that one may hold.

A turn is a lock on a file, which the kernel takes back from the dead. The files lie in the scratch folder, so that all
children of a worker share them, and all workers of a machine.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import anyio

FOLDER = "proctor-turns"
PATIENCE = 60.0
"""Seconds of waiting after which it is told: the time is then missing to the sample. Ours."""
_LOOK_AGAIN = 0.2
"""Seconds between two looks for a free turn. Ours: a sample takes minutes."""


class Turn:
    def __init__(self, lock: int) -> None:
        self._lock = lock

    def end(self) -> None:
        os.close(self._lock)


async def take(folder: Path, count: int, waiting: Callable[[], None]) -> Turn:
    """One of `count` turns, waited for as long as it takes. `waiting` is called once, after `PATIENCE`."""
    began, told = anyio.current_time(), False
    while True:
        for number in range(count):
            if turn := _free(folder / str(number)):
                return turn
        if not told and anyio.current_time() - began >= PATIENCE:
            waiting()
            told = True
        await anyio.sleep(_LOOK_AGAIN)


def _free(file: Path) -> Turn | None:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return Turn(lock)

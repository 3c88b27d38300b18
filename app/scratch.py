"""Attempts' local folders. On Cloud Run they are memory, so each goes with its attempt.

A worker that is killed can remove nothing; the next one on the same machine does. Whose folders are whose is told by a
lock, which the kernel takes back from the dead.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

_LOCK = "lock"


class Scratch:
    """A context manager; inside it, `folder` gives attempts theirs."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._own = self._root / f"worker-{uuid4().hex[:12]}"

    async def __aenter__(self) -> "Scratch":
        await asyncio.to_thread(self._remove_the_dead)
        self._lock = self._lock_own()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(shutil.rmtree, self._own, ignore_errors=True)
        os.close(self._lock)

    @asynccontextmanager
    async def folder(self, *names: str | int) -> AsyncIterator[Path]:
        """A folder of its own for each pass, removed when the block is left."""
        folder = self._own.joinpath(*map(str, names))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            with suppress(OSError):  # another attempt's folder is beside it
                folder.parent.rmdir()

    def _lock_own(self) -> int:
        """Another worker that begins just now may take the folder for a dead one's until it is locked: then once more."""
        while True:
            self._own.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                lock = os.open(self._own / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock), os.stat(self._own / _LOCK)):
                        return lock
                os.close(lock)

    def _remove_the_dead(self) -> None:
        for lock in self._root.glob(f"worker-*/{_LOCK}"):
            with suppress(OSError), lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its worker lives
                shutil.rmtree(lock.parent, ignore_errors=True)

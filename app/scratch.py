"""Attempts' local folders. On Cloud Run they are memory, so each goes with its attempt.

A worker that is killed can remove nothing; the next one on the same machine does. Whose folders are whose is told by a
lock, which the kernel takes back from the dead.
"""

import asyncio
import fcntl
import os
import shutil
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

from app.errors import SettingsError

_LOCK = "lock"


def make_private(folder: Path) -> None:
    """Makes the scratch folder, or takes the one that is there, for this user alone: attempts' logs and files lie in it.

    Raises `SettingsError` for a folder that somebody else could have made, or that others use too.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _refusal(folder, _why_not(folder, error)) from error
    try:
        _keep_others_out(folder, opened)
    finally:
        os.close(opened)


def _why_not(folder: Path, error: OSError) -> str:
    with suppress(OSError):
        status = folder.lstat()
        if stat.S_ISLNK(status.st_mode):
            return "it is a symbolic link"
        if status.st_uid != os.geteuid():
            return f"it belongs to another user (uid {status.st_uid})"
    return error.strerror or str(error)


def _keep_others_out(folder: Path, opened: int) -> None:
    status = os.fstat(opened)
    if status.st_uid != os.geteuid():
        raise _refusal(folder, f"it belongs to another user (uid {status.st_uid})")
    if not status.st_mode & 0o077:
        return
    # a system's folder that was named by mistake must not be closed to everybody else
    foreign = next((name for name in sorted(os.listdir(opened)) if not name.startswith(_OURS)), None)
    if status.st_mode & stat.S_ISVTX or foreign:
        raise _refusal(folder, f"it is open to others and holds {foreign or 'what they put there'}")
    os.fchmod(opened, 0o700)


def _refusal(folder: Path, reason: str) -> SettingsError:
    return SettingsError(
        f"PROCTOR_SCRATCH: {folder} cannot be used: {reason}. Remove it, or name a folder that is for this service alone."
    )


_OURS = ("worker-", "proctor-")
"""What the names of our own folders in it begin with."""


class Scratch:
    """A context manager; inside it, `folder` gives attempts theirs."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._own = self._root / f"worker-{uuid4().hex[:12]}"

    async def __aenter__(self) -> "Scratch":
        await asyncio.to_thread(make_private, self._root)
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

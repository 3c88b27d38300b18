"""The folder that a local system keeps everything in: made, writable, and one system's alone."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.errors import ProctorError

LOCK = "lock"
"""A file in it, locked for as long as the system runs; it says whose it is."""


class DataFolderRefused(ProctorError):
    title = "Data folder"


@contextmanager
def hold(data: Path) -> Iterator[IO[str]]:
    """Yields the lock's file, for `tell`. Raises `DataFolderRefused`: the folder cannot be made or written, or is held."""
    try:
        for folder in (data, data / "postgres", data / "artifacts"):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} cannot be written by this user")
        lock = os.fdopen(os.open(data / LOCK, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    except (OSError, ValueError) as error:
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        raise DataFolderRefused(f"Nothing can be kept in {data} ({reason}): give another folder by --data.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = lock.read().strip() or "another process"
            raise DataFolderRefused(
                f"The data in {data} is in use by {holder}: use that one, end it, or give another folder by --data."
            ) from error
        yield lock


def tell(lock: IO[str], url: str) -> None:
    """Who else wants the folder shall read whose it is."""
    lock.seek(0)
    lock.truncate()
    lock.write(f"the Proctor at {url} (process {os.getpid()})\n")
    lock.flush()

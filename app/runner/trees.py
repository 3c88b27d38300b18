"""Folders that hostile code has filled: how large they are, and how they go. Closed ones are opened, deep ones are no deeper
than any; links are never followed.

Everything is opened by its name in the folder above, which is open already: there is no path that could grow too long, or
lead elsewhere by the time it is used.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PAGE = 4096
_BLOCK = 512  # POSIX: st_blocks is in units of 512
MOST_DEEP = 200
"""Levels of folders that are counted. Ours: each is a descriptor while it is open, and a tool's files are some 20 deep."""
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Uncountable(Exception):
    """The message says why, as what a folder has done: `is nested deeper than 200 levels`."""


def size_of(folder: Path, most: int) -> int:
    """Bytes on disk of what is in a folder, a page at least for each entry: empty files take memory too. What has more than
    one name counts once for each. Counts no further than beyond `most`. Raises `Uncountable`."""
    top = os.open(folder, _OPEN)
    try:
        return _size(top, most, MOST_DEEP)
    finally:
        os.close(top)


def _size(folder: int, most: int, deeper: int) -> int:
    total = 0
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # gone meanwhile
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            total += max(status.st_blocks * _BLOCK, _PAGE)
            if _is_folder(status):
                if not deeper:
                    raise Uncountable(f"is nested deeper than {MOST_DEEP} levels")
                with _opened(folder, name, status) as below:
                    total += _size(below, most - total, deeper - 1)
        if total > most:
            break
    return total


@contextmanager
def _opened(above: int, name: str, status: os.stat_result) -> Iterator[int]:
    """A folder, though it be closed to its owner: it is closed again after the look. Who is not root needs it open to look at
    what it has, not only to list that."""
    closed = not status.st_mode & 0o100
    try:
        opened = _open_closed(above, name) if closed else os.open(name, _OPEN, dir_fd=above)
    except PermissionError:
        closed, opened = True, _open_closed(above, name)
    except NotADirectoryError as error:  # another has its name by now
        raise FileNotFoundError(name) from error
    try:
        yield opened
    finally:
        if closed:
            with suppress(OSError):
                os.fchmod(opened, status.st_mode & 0o7777)
        os.close(opened)


def _open_closed(above: int, name: str) -> int:
    try:
        _open_to_us(above, name)
        return os.open(name, _OPEN, dir_fd=above)
    except PermissionError as error:
        raise Uncountable("has folders that are closed to whoever looks") from error


def _open_to_us(above: int, name: str) -> None:
    """Not `follow_symlinks=False`, which Linux before 6.6 does not have: by a descriptor that needs no permission."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
    try:
        os.chmod(f"/proc/self/fd/{found}", 0o700)
    finally:
        os.close(found)


def _is_folder(status: os.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o040000


def remove(folder: Path) -> bool:
    """Removes a folder with all that is in it, and says whether it could. A folder in it is moved to the top before it is
    emptied, so that none is ever deep."""
    with suppress(FileNotFoundError):
        with suppress(OSError):
            folder.chmod(0o700)
        try:
            top = os.open(folder, _OPEN)
        except OSError:
            return False
        try:
            _empty(top)
        finally:
            os.close(top)
        with suppress(OSError):
            folder.rmdir()
    return not folder.exists()


def _empty(top: int) -> None:
    moved, left = 0, set[str]()
    while names := set(os.listdir(top)) - left:
        for name in names:
            try:
                os.unlink(name, dir_fd=top)
            except FileNotFoundError:
                continue
            except OSError:
                moved = _remove_folder(top, name, moved, left)


def _remove_folder(top: int, name: str, moved: int, left: set[str]) -> int:
    """What cannot be removed is added to `left`. `moved`: how many have been moved to the top so far; returned with these."""
    try:
        _open_to_us(top, name)
        opened = os.open(name, _OPEN, dir_fd=top)
        try:
            for below in os.listdir(opened):
                try:
                    os.unlink(below, dir_fd=opened)
                except OSError:
                    _open_to_us(opened, below)  # one that is moved elsewhere is written to: its parent changes
                    moved += 1
                    os.rename(below, f"moved-{moved}-{os.urandom(8).hex()}", src_dir_fd=opened, dst_dir_fd=top)
        finally:
            os.close(opened)
        os.rmdir(name, dir_fd=top)
    except OSError:
        left.add(name)
    return moved

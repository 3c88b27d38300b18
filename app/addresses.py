"""Where artifacts and logs lie: every path and address of one is made here, and taken apart here.

An address is what the ledger keeps and the API shows: `gs://bucket/path`, or a file of this machine. Nothing in it is
quoted, for neither fsspec nor Inspect reads a quoted one. Inspect reads `file://…` as a URL all the same: `#` and `?` end
the path, `%41` is `A`, and line breaks vanish. A path in which that would happen is an address by itself, without a scheme.
"""

import os
import re
from pathlib import Path
from typing import Any

import fsspec

_FILE = "file://"
_MEANS_ANOTHER = re.compile(r"[#?%\t\r\n]")
"""Makes a `file://` URL mean another file than the path in it."""

NAME_BYTES = 100
"""Of a task's name in a file's name. Ours: file systems allow 255 bytes, and a log's name also has its time (25), its id
(22) and the endings of those who copy it (50)."""


def address(root: str, *parts: str | int) -> str:
    """Of a file or a folder below `root`, which is an address itself."""
    joined = "/".join([root.rstrip("/"), *map(str, parts)])
    path = _path(joined)
    if path is None:
        return joined
    return path if _MEANS_ANOTHER.search(path) else f"{_FILE}{path}"


def local_path(address: str) -> Path | None:
    """None: it is no file of this machine."""
    path = _path(address)
    return None if path is None else Path(path)


def readable(address: str) -> str:
    """The form that Inspect's functions read, whatever is in it. The ledger has some that were made by an earlier version."""
    return _path(address) or address


def filesystem(address: str, **options: Any) -> Any:
    """fsspec's, for its methods that take addresses and paths alike. Not `url_to_fs`, to which `::` is a chain."""
    if _path(address) is not None:
        return fsspec.filesystem("file", auto_mkdir=True, **options)
    return fsspec.filesystem(address.partition("://")[0], **options)


def file_name(text: str) -> str:
    """A part of a file's name that says `text`, as far as any store, shell and URL takes it. Never empty, and without the
    `_` that parts such parts in Inspect's names of logs."""
    plain = re.sub(r"[^\w.-]|_", "-", text)
    return plain.encode(errors="replace")[:NAME_BYTES].decode(errors="ignore") or "-"


def task_name(name: str) -> str:
    """Of a task in a log's file name: as Inspect shows it, without its package."""
    return file_name(name.rpartition("/")[2])


def folder_for_inspect(folder: Path) -> str:
    """The path by which Inspect can write to a folder: it lists its logs as URLs, and then reads them. The kernel has another
    name for any folder that this process has opened, good for its children too, as long as it lives."""
    if not _MEANS_ANOTHER.search(str(folder)):
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"


def _path(address: str) -> str | None:
    if address.startswith(_FILE):
        return address.removeprefix(_FILE)
    return address if address.startswith("/") else None

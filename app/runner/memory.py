"""What memory a sample's processes hold, as far as it can be seen without a control group.

Beside what they map there is what only descriptors hold: files in memory without a name, and what waits in pipes and sockets.
The kernel does not say how much waits in a socket that is not of the internet's kind, so each counts as full.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_KILOBYTE = 1024
_PIPE = 2 * 4096
"""Bytes that a pipe holds once its user has many (PIPE_MIN_DEF_BUFFERS); until then they are 64 MiB together at most
(fs.pipe-user-pages-soft), which is not counted."""
_SOCKET = 2 * 212_992
"""Bytes that wait in a socket at most: what SO_SNDBUF may be raised to (twice net.core.wmem_max's default)."""
_DESCRIPTOR = 512
"""Bytes of the kernel's for anything else that is open. Ours."""
_WATCH = 160
"""Bytes for each descriptor that an epoll watches (fs/eventpoll.c)."""

_UNNAMED = re.compile(r" rw-s\S* [0-9a-f]+ \S+ \d+ +(/dev/zero \(deleted\)|/memfd:|/SYSV|/anon_hugepage)")
_INTERNET = ("tcp", "tcp6", "udp", "udp6")


@dataclass
class Holding:
    """Sums over processes; what several of them share counts once. `open`: descriptors; `watches`: of all epolls."""

    mapped: int = 0
    unnamed: dict[str, int] = field(default_factory=dict)
    pipes: set[str] = field(default_factory=set)
    sockets: set[str] = field(default_factory=set)
    networks: dict[str, int] = field(default_factory=dict)
    open: int = 0
    watches: int = 0

    @property
    def bytes(self) -> int:
        unseen, waiting = 0, 0
        for pid in self.networks.values():
            sockets, bytes = _network(pid)
            unseen, waiting = unseen + sockets, waiting + bytes
        return (
            self.mapped
            + sum(self.unnamed.values())
            + waiting
            + max(len(self.sockets), unseen) * _SOCKET
            + len(self.pipes) * _PIPE
            + self.open * _DESCRIPTOR
            + self.watches * _WATCH
        )


def held_by(pids: Iterable[int], most_open: int, memory: bool = True) -> Holding:
    """`most_open`: descriptors are looked at one by one up to so many, then only counted. Without `memory`, only they are."""
    found, own = Holding(), _link("/proc/self/ns/net")
    for pid in pids:
        if memory:
            found.mapped += memory_of(pid)
            found.unnamed |= dict(_unnamed(pid))
            network = _link(f"/proc/{pid}/ns/net")
            if network and network != own:
                found.networks[network] = pid
        with suppress(OSError):
            descriptors = os.listdir(f"/proc/{pid}/fd")
            found.open += len(descriptors)
            if found.open <= most_open:
                _look_at(pid, descriptors, found)
    return found


def _look_at(pid: int, descriptors: list[str], found: Holding) -> None:
    for descriptor in descriptors:
        path = f"/proc/{pid}/fd/{descriptor}"
        link = _link(path)
        if link.startswith("pipe:"):
            found.pipes.add(link)
        elif link.startswith("socket:"):
            found.sockets.add(link)
        elif link.startswith("/memfd:"):
            with suppress(OSError):
                status = os.stat(path)
                found.unnamed[str(status.st_ino)] = status.st_blocks * 512
        elif link == "anon_inode:[eventpoll]":
            with suppress(OSError):
                found.watches += Path(f"/proc/{pid}/fdinfo/{descriptor}").read_bytes().count(b"tfd:")


def memory_of(pid: int) -> int:
    """Bytes: the share of a process in what it uses, where the kernel tells; else all of it. Its page tables count too.
    Memory that is shared and has no name is counted by `_unnamed`, and files in memory by their file system."""
    with suppress(OSError):
        return (
            _kilobytes(f"/proc/{pid}/smaps_rollup", ("Pss_Anon:", "SwapPss:"))
            + _kilobytes(f"/proc/{pid}/status", ("VmPTE:",))
        ) * _KILOBYTE
    with suppress(OSError):
        return _kilobytes(f"/proc/{pid}/status", ("RssAnon:", "VmSwap:", "VmPTE:")) * _KILOBYTE
    return 0


def _unnamed(pid: int) -> Iterator[tuple[str, int]]:
    """Shared memory without a name that is mapped, by inode: as far as the mapping reaches, for it may be mapped in part."""
    with suppress(OSError):
        reach: dict[str, int] = {}
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            if _UNNAMED.search(line):
                span, _, offset, _, inode = line.split()[:5]
                start, end = (int(part, 16) for part in span.split("-"))
                reach[inode] = max(reach.get(inode, 0), int(offset, 16) + end - start)
        yield from reach.items()


def _network(pid: int) -> tuple[int, int]:
    """Of a process's network: sockets that are not the internet's, whether or not somebody has them open; and the bytes that
    wait in those that are."""
    sockets, waiting = 0, 0
    for name in ("unix", "netlink"):
        with suppress(OSError):
            sockets += max(Path(f"/proc/{pid}/net/{name}").read_bytes().count(b"\n") - 1, 0)
    for name in _INTERNET:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                waiting += sum(int(part, 16) for part in line.split()[4].split(":"))
    return sockets, waiting


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _kilobytes(file: str, names: tuple[str, ...]) -> int:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words and words[0] in names)

"""Bounds in sum, where no control group can be made and no sized file system mounted: looks, and ends what is over.

It is slower than the kernel: within one look a process can take what its own limits allow.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from app.runner.memory import held_by

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1
"""Seconds between two looks while something runs. Ours: a process that takes 2 GiB a second is ended 0.2 GiB late."""
MOST_WATCHES = 2**16
"""Descriptors that all epolls of a sample watch together: the kernel counts them for each user of the machine
(fs.epoll.max_user_watches, about 250,000 for each GiB of memory), and so for all samples and the service."""
_OPEN = 64
"""Descriptors for each process that a sample may have, on average; 1,024 for one. Ours: a compiler has ten."""
_PAGE = 4096


@dataclass
class Watchdog:
    """Watches the calls whose pids lie in `calls` (a file each). A bound of None is somebody else's to hold. `disks`:
    folders and how many bytes of files each may hold. `supplies`: whether to bound what the kernel counts for each user of
    the machine, and so for all samples together. `ended`: the calls it has ended, and why."""

    calls: Path
    memory: int | None = None
    processes: int | None = None
    disks: dict[Path, int] = field(default_factory=dict)
    supplies: bool = False
    ended: dict[str, str] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return self.memory is None and self.processes is None and not self.disks and not self.supplies

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await anyio.sleep(LOOK_EVERY)
            try:
                if os.listdir(self.calls):
                    await anyio.to_thread.run_sync(self.look)
            except Exception:  # one look that failed must not be the last
                logger.exception("the watchdog could not look")

    @property
    def most_open(self) -> int:
        """Descriptors of all processes together."""
        return _OPEN * max(self.processes or 0, 128)

    def look(self) -> None:
        roots = dict(self._roots())
        if not roots:
            return
        pids = [pid for root in roots.values() for pid in tree(root)]
        if reason := self._over(pids):
            for call, pid in roots.items():
                self.ended[call] = reason
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _over(self, pids: list[int]) -> str | None:
        if self.processes is not None and len(pids) > self.processes:
            return f"it had more than {self.processes} processes"
        if self.memory is not None or self.supplies:
            most_open = self.most_open
            held = held_by(pids, most_open, self.memory is not None)
            if self.memory is not None and held.bytes > self.memory:
                return f"its processes used more than {self.memory >> 20} MiB of memory together"
            if held.open > most_open:
                return f"its processes had more than {most_open} files open together"
            if held.watches > MOST_WATCHES:
                return f"its processes watched more than {MOST_WATCHES} files together"
        for folder, most in self.disks.items():
            if size_of(folder) > most:
                return f"its files in /{folder.name} were larger than {most >> 20} MiB together"
        return None

    def _roots(self) -> Iterator[tuple[str, int]]:
        """A call's first process is a child of ours. Another's that has its pid by now is none of our business."""
        for file in self.calls.iterdir():
            with suppress(OSError, ValueError):
                pid = int(file.read_text())
                if parent_of(pid) == os.getpid():
                    yield file.name, pid


def tree(root: int) -> list[int]:
    """A process and all that descend from it; those that end meanwhile are left out."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    queue += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def parent_of(pid: int) -> int:
    """Raises OSError if there is no such process."""
    # proc(5): the fourth field; the second, the program's name, may hold anything
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def size_of(folder: Path) -> int:
    """Bytes on disk of what is in a folder, a page at least for each entry: empty files take memory too. Links are not
    followed, and what cannot be read is not counted."""
    total = 0
    for where, folders, files in os.walk(folder):
        total += len(folders) * _PAGE
        for name in files:
            with suppress(OSError):
                blocks = os.lstat(os.path.join(where, name)).st_blocks
                total += max(blocks * 512, _PAGE)  # POSIX: st_blocks is in units of 512
    return total

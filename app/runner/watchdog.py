"""Bounds in sum, where no control group can be made and no sized file system mounted: looks, and ends what is over.

It is slower than the kernel: within one look a process can take what its own limits allow.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio

from app.runner.memory import held_by
from app.runner.trees import Uncountable, size_of

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1
"""Seconds between two looks while something runs. Ours: a process that takes 2 GiB a second is ended 0.2 GiB late."""
MOST_WATCHES = 2**16
"""Descriptors that all epolls of a sample watch together: the kernel counts them for each user of the machine
(fs.epoll.max_user_watches, about 250,000 for each GiB of memory), and so for all samples and the service."""
_OPEN = 64
"""Descriptors for each process that a sample may have, on average; 1,024 for one. Ours: a compiler has ten."""
_BLIND = 10
"""Looks that may fail one after another, a second in all: what cannot be watched is ended."""


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
    _failed: int = field(default=0, init=False)

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
            self.ended |= dict.fromkeys(roots, reason)
            # not the first alone: bubblewrap's second waits for it, for ever, until it has learnt to die with it
            for pid in (pid for root in roots.values() for pid in tree(root)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _over(self, pids: list[int]) -> str | None:
        """One measure that fails keeps no other from being taken; what fails again and again is over."""
        failed = False
        for measure in self._measures(pids):
            try:
                if reason := measure():
                    return reason
            except Exception:
                logger.exception("the watchdog could not look")
                failed = True
        self._failed = self._failed + 1 if failed else 0
        return "it could not be watched" if self._failed >= _BLIND else None

    def _measures(self, pids: list[int]) -> Iterator[Callable[[], str | None]]:
        yield lambda: self._over_processes(pids)
        yield lambda: self._over_memory(pids)
        for folder, most in self.disks.items():
            yield partial(_over_size, folder, most)

    def _over_processes(self, pids: list[int]) -> str | None:
        if self.processes is not None and len(pids) > self.processes:
            return f"it had more than {self.processes} processes"
        return None

    def _over_memory(self, pids: list[int]) -> str | None:
        if self.memory is None and not self.supplies:
            return None
        most_open = self.most_open
        held = held_by(pids, most_open, self.memory is not None)
        if self.memory is not None and held.bytes > self.memory:
            return f"its processes used more than {self.memory >> 20} MiB of memory together"
        if held.open > most_open:
            return f"its processes had more than {most_open} files open together"
        if held.watches > MOST_WATCHES:
            return f"its processes watched more than {MOST_WATCHES} files together"
        return None

    def _roots(self) -> Iterator[tuple[str, int]]:
        """A call's first process is a child of ours. Another's that has its pid by now is none of our business."""
        for file in self.calls.iterdir():
            with suppress(OSError, ValueError):
                pid = int(file.read_text())
                if parent_of(pid) == os.getpid():
                    yield file.name, pid


def _over_size(folder: Path, most: int) -> str | None:
    try:
        if size_of(folder, most) > most:
            return f"its files in /{folder.name} were larger than {most >> 20} MiB together"
    except Uncountable as error:
        return f"/{folder.name} {error}"
    return None


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

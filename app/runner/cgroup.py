"""A control group for each sample, where this process may make one: it bounds memory and processes in sum.

Both versions of the kernel's interface are served. In version 2 a group whose own processes are in it cannot hand its
controllers down, so the sample's group is made in the nearest one above that does. Where none does and the group is the
service's own (a container's, or one delegated to it), its processes move to a group below, and it hands down what it has.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from app.runner.watchdog import tree
from app.spec import SandboxLimits

MOUNT = Path("/sys/fs/cgroup")
_OWN_PROCESSES = 32
"""Processes of the sandbox itself: bubblewrap's two for each call, and the one that holds the mounts. Ours."""
_PATIENCE = 2.0
"""Seconds for killed processes to leave their group."""
_SERVICE = "proctor-service"
_CONTROLLERS = {"memory", "pids"}
_numbers = count(1)


@dataclass(frozen=True)
class Cgroup:
    """One sample's group: a folder in each hierarchy. A process joins by writing its pid to all of `doors`."""

    folders: tuple[Path, ...]

    @property
    def doors(self) -> list[str]:
        return [str(folder / "cgroup.procs") for folder in self.folders]

    @classmethod
    def make(cls, limits: SandboxLimits) -> "Cgroup | None":
        """None: not writable here, or the kernel did not take the limits."""
        memory, processes = in_sum(limits), (limits.processes or 0) + _OWN_PROCESSES
        wanted = {"memory.limit_in_bytes": memory, "memory.max": memory, "memory.swap.max": 0, "pids.max": processes}
        parents = _parents()
        group = cls(tuple(parent / f"proctor-{os.getpid()}-{next(_numbers)}" for parent in parents))
        try:
            for folder in group.folders:
                _remove_the_dead(folder.parent)
                folder.mkdir()
                for name, value in wanted.items():
                    if (folder / name).exists():
                        (folder / name).write_text(str(value))
            if group._holds():
                return group
        except OSError:
            pass
        group.remove()
        return None

    def _holds(self) -> bool:
        files = {file.name for folder in self.folders for file in folder.iterdir()}
        return "pids.max" in files and bool({"memory.limit_in_bytes", "memory.max"} & files)

    def processes(self) -> list[int]:
        found: set[int] = set()
        for door in self.doors:
            with suppress(OSError):
                found.update(int(pid) for pid in Path(door).read_text().split())
        return sorted(found)

    def remove(self) -> None:
        """With everything in it. Blocks for as long as the killed take to leave."""
        deadline = time.monotonic() + _PATIENCE
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            time.sleep(0.005)
        for folder in self.folders:
            with suppress(OSError):
                folder.rmdir()


def hand_down() -> None:
    """Makes this process's group one that samples' groups can be made in, if it is the service's own and is not yet."""
    own = next((Path(MOUNT, path.lstrip("/")) for _, names, path in _own_groups() if not names), None)
    with suppress(OSError, ValueError):
        if own is None or _parents() or not set((own / "cgroup.controllers").read_text().split()) >= _CONTROLLERS:
            return
        pids = [int(pid) for pid in (own / "cgroup.procs").read_text().split()]
        if own != MOUNT and not set(pids) <= set(tree(os.getpid())):
            return  # others live there too
        _move(pids, own / _SERVICE)
        try:
            (own / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(_CONTROLLERS)))
        except OSError:
            _move(pids, own)
            (own / _SERVICE).rmdir()


def _move(pids: list[int], group: Path) -> None:
    group.mkdir(exist_ok=True)
    for pid in pids:
        with suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(pid))


def machine_memory() -> int:
    """Bytes that this process's group may have, or the machine has, whichever is less."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    for _, names, path in _own_groups():
        if names in ("", "memory"):
            own = Path(MOUNT, names, path.lstrip("/"))
            for file in (own / "memory.max", own / "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):
                    total = min(total, int(file.read_text()))
    return total


def in_sum(limits: SandboxLimits) -> int:
    """Bytes of one sample, at most. Files in memory count too: those in `/workspace`, their archive while a checkpoint is
    made, and `/tmp`."""
    return (limits.memory or 0) + 2 * (limits.workspace or 0) + (limits.tmp or 0)


def _parents() -> list[Path]:
    """Where a group may be made, by /proc/self/cgroup: one folder (version 2), or one for each controller (version 1)."""
    lines = _own_groups()
    first = [
        Path(MOUNT, name, path.lstrip("/")) for name in ("memory", "pids") for _, names, path in lines if names == name
    ]
    if len(first) == 2:
        return first
    own = next((Path(MOUNT, path.lstrip("/")) for _, names, path in lines if not names), MOUNT)
    above = (folder for folder in (own, *own.parents) if folder.is_relative_to(MOUNT) and _hands_down(folder))
    return [folder] if (folder := next(above, None)) else []


def _own_groups() -> list[list[str]]:
    """Hierarchy, its controllers (none: version 2), and this process's group in it."""
    return [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]


def _hands_down(folder: Path) -> bool:
    try:
        return set((folder / "cgroup.subtree_control").read_text().split()) >= _CONTROLLERS
    except OSError:
        return False


def _remove_the_dead(parent: Path) -> None:
    """A child that was killed could not remove its samples' groups."""
    for folder in _groups(parent):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            with suppress(OSError):
                folder.rmdir()


def _groups(parent: Path) -> Iterator[Path]:
    yield from (folder for folder in parent.glob("proctor-*-*") if folder.name.split("-")[1].isdigit())

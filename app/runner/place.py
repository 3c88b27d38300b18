"""A sample's place on the machine, and what each launcher must do for it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Protocol

from app.runner.reachable import is_root
from app.runner.visible import PYTEST, python_folders
from app.spec import SandboxLimits

WORKSPACE = "/workspace"
USER, ROOT = "agent", "root"
UIDS = {USER: 1000, ROOT: 0}
"""The sandbox's users. Both are one user outside and neither has capabilities: `root` can do no more than `agent`. It
exists because Inspect's checkpoints want a `root` with a `/root` that the agent does not see."""

OUTSIDE_UID = 65534
"""Whom the sandbox belongs to outside when the service runs as root: root is exempt from the limit on processes, and
whatever escapes should not be root. 65534 (nobody) exists in every user namespace."""

DEFAULTS = SandboxLimits(
    memory=2**31,  # numpy alone maps about 1 GiB
    processes=256,  # a parallel build fits, a fork bomb does not
    workspace=2**29,
    tmp=2**28,
    cpu=300,  # ends a busy loop in a call without a time-out; a test suite needs far less
    output=10 * 2**20,  # Inspect's own limit for the output of a command
)
"""Every limit has a value. Ours, but for the last."""

FILE_BYTES = 100 * 2**20
"""A larger file could not be read back: Inspect's limit for read_file."""

TEMPORARY_FILES = {"tmp": "/tmp", "var": "/var/tmp", "shm": "/dev/shm"}
"""What lies in one bounded place of `SandboxLimits.tmp` bytes: the folder in it, and where the sandbox has it."""

WRITABLE = (WORKSPACE, *TEMPORARY_FILES.values(), "/root")
"""Where the sandbox's users may write. No mount point lies below: whoever mounts would follow the links that they made."""

ETC = {
    "passwd": f"root:x:0:0::/root:/bin/sh\n{USER}:x:1000:1000::{WORKSPACE}:/bin/sh\nnobody:x:65534:65534::/:\n",
    "group": f"root:x:0:\n{USER}:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n",
}

# A process that enters itself (its pid stays through every exec) in the files named, then becomes the command.
_ENTER = 'until [ "$1" = -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'


class NoLauncher(Exception):
    """A launcher does not work on this machine; the message says why."""


class Place(Protocol):
    """What a launcher has made for one sample."""

    calls: Path
    """A file for each call under way, with the pid of its first process."""
    on_leash: bool
    """Whether the launcher is not its commands' parent: see `app.runner.leash`."""

    def command(self, user: str, env: Mapping[str, str], call: Path) -> list[str]:
        """The command line to put before a command, to have it run inside as `user` with `env` and nothing else."""
        ...

    async def close(self) -> None:
        """With everything that runs in it or lies in it."""
        ...


def make_directory(within: Path | None = None) -> Path:
    """A folder for what the service keeps of a sample's place."""
    directory = Path(tempfile.mkdtemp(prefix="proctor-sandbox-", dir=within))
    (directory / "calls").mkdir()
    return directory


def in_reach(path: Path) -> bool:
    """Whether the sandbox's users could write where this lies."""
    return any(path.is_relative_to(folder) for folder in WRITABLE)


def refuse_python_in_reach() -> None:
    """Raises `NoLauncher` if the Python that is to be shown lies where the sandbox has folders to write to."""
    for folder in filter(in_reach, python_folders()):
        raise NoLauncher(
            f"The service's Python is {folder}, where the agent may write ({', '.join(WRITABLE)}): a sandbox cannot show it"
            " safely. Run the service with a Python that lies elsewhere."
        )


def file_sizes(limits: SandboxLimits) -> dict[str, int]:
    """Bytes of files by folder of a sample's place. In `root`, which only Inspect's checkpoints write to, an archive of the
    workspace must fit."""
    assert limits.workspace
    assert limits.tmp
    return {"workspace": limits.workspace, "tmp": limits.tmp, "root": limits.workspace}


def become() -> list[str]:
    """No longer root, and no environment: bubblewrap's own is readable as /proc/1/environ inside, and Inspect starts every
    process with the service's environment."""
    other = ["/usr/bin/setpriv", f"--reuid={OUTSIDE_UID}", f"--regid={OUTSIDE_UID}", "--clear-groups"]
    return ["/usr/bin/env", "-i", *(other if is_root() else ())]


def enter(files: list[str]) -> list[str]:
    return ["/bin/sh", "-c", _ENTER, "enter", *files, "--"]


def variables(user: str, env: Mapping[str, str]) -> dict[str, str]:
    folders = [f"{folder}/bin" for folder in python_folders()]
    own = {
        "HOME": "/root" if user == ROOT else WORKSPACE,
        "LANG": "C.UTF-8",
        "PATH": ":".join([*folders, "/usr/local/bin:/usr/bin:/bin"]),
        "PYTHONPATH": PYTEST,
        "USER": user,
    }
    return own | dict(env)


def rlimits(limits: SandboxLimits) -> list[str]:
    """Set inside, for there the number of processes is counted for this call alone (per user namespace, Linux 5.14)."""
    return [
        "/usr/bin/prlimit",
        f"--as={limits.memory}",
        f"--cpu={limits.cpu}",
        f"--fsize={FILE_BYTES}",
        f"--nproc={limits.processes}",
        "--nofile=1024",  # the usual soft limit, here for good
        "--core=0",  # a core dump is of no use to anyone here
        # counted for each user of the machine, and so for all samples: shares that leave the others theirs
        "--sigpending=512",
        "--msgqueue=65536",
        "--memlock=1048576",
    ]


class Calls:
    """Numbers a place's calls, and forgets each as it ends."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._numbers = count(1)
        self.under_way = 0

    def new(self) -> Path:
        return self._place.calls / str(next(self._numbers))

    @contextmanager
    def one(self) -> Iterator[Path]:
        call = self.new()
        self.under_way += 1
        try:
            yield call
        finally:
            self.under_way -= 1
            call.unlink(missing_ok=True)

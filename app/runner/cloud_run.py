"""The launcher `cloud_run`: the platform's own `sandbox do`, for services with `sandboxLauncher: true` (a preview, 2026-07).

Its reference is all that is known of it here: `sandbox do [--write] [--allow-egress] [--env K=V] [--mount
type=bind,source=…,destination=…[,readonly]] -- COMMAND` ends with 0 if the command did, else with 1. It gives no environment,
no secrets, no metadata server and no network; the container's file system is shown read-only, so what must not be seen is
covered by an empty folder. Files are left to the watchdog; processes and their memory, which need not be seen from here, to
the shell that holds the command on its leash. Where it mounts there must be a folder: the image has `/workspace` and
`/opt/pytest`.
"""

import asyncio
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import anyio

from app.runner.place import ETC, ROOT, TEMPORARY_FILES, WORKSPACE, NoLauncher, enter, file_sizes, in_reach, variables
from app.runner.reachable import together
from app.runner.trees import remove
from app.runner.visible import PYTEST, covered_folders, pytest_packages
from app.runner.watchdog import Watchdog
from app.spec import SandboxLimits

logger = logging.getLogger(__name__)

_EMPTY = 'for f; do chmod -R u+rwX "$f"; find "$f" -mindepth 1 -delete; done'
_TO_EMPTY = 60  # seconds

PROGRAM = "sandbox"
ELSEWHERE = "/usr/local/gcp/bin"
"""Where it lies on Cloud Run, which need not be on the PATH."""


class CloudRun:
    """One sample's place."""

    on_leash = True

    def __init__(self, directory: Path, limits: SandboxLimits, program: str, hidden: Sequence[Path]) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        self._nothing = directory / "nothing"
        self._program = program
        self._hidden = hidden
        self._disks = {directory / name: size for name, size in file_sizes(limits).items()}
        self.watchdog = Watchdog(self.calls, disks=self._disks)

    @classmethod
    def open(cls, directory: Path, limits: SandboxLimits, hidden: Sequence[Path] = ()) -> "CloudRun":
        """Takes the sample's folder over. Raises `NoLauncher`. `hidden`: further folders that must not be seen."""
        program = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=ELSEWHERE)
        if program is None:
            raise NoLauncher(
                f"There is no `{PROGRAM}` program, neither on the PATH nor in {ELSEWHERE}: it is Cloud Run's, for services"
                " whose container has `sandboxLauncher: true`."
            )
        place = cls(directory, limits, program, hidden)
        temporary = [directory / "tmp" / name for name in TEMPORARY_FILES]
        for folder in (*place._disks, *temporary, place._nothing):
            folder.mkdir()
            folder.chmod(0o777)  # whoever the platform makes of the command; nobody else can see it
        directory.chmod(0o711)
        (directory / "etc").mkdir()
        for name, content in ETC.items():
            (directory / "etc" / name).write_text(content)
            (directory / "etc" / name).chmod(0o644)
        (directory / "etc").chmod(0o755)
        return place

    def command(self, user: str, env: Mapping[str, str], call: Path) -> list[str]:
        mounts = (
            part for source, target, *how in self._mounts(user) for part in ("--mount", _bind(source, target, *how))
        )
        given = (part for name, value in variables(user, env).items() for part in ("--env", f"{name}={value}"))
        return [*enter([str(call)]), self._program, "do", *mounts, *given, "--"]

    def _mounts(self, user: str) -> Iterator[tuple[Path | str, ...]]:
        hidden = (folder for folder in self._hidden if folder.is_dir())
        for folder in (*covered_folders([Path("/")]), *hidden):
            if not in_reach(folder):  # else it is hidden by what is mounted above it
                yield self._nothing, folder, "readonly"
        for name in ETC:
            yield self.directory / "etc" / name, f"/etc/{name}", "readonly"
        yield together(pytest_packages()), PYTEST, "readonly"
        for name, target in TEMPORARY_FILES.items():
            yield self.directory / "tmp" / name, target
        yield self.directory / "workspace", WORKSPACE
        yield (self.directory / "root", "/root") if user == ROOT else (self._nothing, "/root", "readonly")

    async def close(self) -> None:
        if not await asyncio.to_thread(remove, self.directory):
            await self._empty()
            await asyncio.to_thread(remove, self.directory)

    async def _empty(self) -> None:
        """By a command inside, for what belongs to whomever the platform makes of it."""
        folders = [WORKSPACE, *TEMPORARY_FILES.values(), "/root"]
        command = [*self.command(ROOT, {}, self.calls / "empty"), "/bin/sh", "-c", _EMPTY, "empty", *folders]
        try:
            with anyio.fail_after(_TO_EMPTY):
                await anyio.run_process(command, check=False)
        except (OSError, TimeoutError) as error:
            logger.warning("what a sample has left could not be removed: %s", error)


def _bind(source: Path | str, target: Path | str, *how: Path | str) -> str:
    return ",".join(["type=bind", f"source={source}", f"destination={target}", *map(str, how)])

"""Saves the state of running samples, so that the next attempt goes on where a lost one was. The saving is Inspect's own.

Three things are added. Its program for it, restic, is looked for on this machine and never downloaded. A child that is to
stop soon *winds down*: each agent saves its state at the end of its turn, whatever the interval, and then waits, so that no
turn is paid for twice. And a task for which saved state would be wrong is run without.
"""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import anyio

# Private, and the only such imports for this: there is no public way to say which restic to use, nor when to save. Inspect
# is pinned to one version, and tests see both at work.
import inspect_ai.util._checkpoint.checkpointer_impl as checkpointer
from inspect_ai import Task
from inspect_ai.util import ArchiveSnapshots, CheckpointConfig, SandboxSnapshotConfig, TimeInterval, TurnInterval
from inspect_ai.util._checkpoint._layout.sample_checkpoints_dir import write_checkpoint_file
from inspect_ai.util._checkpoint._triggers.factory import create_trigger
from inspect_ai.util._checkpoint._triggers.types import CheckpointTrigger, Trigger, TriggerFire
from inspect_ai.util._restic import resolver

from app.runner.place import WORKSPACE
from app.runner.resolve import declared_sandboxes
from app.spec import Spec

WIND_DOWN = signal.SIGUSR1
"""Tells a child to stop at the end of the turn."""

OLDEST_RESTIC = (0, 18)
"""Inspect 0.3.285 is written for 0.18; 0.14 lacks options that it uses."""

_INTERVALS: dict[str, CheckpointTrigger] = {
    "turn": TurnInterval(every=1),
    "minute": TimeInterval(every=timedelta(minutes=1)),
}
_VERSION = re.compile(r"^restic (\d+)\.(\d+)")


@dataclass(frozen=True)
class Checkpoints:
    """What Inspect is told (False: save nothing), and if nothing is saved, why."""

    config: CheckpointConfig | Literal[False]
    none_because: str | None = None


def configure(spec: Spec, task: Task) -> Checkpoints:
    """To be called once in a process, before Inspect runs anything."""
    if spec.checkpoint == "off":
        return _none("the spec says `checkpoint: off`")
    sandboxes = _sandboxes(spec, task)
    if "local" in sandboxes:
        return _none("the sandbox `local` is a new folder each time, so saved files would be lost")
    restic = find_restic()
    if restic is None:
        return _none(f"the worker has no restic {'.'.join(map(str, OLDEST_RESTIC))} or newer")
    _use(restic)
    vars(checkpointer)["create_trigger"] = _trigger  # the same, with an ear for `wind_down`
    vars(checkpointer)["write_checkpoint_file"] = commits.count(write_checkpoint_file)
    own = task.checkpoint if isinstance(task.checkpoint, CheckpointConfig) else None
    interval = None if spec.checkpoint is None and own and own.trigger else _INTERVALS[spec.checkpoint or "minute"]
    # an archive asks for nothing but tar inside; what Inspect would do else is to bring a restic into the sandbox
    paths = {"default": SandboxSnapshotConfig(paths=[WORKSPACE], strategy=ArchiveSnapshots())}
    proctor = "proctor" in sandboxes and not (own and own.sandbox_paths)
    return Checkpoints(CheckpointConfig(trigger=interval, sandbox_paths=dict(paths) if proctor else None))


def find_restic() -> Path | None:
    """Beside the interpreter, on the PATH, or where Inspect itself would have put it."""
    own = resolver.cache_path(resolver._current_platform())
    found = [Path(sys.prefix, "bin", "restic"), Path(shutil.which("restic") or "restic"), own]
    return next((restic for restic in found if restic.is_file() and _fits(restic)), None)


class WindDown:
    """Whether this process is to stop soon."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        signal.signal(WIND_DOWN, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def has_saved(self) -> bool:
        """Whether the calling sample has saved its state since: it may wait for the end now."""
        return self.asked and _saved.get()


class Commits:
    """Checkpoints that this process has made. A resumed sample tells of its earlier ones again, which are no progress."""

    def __init__(self) -> None:
        self._untold = 0
        self._told = anyio.Event()

    def count(self, write: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
        async def counted(**arguments: Any) -> str:
            written = await write(**arguments)
            self._untold += 1
            _saved.set(wind_down.asked)
            return written

        return counted

    def take(self) -> bool:
        """Whether the checkpoint that is told of is one of these."""
        if self._untold == 0:
            return False
        self._untold -= 1
        if self._untold == 0:
            self._told.set()
            self._told = anyio.Event()
        return True

    async def all_told(self) -> None:
        """Inspect tells of a checkpoint a little after it was made."""
        with anyio.move_on_after(1):
            while self._untold:
                await self._told.wait()


commits = Commits()
wind_down = WindDown()
_saved: ContextVar[bool] = ContextVar("saved", default=False)


class _AtTurnsEnd:
    """Inspect's trigger. Once the process winds down, the end of any turn will do."""

    def __init__(self, inner: Trigger) -> None:
        self._inner = inner

    def tick(self) -> TriggerFire | None:
        fire = self._inner.tick()
        return fire or (TriggerFire("manual", {"reason": "the process winds down"}) if wind_down.asked else None)


def _trigger(spec: CheckpointTrigger) -> Trigger:
    return _AtTurnsEnd(create_trigger(spec))


def _none(because: str) -> Checkpoints:
    return Checkpoints(False, because)


def _sandboxes(spec: Spec, task: Task) -> set[str]:
    if spec.sandbox is not None:
        return {spec.sandbox}
    return set(declared_sandboxes(task))


def _use(restic: Path) -> None:
    """Instead of the one that Inspect would download."""
    host = resolver._current_platform()
    usual = resolver.cache_path

    def cache_path(platform: resolver.Platform, version: str | None = None) -> Path:
        return restic if platform == host else usual(platform, version)

    resolver.cache_path = cache_path


def _fits(restic: Path) -> bool:
    try:
        said = subprocess.run([restic, "version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    version = _VERSION.match(said)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_RESTIC

"""The two launchers behind one door, and the probe that decides between them. Nothing here needs Inspect.

The probe is an attack: it runs a command in a place as any sample's would, and looks for the service's environment, its
files, the network and the metadata server. A launcher that lets one of them be reached has not passed.
"""

import asyncio
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE

import anyio

from app.runner.bubblewrap import ADVICE, Bubblewrap
from app.runner.cloud_run import CloudRun
from app.runner.messages import Containment, Launcher
from app.runner.place import (
    DEFAULTS,
    USER,
    Calls,
    NoLauncher,
    Place,
    make_directory,
    refuse_python_in_reach,
    rlimits,
)
from app.runner.turns import Turn, take
from app.runner.watchdog import Watchdog
from app.spec import SandboxLimits

METADATA_SERVER = ("169.254.169.254", 80)
"""Where any code on Google Cloud gets the service account's token."""

_TIMEOUT = 20.0
"""Seconds for the probe's one command, which takes a tenth of one."""
_MARK = "PROCTOR_PROBE"

# $1: a word that is in the launcher's environment; $2: a file of the service; then addresses to connect to, `host port`. The
# first of them is this machine's: it answers or refuses at once, and no time-out may be taken for a closed door.
# It prints what it could reach, and last that it has come to its end.
_ATTACK = r"""
mark=$1; file=$2; shift 2
for tool in cat tr grep env timeout touch; do command -v "$tool" >/dev/null || { echo "no $tool" >&2; exit 1; }; done
cat /proc/*/environ /proc/*/task/*/environ 2>/dev/null | tr '\0' '\n' | grep -q -- "$mark" && echo "the service's environment"
env | grep -q -- "$mark" && echo "the service's environment"
[ -e "$file" ] && echo "the service's files"
bash -c ': < "/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null && echo "$1:$2"
shift 2
while [ $# -gt 0 ]; do
  timeout 2 bash -c ': < "/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null && echo "$1:$2"
  shift 2
done
touch /usr/probe 2>/dev/null && echo "the system's files, to write"
echo done
"""


@dataclass
class Launched:
    """A sample's place, watched."""

    place: Place
    limits: SandboxLimits
    watchdog: Watchdog
    watching: asyncio.Task[None] | None
    turn: Turn | None = None

    async def close(self) -> None:
        if self.watching:
            self.watching.cancel()
            await asyncio.wait({self.watching})
        await self.place.close()
        if self.turn:
            self.turn.end()


async def open_place(
    containment: Containment, within: Path | None = None, waiting: Callable[[], None] = lambda: None
) -> Launched:
    """Raises `NoLauncher`. `within`: where on this machine; by default in the temporary folder. `waiting`: see `take`."""
    if containment.launcher is None:
        raise NoLauncher(containment.refusal)
    refuse_python_in_reach()
    limits = DEFAULTS.lowered(None).model_copy(update=containment.limits.model_dump(exclude_none=True))
    turn = None
    if containment.at_once is not None and containment.turns is not None:
        turn = await take(Path(containment.turns), containment.at_once, waiting)
    try:
        directory = await anyio.to_thread.run_sync(make_directory, within)
        try:
            place = await _open(containment, limits, directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    except BaseException:
        if turn:
            turn.end()
        raise
    watchdog = place.watchdog
    watching = None if watchdog.idle else asyncio.create_task(watchdog.watch(), name="watchdog")
    return Launched(place, limits, watchdog, watching, turn)


async def _open(containment: Containment, limits: SandboxLimits, directory: Path) -> Bubblewrap | CloudRun:
    if containment.launcher == "bubblewrap":
        return await Bubblewrap.open(directory, limits)
    return CloudRun.open(directory, limits, [Path(folder) for folder in containment.hidden])


async def choose(
    launchers: Sequence[Launcher],
    containment: Containment,
    forbidden: Sequence[tuple[str, int]] = (METADATA_SERVER,),
    within: Path | None = None,
) -> Containment:
    """With the first launcher that passes the probe; or with none, and why each did not. `forbidden`: addresses that must
    not be reached, besides a listener on this machine's loopback."""
    reasons = []
    for launcher in launchers:
        try:
            await probe(containment.model_copy(update={"launcher": launcher}), forbidden, within)
        except (NoLauncher, OSError) as error:  # OSError: no room for a folder, say
            reasons.append(f"{launcher}: {error}")
        else:
            return containment.model_copy(update={"launcher": launcher, "refusal": ""})
    refusal = "No sandbox works on this worker, so tasks that need one are refused. " + " ".join(reasons)
    return containment.model_copy(update={"launcher": None, "refusal": refusal})


async def probe(
    containment: Containment,
    forbidden: Sequence[tuple[str, int]] = (METADATA_SERVER,),
    within: Path | None = None,
) -> None:
    """Raises `NoLauncher` if the launcher does not work here, or lets its command reach what it must not."""
    launched = await open_place(containment, within)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            reached = await _attack(launched, [("127.0.0.1", listener.getsockname()[1]), *forbidden])
    finally:
        with anyio.CancelScope(shield=True):
            await launched.close()
    if reached:
        raise NoLauncher(f"The sandbox is not closed: its code could reach {', '.join(reached)}.")


async def _attack(launched: Launched, addresses: Sequence[tuple[str, int]]) -> list[str]:
    """What the command could reach."""
    mark = secrets.token_hex(8)
    targets = [part for host, port in addresses for part in (host, str(port))]
    attack = ["bash", "-c", _ATTACK, "probe", mark, __file__, *targets]
    with Calls(launched.place).one() as call:
        command = [*launched.place.command(USER, {}, call), *rlimits(launched.limits), *attack]
        try:
            with anyio.fail_after(_TIMEOUT):
                result = await anyio.run_process(
                    command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, check=False, env={**os.environ, _MARK: mark}
                )
        except (OSError, TimeoutError) as error:
            raise NoLauncher(f"The sandbox could not start: {error or 'no answer'}.") from error
    lines = result.stdout.decode(errors="replace").split("\n")
    if result.returncode != 0 or lines[-2:] != ["done", ""]:
        reason = result.stderr.decode(errors="replace").strip() or f"exit code {result.returncode}"
        raise NoLauncher(f"The sandbox could not start: {reason}. {_advice(launched)}".strip())
    return lines[:-2]


def _advice(launched: Launched) -> str:
    return ADVICE if isinstance(launched.place, Bubblewrap) else ""

"""Calls through a launcher that is not the parent of what it starts, as Cloud Run's `sandbox do`.

Its exit code says whether all went well and no more, and its end is not the command's: killed, it leaves running what it has
started. So a shell in the sandbox, next to the command, tells the command's own exit code, and holds it on a leash: its
standard input, which ends with this process, however that ends.

The code comes at the end of stderr behind a mark, random for each call. The mark is read from standard input and is in no
argument, no environment and no file; the command runs without that descriptor. When the code is told everything else in the
sandbox has been killed, so nothing can come behind it. And success must be confirmed by the launcher.

The same shell counts the call's processes and their memory, which nobody may see from outside. On Cloud Run it is the
sandbox's first process, so the command cannot kill it.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio
from anyio.abc import ByteReceiveStream, Process

from app.spec import SandboxLimits

_DRAIN = 5.0
"""Seconds to read what is left in the pipes once the launcher has ended. What it has left running may hold them open."""
_LET_GO = 2.0
"""Seconds for the launcher to end by itself once the leash is off."""

STARTED = b"\x02started\x03"
"""Comes before the command starts. Without it the launcher failed, not the command: that must not be guessed from messages,
which the agent's code could print too."""

# bash, for it reads with a time-out and counts without starting anything; -p, for it must not read what BASH_ENV names.
# $1: the folder; $2, $3, $4: most MiB of memory, processes, and MiB in files without a name; $5: how many variables follow,
# for the command only; then the command. From standard input: the mark, and how many bytes are the command's. Nothing comes
# behind them: when it ends, so must the command.
_LEASH = r"""
unset mark size
IFS=' ' read -r mark size || exit 125
exec 3>&2 4<&0 5<> <(:) </dev/null 2>/dev/null
printf '\002started\003' >&3
end() { kill -s KILL -- -1; printf '%s\n%s %s\n' "$2" "$mark" "$1" >&3; exit "$1"; }
ended() { end 137 $'\n'"The command was ended: $1."$'\n'; }
cd -- "$1" 2>&3 || end 1
memory=$2 processes=$3 files=$4 late=$5; shift 5
exec 6< <(exec 3>&- 5<&-; exec /usr/bin/head -c "$size" <&4); input=$!
(
  ulimit -u $((processes - 8))
  for ((; late; late--)); do export "$1"; shift; done
  exec "$@" <&6 2>&3 3>&- 4<&- 5<&- 6<&-
) & command=$!
exec 6<&-
for ((look = 1; ; look++)); do
  pause=0.0$((look < 9 ? look : 9))
  if kill -0 $input; then read -r -t $pause -u 5; else
    read -r -t $pause -u 4
    (($? > 128)) || end 137
  fi
  kill -0 $command || break
  pages=0 count=0
  for file in /proc/[0-9]*/statm; do
    read -r _ resident shared _ <"$file" && ((pages += resident - shared, ++count))
  done
  ((count <= processes + 4)) || ended "it had more than $processes processes"
  ((pages / 256 <= memory)) || ended "its processes used more than $memory MiB of memory together"
  ((look % 3)) && continue
  blocks=0 seen=' '
  exec 7< <(exec /usr/bin/find -L /proc/[0-9]*/fd -maxdepth 1 -type f -links 0 -printf '%b %D:%i\n' 3>&- 4<&- 5<&-)
  while read -r -u 7 size inode; do
    [[ $seen == *" $inode "* ]] || ((blocks += size)) ; seen+="$inode "
  done
  wait $!
  (($? < 128)) || ended "it could not be watched"
  exec 7<&-
  ((blocks / 2048 <= files)) || ended "its files without a name were larger than $files MiB together"
done
wait $command
end $?
"""


@dataclass(frozen=True)
class Ended:
    """`stderr` begins with `STARTED` if the command was started."""

    returncode: int
    stdout: bytes
    stderr: bytes


def on_leash(name: str, cwd: str, limits: SandboxLimits) -> list[str]:
    """To put before a command. `name`: what the shell calls itself in messages."""
    files = (limits.workspace or 0) + (limits.tmp or 0)
    most = [str((limits.memory or 0) >> 20), str(limits.processes), str(files >> 20)]
    return ["/bin/bash", "-p", "-c", _LEASH, name, cwd, *most]


async def run(command: Sequence[str], input: bytes, timeout: float | None, output_limit: int) -> Ended:
    """Of each output stream the last `output_limit` bytes are kept. Raises `TimeoutError`."""
    mark = secrets.token_hex(16)
    process = await anyio.open_process(list(command))
    try:
        with anyio.fail_after(timeout):
            returncode, stdout, stderr = await _follow(process, f"{mark} {len(input)}\n".encode() + input, output_limit)
    finally:
        with anyio.CancelScope(shield=True):
            await _let_go(process)
    return _told(returncode, stdout, stderr, mark.encode())


async def _follow(process: Process, input: bytes, output_limit: int) -> tuple[int, bytes, bytes]:
    assert process.stdout
    assert process.stderr
    stdout, stderr = (
        _Tail(output_limit),
        _Tail(output_limit + 128),
    )  # the mark and what stands with it are not the command's
    async with anyio.create_task_group() as group:
        group.start_soon(_write, process, input)
        async with anyio.create_task_group() as reading:
            reading.start_soon(stdout.read, process.stdout)
            reading.start_soon(stderr.read, process.stderr)
            returncode = await process.wait()
            await _take_off(process)  # or what the launcher has left running would keep the pipes open
            reading.cancel_scope.deadline = anyio.current_time() + _DRAIN
        group.cancel_scope.cancel()
    return returncode, stdout.kept, stderr.kept


async def _write(process: Process, input: bytes) -> None:
    """The stream stays open: it is the leash."""
    assert process.stdin
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        await process.stdin.send(input)


async def _take_off(process: Process) -> None:
    assert process.stdin
    with suppress(anyio.BrokenResourceError, OSError):
        await process.stdin.aclose()


async def _let_go(process: Process) -> None:
    await _take_off(process)
    if process.returncode is None:
        with anyio.move_on_after(_LET_GO):
            await process.wait()
    with suppress(ProcessLookupError):
        process.kill()
    await process.aclose()


def _told(returncode: int, stdout: bytes, stderr: bytes, mark: bytes) -> Ended:
    said, found, rest = stderr.rpartition(b"\n" + mark + b" ")
    if not found:
        return Ended(returncode, stdout, stderr)
    code = int(rest.split(b"\n")[0])
    before, started, own = said.partition(STARTED)  # before: what the launcher says itself
    return Ended(0 if returncode == 0 else code or 1, stdout, STARTED + (own if started else before))


class _Tail:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()

    async def read(self, stream: ByteReceiveStream) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                self._kept += await stream.receive()
                if len(self._kept) > 2 * self._limit:
                    del self._kept[: -self._limit]

    @property
    def kept(self) -> bytes:
        return bytes(self._kept[-self._limit :])

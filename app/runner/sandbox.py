"""The Inspect sandbox `proctor`: agents' code is hostile, and this is where it runs.

A launcher (bubblewrap, or Cloud Run's own; the worker has probed which) gives each sample a place: `/workspace` and `/tmp`
of bounded size, no network, no environment, the system read-only. Each call of `exec` is a sandbox of its own in it: when
the command ends, or its timeout is over, everything that it started is killed. Only files outlive it, until the sample
ends; and Inspect's tool server, if a tool asks for it, with what it runs in the background.

Files are read and written by a command inside the sandbox too, so `..`, symbolic links and races lead nowhere that the
agent's own code could not go.
"""

import asyncio
import errno
import os
import re
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from typing import Literal, overload

import anyio
from anyio.abc import Process
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    concurrency,
    sandboxenv,
    subprocess,
)
from inspect_ai.util._sandbox._cli import SANDBOX_CLI  # private: the one command that is meant to leave a server behind

from app.runner import leash
from app.runner.launchers import Launched, open_place
from app.runner.leash import STARTED, on_leash
from app.runner.messages import Containment
from app.runner.place import ROOT, UIDS, USER, WORKSPACE, Calls, NoLauncher, rlimits
from app.runner.visible import PYTEST
from app.spec import SandboxLimits

__all__ = ["PYTEST", "WORKSPACE", "ProctorSandbox", "contain"]

_FILE_TIMEOUT = 60  # seconds for read_file and write_file: a named pipe in a file's place would block for ever
_SERVER_TIMEOUT = 60  # seconds for a tool server to start
_SERVER_SAYS = 2**20  # bytes kept of what it says until then: the agent may have put another program in its place

# The shell stays: as a namespace's first process it ends when the command has, and the kernel lets it end only when all else
# in there is dead. What it would say itself of a command that was killed is nobody's concern.
_START = """
printf '\\002started\\003' >&2
cd -- "$1" || exit 1
late=$2; shift 2
exec 3>&2 2>/dev/null
(while [ "$late" -gt 0 ]; do export "$1"; shift; late=$((late - 1)); done; exec "$@" 2>&3 3>&-)
exit $?
"""
_START_NAME = "proctor"
_CANNOT_EXECUTE = 126
_USED_UP = re.compile(rb"Resource temporarily unavailable|Cannot (allocate memory|fork)|Out of memory")
_AGAIN_AFTER = 0.2  # seconds
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)

# The command, then its exit code behind its output; and then what it has left running lives on, until our end of the
# pipe closes.
_SERVE = 'output=$("$@" 2>&1 </dev/null); printf "%s\\n%s\\003" "$output" "$?"; exec >/dev/null; read -r _'
_SERVED = b"\x03"

_LINKER = ("LD_", "GLIBC_")
"""What the variables of the dynamic linker begin with: they are for the command, not for what starts it."""

# Both scripts exit with errno's number for what Inspect wants told apart.
_READ = f"""
[ -d "$1" ] && exit {errno.EISDIR}
[ -e "$1" ] || exit {errno.ENOENT}
[ -r "$1" ] || exit {errno.EACCES}
exec head -c "$2" -- "$1"
"""
_WRITE = f"""
[ -d "$1" ] && exit {errno.EISDIR}
[ -e "$1" ] && [ ! -w "$1" ] && exit {errno.EACCES}
mkdir -p -- "${{1%/*}}/" && true >> "$1" || exit {errno.EACCES}
exec cat > "$1"
"""

_containment: ContextVar[Containment] = ContextVar("containment")
_waiting: ContextVar[Callable[[], None]] = ContextVar("waiting")


def contain(containment: Containment, waiting: Callable[[], None] = lambda: None) -> None:
    """How samples of this process are held from here on. `waiting`: called when one has waited long for its turn."""
    _containment.set(containment)
    _waiting.set(waiting)


@sandboxenv(name="proctor")
class ProctorSandbox(SandboxEnvironment):
    """One sample's sandbox."""

    def __init__(self, launched: Launched, limits: SandboxLimits) -> None:
        super().__init__()
        self.place = launched.place
        self.limits = limits
        self._launched = launched
        self._calls = Calls(launched.place)
        self._servers: list[Process] = []

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Raises SandboxUnavailableError if no launcher works here."""
        containment = _containment.get(Containment())
        try:
            launched = await open_place(containment, waiting=_waiting.get(lambda: None))
        except NoLauncher as error:
            raise SandboxUnavailableError(str(error)) from error
        environment = cls(launched, launched.limits)
        try:
            await environment._check()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await environment._end()
            raise
        return {"default": environment}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        with anyio.CancelScope(shield=True):
            for environment in environments.values():
                await environment.as_type(ProctorSandbox)._end()

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """As Inspect has it. `timeout_retry` is not followed: a command's effects must not happen twice unasked."""
        name = _user(user)
        _check_call(cmd, env or {})
        if cmd[:2] == [SANDBOX_CLI, "start-server"]:
            return await self._serve(cmd, name)
        limit = min(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE, self.limits.output or 0)
        result = await self._run(cmd, limit, input, cwd or WORKSPACE, env or {}, timeout, concurrency, name)
        if result.returncode == _CANNOT_EXECUTE and result.stderr.startswith(f"{_START_NAME}: ".encode()):
            raise PermissionError(result.stderr.decode(errors="replace").strip())
        stdout, stderr = (stream.decode(errors="replace") for stream in (result.stdout, result.stderr))
        return ExecResult(result.success, result.returncode, stdout, stderr)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        result = await self._script(_WRITE, file, input=contents)
        _raise_for(result, file)

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        result = await self._script(_READ, file, str(limit + 1), output_limit=limit + 1)
        _raise_for(result, file)
        if len(result.stdout) > limit:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return result.stdout.decode() if text else result.stdout

    async def _script(
        self, script: str, file: str, *args: str, input: str | bytes = b"", output_limit: int = 2**20
    ) -> ExecResult[bytes]:
        cmd = ["/bin/sh", "-c", script, "file", os.path.join(WORKSPACE, file), *args]
        return await self._run(cmd, output_limit, input, "/", {}, _FILE_TIMEOUT, concurrency=False, user=ROOT)

    async def _run(
        self,
        cmd: list[str],
        output_limit: int,
        input: str | bytes | None,
        cwd: str,
        env: dict[str, str],
        timeout: int | None,
        concurrency: bool,
        user: str,
        again: int = 10,
    ) -> ExecResult[bytes]:
        """Runs `cmd`. Of each output stream the last `output_limit` bytes are kept. `again`: how often to try again where
        there was no room for it to start."""
        with self._calls.one() as call:
            early = {key: value for key, value in env.items() if not key.startswith(_LINKER)}
            late = [f"{key}={value}" for key, value in env.items() if key not in early]
            command, cmd = self.place.command(user, early, call), [str(len(late)), *late, *cmd]
            others = self._calls.under_way > 1 or bool(self._servers)
            try:
                if self.place.on_leash:
                    result = await self._run_on_leash(command, cmd, output_limit, input, cwd, timeout, concurrency)
                else:
                    result = await subprocess(
                        [*command, *self._start(cwd), *cmd],
                        text=False,
                        input=input,
                        output_limit=output_limit + len(STARTED),
                        timeout=timeout,
                        concurrency=concurrency,
                    )
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                return ExecResult(False, _CANNOT_EXECUTE, b"", f"{os.strerror(errno.E2BIG)}\n".encode())
        before, started, stderr = result.stderr.partition(STARTED)
        reason = self._launched.watchdog.ended.get(call.name)
        # half: the buffer drops its oldest chunk whole, and the mark with it, when a command prints more than the limit
        if not started and len(before) < output_limit // 2 and not reason:
            said = before.decode(errors="replace").strip()
            used_up = _USED_UP.search(before) or result.returncode in _KILLED
            if used_up and not others and again:  # an earlier command's processes have been killed and are not gone yet
                await anyio.sleep(_AGAIN_AFTER)
                return await self._run(
                    cmd[1 + len(late) :], output_limit, input, cwd, env, timeout, concurrency, user, again - 1
                )
            if not (used_up and others):
                raise SandboxUnavailableError(f"The sandbox could not start: {said}")
            reason = f"other commands of this sample have used up its processes or its memory ({said})"
        stderr = before + stderr
        if reason:
            stderr += f"\nThe command was ended: {reason}.\n".encode()
        return ExecResult(result.success, result.returncode, result.stdout, stderr)

    async def _run_on_leash(
        self,
        command: list[str],
        cmd: list[str],
        output_limit: int,
        input: str | bytes | None,
        cwd: str,
        timeout: int | None,
        bounded: bool,
    ) -> ExecResult[bytes]:
        start = [*rlimits(self.limits), *on_leash(_START_NAME, os.path.join(WORKSPACE, cwd), self.limits)]
        given = input.encode() if isinstance(input, str) else input or b""
        turn = concurrency("sandbox do", os.cpu_count() or 1, visible=False) if bounded else nullcontext()
        async with turn:
            ended = await leash.run([*command, *start, *cmd], given, timeout, output_limit + len(STARTED))
        return ExecResult(ended.returncode == 0, ended.returncode, ended.stdout, ended.stderr)

    def _start(self, cwd: str) -> list[str]:
        return [*rlimits(self.limits), "/bin/sh", "-c", _START, _START_NAME, os.path.join(WORKSPACE, cwd)]

    async def _serve(self, cmd: list[str], user: str) -> ExecResult[str]:
        """A command that leaves a server behind, which lives until the sample ends."""
        command = [
            *self.place.command(user, {}, self._calls.new()),
            *self._start("/"),
            "0",
            "/bin/sh",
            "-c",
            _SERVE,
            "serve",
        ]
        server = await anyio.open_process([*command, *cmd], stderr=asyncio.subprocess.DEVNULL)
        self._servers.append(server)
        assert server.stdout
        said = b""
        with suppress(anyio.EndOfStream), anyio.fail_after(_SERVER_TIMEOUT):
            while not said.endswith(_SERVED):
                said = (said + await server.stdout.receive())[-_SERVER_SAYS:]
        output, _, code = said.decode(errors="replace").rstrip("\x03").rpartition("\n")
        returncode = int(code) if code.isdigit() else 1
        return ExecResult(returncode == 0, returncode, output, output)

    async def _check(self) -> None:
        """Runs a real command: nothing less shows that namespaces, mounts and limits are allowed here."""
        try:
            result = await self.exec(["/bin/sh", "-c", "echo works"], timeout=30)
        except TimeoutError as error:
            raise SandboxUnavailableError("The sandbox did not start in 30 s.") from error
        if result.stdout != "works\n":
            raise SandboxUnavailableError(f"A first command failed in the sandbox: {result}.")

    async def _end(self) -> None:
        for server in self._servers:
            with suppress(ProcessLookupError):
                server.kill()
            await server.aclose()
        await self._launched.close()


class SandboxFileError(OSError):
    """A file in the sandbox could not be read or written, for a reason that lies with what the sample has done to it."""


def _check_call(cmd: list[str], env: dict[str, str]) -> None:
    """What Python itself refuses to start anything with; the launcher would fail on it in words of its own."""
    if not cmd:
        raise ValueError("The command is empty.")
    for name in env:
        if not name or "=" in name:
            raise ValueError(f"illegal environment variable name: {name!r}")
    for part in (*cmd, *env, *env.values()):
        if "\0" in os.fspath(part):
            raise ValueError("embedded null byte")


def _raise_for(result: ExecResult[bytes], file: str) -> None:
    if result.returncode in (errno.ENOENT, errno.EACCES, errno.EISDIR):
        raise OSError(result.returncode, os.strerror(result.returncode), file)  # Python makes it the subclass meant
    if not result.success:
        reason = result.stderr.decode(errors="replace").strip() or f"exit code {result.returncode}"
        raise SandboxFileError(f"Reading or writing {file!r} in the sandbox failed: {reason}")


def _user(name: str | None) -> str:
    for user, uid in UIDS.items():
        if name in (user, str(uid)):
            return user
    if name is not None:
        raise SandboxUserUnsupportedError(f"The sandbox has the users {USER} and {ROOT}: it cannot run as {name!r}.")
    return USER

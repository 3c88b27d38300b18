"""The service's side of the runner: starts a child per execution, listens to it, and is sure to stop it."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from subprocess import DEVNULL
from typing import Self

import anyio
import structlog
from anyio.abc import Process
from pydantic import ValidationError

from app.metrics import RunnerFigures
from app.redaction import Secrets
from app.runner.discretion import discreet
from app.runner.forkserver import Report, Request
from app.runner.listing import whole
from app.runner.messages import MESSAGE, MESSAGE_LIMIT, Done, Job, Listed, Message, Planned
from app.runner.storable import storable_text
from app.tracing import about

log = structlog.get_logger(__name__)

OUTPUT = "output.txt"
"""What a child prints, in the job's directory."""

_CHUNK = 2**16
_PACKET = 4096
_TAIL_BYTES, _TAIL_LINES = 4096, 20
_GRACE = 5.0
_WARM_UP = 30.0
"""Seconds that a child waits for a warm forkserver, which takes about 4: a dozen started cold take longer than that
together, each importing for itself what the forkserver is about to import for all."""
_FORK_DEADLINE = 60.0
"""Seconds after which a forkserver that does not fork is given up. While it imports it does not answer, either."""
_KILL_DEADLINE = 5.0
"""Seconds for the kernel and the forkserver to end a killed process and to tell."""

_FIXED = {
    "PYTHON_DOTENV_DISABLED": "1",  # Inspect would read a `.env` near by, which may hold the service's own settings
    "OPENBLAS_NUM_THREADS": "1",  # numpy would start threads as it is imported: the forkserver may have none
}


@dataclass(frozen=True)
class Crashed:
    """The child ended, or had to be ended, before it was done. `output`: the last lines it printed."""

    reason: str
    output: str

    def __str__(self) -> str:
        return f"{self.reason}\n{self.output}".rstrip()


class Child:
    """One running attempt. Iterating gives its messages; the last one is `Done`, or `Crashed` in its place. `secrets`: taken
    out of them."""

    def __init__(self, messages: int, output: Path, execution_id: str = "", secrets: Secrets | None = None) -> None:
        self.execution_id = execution_id
        self._secrets = secrets or Secrets()
        self.began = time.monotonic()
        self.peak_bytes: int | None = None
        """Its largest resident set, what it shares with the forkserver included; known once it has ended."""
        self.pid: int | None = None
        """None until it is forked, and if it never was."""
        self.asked_for = False
        """The forkserver may be about to fork it."""
        self._messages = messages
        self._output = output
        self._buffer = bytearray()
        self._listed: list[Listed] = []
        self.forked = anyio.Event()
        self._ended = anyio.Event()
        self._end = ""
        self._killed_because: str | None = None
        self._done = False
        self.grace = _GRACE
        """Seconds that it has to end after it was asked to stop."""

    async def __aiter__(self) -> AsyncIterator[Message | Crashed]:
        async for said in self._said():
            if isinstance(said, Crashed):
                yield Crashed(self._secrets.redact(said.reason), self._secrets.redact(said.output))
            else:
                yield discreet(said, self._secrets)

    async def _said(self) -> AsyncIterator[Message | Crashed]:
        while True:
            line = await self._line()
            if isinstance(line, Crashed):
                yield line
                return
            try:
                message = MESSAGE.validate_json(line)
            except ValidationError:
                yield await self._crash("it wrote what is no message", bytes(line[:100]))
                return
            if isinstance(message, Listed):
                self._listed.append(message)
                continue
            self._done = isinstance(message, Done)
            yield whole(self._listed, message) if isinstance(message, Planned) else message
            if self._done:
                return

    async def stop(self, grace: float | None = None) -> None:
        """Asks it to stop (Inspect then finishes its log), and kills it after `grace` seconds. Always succeeds; what it
        sends meanwhile is for whoever iterates."""
        grace = self.grace if grace is None else grace
        with anyio.CancelScope(shield=True):
            if not self.asked_for:
                return
            if self.pid is None:
                self.kill("it was stopped before it began")
            elif not self._done:
                self._signal(signal.SIGINT)
            with anyio.move_on_after(grace):
                await self._ended.wait()
                return
            self.kill(f"it did not stop within {grace:g} s")
            with anyio.move_on_after(_KILL_DEADLINE):
                await self._ended.wait()
                return
            log.error("a child has been killed, but has not ended", pid=self.pid)

    def wind_down(self) -> None:
        """Asks it to save the state of its samples and to pause; it says `Paused` if it could."""
        if not self._done:
            self._signal(signal.SIGUSR1)

    def kill(self, reason: str = "it was killed on purpose") -> None:
        """At once, with everything it has started."""
        if not self._ended.is_set():
            self._killed_because = self._killed_because or reason
            self._signal(signal.SIGKILL)

    async def _line(self) -> bytearray | Crashed:
        searched = 0
        while (newline := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MESSAGE_LIMIT:
                return await self._crash(f"it wrote a message of more than {MESSAGE_LIMIT >> 20} MiB")
            # Only what has been asked for is read: a slow consumer fills the pipe, and that slows the child.
            chunk = await self._read()
            if not chunk:
                return await self._end_of_file()
            self._buffer += chunk
        line = self._buffer[:newline]
        del self._buffer[: newline + 1]
        return line

    async def _read(self) -> bytes:
        await anyio.wait_readable(self._messages)
        return os.read(self._messages, _CHUNK)

    async def _end_of_file(self) -> Crashed:
        with anyio.move_on_after(_GRACE):
            await self._ended.wait()
            return Crashed(self._killed_because or self._end, _tail(self._output))
        return await self._crash("it closed its pipe, but did not end")

    async def _crash(self, reason: str, wrote: bytes = b"") -> Crashed:
        """What it wrote is output: it may be anything, and the reason is logged."""
        self.kill(reason)
        with anyio.move_on_after(_KILL_DEADLINE):
            await self._ended.wait()
        return Crashed(reason, "\n".join(filter(None, (repr(wrote)[1:] if wrote else "", _tail(self._output)))))

    async def discard(self) -> None:
        while await self._read():
            pass

    def _signal(self, number: signal.Signals) -> None:
        # A pid could in theory be another's by now: the forkserver has reaped the child, and its word of it is not here
        # yet. That would take a full round of the kernel's pids within a few milliseconds.
        if self.pid is not None and not self._ended.is_set():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number) if number == signal.SIGKILL else os.kill(self.pid, number)

    # What the forkserver tells about it

    def started(self, pid: int) -> None:
        self.pid = pid
        self.forked.set()
        if self._killed_because:
            self._signal(signal.SIGKILL)

    def exited(self, status: int, peak_bytes: int | None = None) -> None:
        self.peak_bytes = peak_bytes
        self.lost(_how(os.waitstatus_to_exitcode(status)))

    def lost(self, end: str) -> None:
        self._end = end
        self.forked.set()
        self._ended.set()


class Supervisor:
    """Keeps a warm forkserver, and starts it again when it has died. One per worker."""

    def __init__(
        self,
        environment: Mapping[str, str],
        before_start: Callable[[str], None] = lambda _: None,
        figures: RunnerFigures | None = None,
        secrets: Secrets | None = None,
    ) -> None:
        """`environment`: the children's. The service's own settings (PROCTOR_…) are left out: evaluations and what they
        run must not be able to reach the database. `before_start` is told in words what is about to begin, and may raise:
        a child runs for minutes, and nothing that is short of supply may be held so long. `secrets`: taken out of what
        children say."""
        kept = {name: value for name, value in environment.items() if not name.startswith("PROCTOR_")}
        self._environment = kept | _FIXED
        self._before_start = before_start
        self._figures = figures or RunnerFigures()
        self._secrets = secrets
        self._starting = anyio.Lock()
        self._forkserver: _Forkserver | None = None

    async def __aenter__(self) -> Self:
        await self._living_forkserver()
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            if self._forkserver is not None:
                await self._forkserver.close()

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[Child]:
        """Leaving the block stops the child for sure."""
        self._before_start(f"run {job.execution_id} in a child")
        output = Path(job.directory, OUTPUT)
        receive, send = os.pipe()
        child = Child(receive, output, job.execution_id, self._secrets)
        self._figures.child(1)
        try:
            with _descriptors(job, send, output) as descriptors:
                await self.warm()
                forkserver = await self._living_forkserver()
                child.began = time.monotonic()
                await forkserver.fork(child, descriptors)
            yield child
        finally:
            with anyio.CancelScope(shield=True):
                await _put_away(child)
                os.close(receive)
            self._figures.child(-1)
            if child.peak_bytes is not None:
                self._figures.memory(child.peak_bytes, job.kind)

    async def warm(self) -> None:
        """Returns when children start as fast as they can, or could not within `_WARM_UP` of their forkserver's start."""
        forkserver = await self._living_forkserver()
        with anyio.CancelScope(deadline=forkserver.warm_by):
            await forkserver.warm.wait()

    async def _living_forkserver(self) -> "_Forkserver":
        async with self._starting:
            if self._forkserver is None or self._forkserver.dead:
                self._forkserver = await _Forkserver.start(self._environment)
            return self._forkserver


class _Forkserver:
    """The process that forks, seen from the service."""

    def __init__(self, process: Process, control: socket.socket) -> None:
        self.dead = False
        self.warm = anyio.Event()
        self.warm_by = anyio.current_time() + _WARM_UP
        self._process = process
        self._control = control
        self._children: dict[int, Child] = {}
        self._ids = count(1)
        # in no push's context: what is logged of it concerns no single one
        self._listener = asyncio.create_task(self._listen(), name="forkserver", context=Context())

    @classmethod
    async def start(cls, environment: Mapping[str, str]) -> Self:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = await anyio.open_process(
                [sys.executable, "-m", "app.runner.forkserver", str(theirs.fileno()), str(os.getpid())],
                env=environment,
                stdin=DEVNULL,
                stdout=None,
                stderr=None,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        ours.setblocking(False)
        return cls(process, ours)

    async def fork(self, child: Child, descriptors: list[int]) -> None:
        """Returns when the child runs, or has ended already for want of a forkserver."""
        id = next(self._ids)
        self._children[id] = child
        request = json.dumps(Request(id=id)).encode()
        try:
            await self._send(request, descriptors)
            child.asked_for = True
        except OSError as error:
            del self._children[id]
            child.lost(f"its forkserver could not be reached: {error}")
        with anyio.move_on_after(_FORK_DEADLINE):
            await child.forked.wait()
            return
        log.error("the forkserver does not answer: it is replaced")
        self._process.kill()
        await child.forked.wait()

    async def _send(self, packet: bytes, descriptors: list[int]) -> None:
        while True:
            with suppress(BlockingIOError):
                socket.send_fds(self._control, [packet], descriptors)
                return
            await anyio.wait_writable(self._control)

    async def _listen(self) -> None:
        try:
            while True:
                await anyio.wait_readable(self._control)
                packet = self._control.recv(_PACKET)
                if not packet:
                    break
                self._on_report(json.loads(packet))
        except OSError as error:
            log.warning("the connection to the forkserver broke", reason=str(error))
        finally:
            with anyio.CancelScope(shield=True):
                await self._bury()

    def _on_report(self, report: Report) -> None:
        match report["event"]:
            case "warm":
                self.warm.set()
            case "forked":
                self._children[report["id"]].started(report["pid"])
            case "failed":
                self._children.pop(report["id"]).lost(f"it could not be started: {report['error']}")
            case "exited":
                self._children.pop(report["id"]).exited(report["status"], report["peak_bytes"])

    async def close(self) -> None:
        """With all its children."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        await self._end()
        await self._listener

    async def _end(self) -> int:
        with anyio.move_on_after(_KILL_DEADLINE):
            return await self._process.wait()
        with suppress(ProcessLookupError):
            self._process.kill()
        return await self._process.wait()

    async def _bury(self) -> None:
        self.dead = True
        self.warm.set()
        for child in self._children.values():
            log.error("a child is lost with its forkserver", **about(child.execution_id), pid=child.pid)
            child.kill("its forkserver died")
            child.lost("its forkserver died")
        how = _how(await self._end())
        self._control.close()
        (log.error if self._children else log.info)("the forkserver is gone", how=how)


async def _put_away(child: Child) -> None:
    """A child that is asked to stop may have to empty its pipe first."""
    async with anyio.create_task_group() as group:
        group.start_soon(child.discard)
        await child.stop()
        group.cancel_scope.cancel()


@contextmanager
def _descriptors(job: Job, send: int, output: Path) -> Iterator[list[int]]:
    """What a child is given: the job, as a file in memory; the pipe; a file for what it prints."""
    with open(send, "wb", 0), open(os.memfd_create("job"), "wb") as text:
        text.write(job.model_dump_json().encode())
        text.flush()
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab", 0) as printed:
            yield [text.fileno(), send, printed.fileno()]


def _how(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"it was killed by {signal.Signals(-code).name}{hint}"


def _tail(output: Path) -> str:
    try:
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - _TAIL_BYTES))
            text = storable_text(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])

"""The process that every child is forked from: Inspect is imported once, here, and each child has it in memory.

Started by the supervisor as `python -m app.runner.forkserver CONTROL PARENT`: the descriptor of a Unix socket that
keeps packets apart, and the supervisor's pid. A request carries three descriptors: the job (a file), the pipe for
messages, and a file for what the child prints. It has one thread and must keep it so: a fork has only the one that
forks, and would hang on a lock that another held.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal, NoReturn, TypedDict

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36  # likewise
_PACKET = 4096
_HEAVY = ("openai", "anthropic", "google.genai", "numpy")  # about 4 s of imports, of which the model providers most
_LARGE = ("openai", "anthropic", "google.genai")
"""Packages of usual model providers: seconds to import, so before the scout is sent, lest both have to."""
_CRASHED = 70  # EX_SOFTWARE, <sysexits.h>


class Request(TypedDict):
    id: int


class Report(TypedDict, total=False):
    """What the forkserver tells: `forked` comes with a pid, `exited` with a wait status and the largest resident set of the
    child or of anything that it waited for, `failed` with an error."""

    event: Literal["forked", "exited", "failed", "warm"]
    id: int
    pid: int
    status: int
    peak_bytes: int
    error: str


def main() -> None:
    control, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    die_with_parent(parent, signal.SIGTERM)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # see `_bury_orphans`
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in a child that has not begun: nothing of it is to be wound down
    # A child must not lose the interrupt that comes before it has its own handlers: blocked here, it waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    control.set_inheritable(False)
    with Forkserver(control) as server:
        server.serve()


def die_with_parent(parent: int, by: signal.Signals) -> None:
    """Also when the parent is killed by SIGKILL, and also when it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        sys.exit(0)


class Forkserver:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int | None] = {}  # pid: the request's id; None: the scout
        self._to_import = list(_HEAVY)
        self._scouted = b""
        self._scouting = True
        self._selector = selectors.DefaultSelector()
        self._wake, wake = socket.socketpair()
        for end in (self._wake, wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._wake_sender = wake

    def __enter__(self) -> "Forkserver":
        own = os.getpid()  # a child that has not begun has this handler too

        def leave(*_: object) -> None:
            """Not by an exception: raised while a module is being imported, it may be swallowed there."""
            if os.getpid() == own:
                self.__exit__()
            os._exit(0)

        signal.signal(signal.SIGTERM, leave)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._children):
            _kill_group(pid)

    def serve(self) -> None:
        """Returns when the supervisor has gone."""
        import app.runner.child  # noqa: F401  (with Inspect: the seconds that no child has to wait for)

        self._selector.register(self._control, selectors.EVENT_READ, self._on_request)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_exit)
        self._send_scout()
        while self._control.fileno() >= 0:
            events = self._selector.select(0 if self._to_import else None)
            for key, _ in events:
                key.data()
            if not events and self._to_import:
                self._import_next()

    def _on_request(self) -> None:
        packet, descriptors, _, _ = socket.recv_fds(self._control, _PACKET, 3, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            self._control.close()
            return
        request: Request = json.loads(packet)
        job, messages, output = descriptors
        try:
            pid = self._fork(request["id"], lambda: run_job(job, messages, output))
        except OSError as error:
            self._tell({"event": "failed", "id": request["id"], "error": str(error)})
        else:
            self._tell({"event": "forked", "id": request["id"], "pid": pid})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _on_exit(self) -> None:
        self._wake.recv(_PACKET)
        for pid, id in list(self._children.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _kill_group(
                pid
            )  # what it has left behind; not reaped yet, it keeps the group's number from being used again
            _, status, used = os.wait4(pid, 0)
            del self._children[pid]
            if id is not None:
                # ru_maxrss is in KiB, getrusage(2)
                self._tell({"event": "exited", "id": id, "status": status, "peak_bytes": used.ru_maxrss * 1024})
        self._bury_orphans()

    def _bury_orphans(self) -> None:
        """What a child's own children leave when they end before theirs do, as bubblewrap may with every command. They
        come here, because in a container the service is the first process, which waits for none that it did not start:
        they would stay for as long as it runs."""
        with suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in self._children:
                    return  # it has ended since: its own signal has come, and then this goes on
                os.waitpid(ended.si_pid, 0)

    def _tell(self, report: Report) -> None:
        try:
            self._control.send(json.dumps(report).encode())
        except OSError:
            self._control.close()

    def _fork(self, id: int | None, work: Callable[[], None]) -> int:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(server, work)
        os.setpgid(pid, pid)  # by both, so that neither has to wait for the other
        self._children[pid] = id
        return pid

    def _become_child(self, server: int, work: Callable[[], None]) -> NoReturn:
        code = _CRASHED
        try:
            os.setpgid(0, 0)
            die_with_parent(server, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            for number, handler in (
                (signal.SIGCHLD, signal.SIG_DFL),
                (signal.SIGTERM, signal.SIG_DFL),
                (signal.SIGINT, signal.default_int_handler),
            ):
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            for end in (self._control, self._wake, self._wake_sender, self._selector):
                end.close()
            work()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    # What a first evaluation imports late is found out by a scout: a child that runs one, in safety, and tells. The
    # server imports the same, one module at a time, between requests; what is known to be large it imports meanwhile.

    def _send_scout(self) -> None:
        for name in _LARGE:
            import_quietly(name)
        receive, send = os.pipe()
        self._fork(None, lambda: scout(send))
        os.close(send)
        self._selector.register(receive, selectors.EVENT_READ, lambda: self._on_scouted(receive))

    def _on_scouted(self, receive: int) -> None:
        data = os.read(receive, 1 << 16)
        self._scouted += data
        if not data:
            self._selector.unregister(receive)
            os.close(receive)
            self._scouting = False
            self._to_import += [name for name in self._scouted.decode().split() if name not in sys.modules]
            self._freeze_if_complete()

    def _import_next(self) -> None:
        import_quietly(self._to_import.pop(0))
        self._freeze_if_complete()

    def _freeze_if_complete(self) -> None:
        if not self._scouting and not self._to_import:
            self._freeze()

    def _freeze(self) -> None:
        """What is here now is shared with the children for good: their garbage collector shall not touch its pages."""
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, (
            f"{len(threads)} threads: a child has only the one that forks, and may hang on another's lock"
        )
        gc.collect()
        gc.freeze()
        self._tell({"event": "warm"})


def run_job(job: int, messages: int, output: int) -> None:
    _redirect(output)
    faulthandler.enable()
    _prefer_for_oom_killer()
    reseed()
    from app.runner.child import main as run
    from app.runner.messages import Job
    from app.runner.writer import Writer

    with open(job, "rb") as file:
        file.seek(0)
        parsed = Job.model_validate_json(file.read())
    _keep_temporary_files(parsed.directory)
    out = Writer(messages)
    run(parsed, out)
    out.close()


def scout(send: int) -> None:
    before = set(sys.modules)
    from app.runner.warmup import exercise

    exercise()
    with open(send, "w") as file:
        file.write("\n".join(sorted(_importable(set(sys.modules) - before))))


def _importable(names: Iterable[str]) -> list[str]:
    return [name for name in names if getattr(sys.modules[name], "__spec__", None) is not None]


def import_quietly(name: str) -> None:
    """The scout could import it. If this process cannot, children are slower for it, and nothing else."""
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"forkserver: {name} cannot be imported: {error!r}", file=sys.stderr)


def _redirect(output: int) -> None:
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _keep_temporary_files(directory: str) -> None:
    """With the attempt: they end with it, also when the child is killed and can remove nothing itself."""
    tempfile.tempdir = os.environ["TMPDIR"] = os.path.join(directory, "tmp")
    os.makedirs(tempfile.tempdir, exist_ok=True)


def _prefer_for_oom_killer() -> None:
    """Short of memory, the kernel shall take a child, whose attempt can be repeated, rather than the service."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def reseed() -> None:
    """Python's generator is seeded anew in a fork; numpy's is not, so all children would draw the same numbers."""
    generator: Any = sys.modules.get("numpy.random")
    if generator is not None:
        generator.seed()


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


if __name__ == "__main__":
    main()

"""What one sample's code may use in sum: held by a control group, and where none can be made, by the watchdog."""

import errno
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import anyio.from_thread
import pytest
from anyio.abc import Process
from inspect_ai.util._sandbox._cli import SANDBOX_CLI, SANDBOX_TOOLS_DIR

from app.runner import bubblewrap, sandbox
from app.runner.bubblewrap import Bubblewrap
from app.runner.cgroup import Cgroup, hand_down
from app.runner.launchers import Launched, open_place
from app.runner.messages import Containment
from app.runner.place import make_directory
from app.runner.sandbox import ProctorSandbox, contain
from app.runner.syscalls import ALWAYS, MACHINES, without
from app.runner.watchdog import Watchdog, tree
from app.spec import SandboxLimits
from tests.attacks.attacks import alive, holding, stays_alive

LIMITS = SandboxLimits(memory=2**28, processes=64, workspace=2**23, tmp=2**22, cpu=20, output=2**16)
TOGETHER = f"import os, select, time\n{holding(4, '20')}print(count)"


async def _open(monkeypatch: pytest.MonkeyPatch, cgroups: bool) -> ProctorSandbox:
    if not cgroups:
        monkeypatch.setattr(Cgroup, "make", classmethod(lambda cls, limits: None))
    contain(Containment(limits=LIMITS))
    environments = await ProctorSandbox.sample_init("test", None, {})
    contain(Containment())
    return environments["default"].as_type(ProctorSandbox)


@pytest.fixture(params=["control group", "watchdog"])
async def bounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ProctorSandbox]:
    if request.param == "control group" and (group := Cgroup.make(LIMITS)) is None:
        pytest.skip("no control group can be made here: the watchdog holds these bounds")
    elif request.param == "control group" and group:
        group.remove()
    environment = await _open(monkeypatch, request.param == "control group")
    yield environment
    await ProctorSandbox.sample_cleanup("test", None, {"default": environment}, False)


async def test_memory_is_bounded_in_sum(bounded: ProctorSandbox) -> None:
    result = await bounded.exec(["python3", "-c", TOGETHER], timeout=60)
    if bounded._launched.watchdog.memory is None:
        assert int(result.stdout) < 4
    else:
        assert not result.success
        assert "used more than 256 MiB of memory together" in result.stderr


async def test_the_sandbox_works_after_a_command_that_wanted_too_much(bounded: ProctorSandbox) -> None:
    await bounded.exec(["python3", "-c", TOGETHER], timeout=60)
    assert (await bounded.exec(["echo", "works"])).stdout == "works\n"


BOMB = """
import os, time
while True:
    try:
        if os.fork() == 0: time.sleep(600)
    except OSError: time.sleep(0.1)
"""


async def test_a_sample_that_uses_up_its_processes_fails_its_own_commands_and_no_infrastructure(
    bounded: ProctorSandbox,
) -> None:
    """Those beside it, too: none of them raises what would fail the evaluation."""
    mark, ended = f"bomb-{os.getpid()}-{id(bounded)}", anyio.Event()

    async def fork() -> None:
        await bounded.exec(["python3", "-c", BOMB, mark], concurrency=False)
        ended.set()  # by the watchdog

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(fork)
        with anyio.fail_after(120):
            while len(alive(mark)) < 60 and not ended.is_set():
                await anyio.sleep(0.02)
        for _ in range(15):
            await bounded.exec(["sh", "-c", "true & wait"], concurrency=False)
        group.cancel_scope.cancel()
    assert (await bounded.exec(["echo", "works"])).stdout == "works\n"


async def test_a_call_that_is_ended_before_its_command_starts_is_no_failure_of_the_infrastructure(
    bounded: ProctorSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_START", "kill -9 $$; sleep 5")
    monkeypatch.setattr(Watchdog, "_over", lambda *_: "it had more than 64 processes")
    result = await bounded.exec(["true"])
    assert not result.success
    assert "it had more than 64 processes" in result.stderr


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bubblewrap whose second process waits for the first, which it does while it starts, and holds the command's output;
    yields the mark of its second process."""
    mark = f"waits-{os.getpid()}"
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = Path(folder, "bwrap")
        program.write_text(f"#!/bin/bash\n(exec -a {mark} sleep 600) & wait\n")
        program.chmod(0o755)
        monkeypatch.setattr(bubblewrap, "binary", lambda: str(program))
        yield mark


async def test_a_call_that_is_ended_as_it_starts_comes_to_an_end(
    starting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watchdog, "_over", lambda self, pids: "it is too much" if alive(starting) else None)
    launched = await open_place(Containment(limits=LIMITS))
    try:
        with anyio.fail_after(60):
            result = await ProctorSandbox(launched, launched.limits).exec(["true"])
    finally:
        await launched.close()
    assert "it is too much" in result.stderr
    assert not await stays_alive(starting)


TAKE = """
import ctypes, sys, time
libc, count = ctypes.CDLL(None), 0
while count < 1000 and libc.inotify_init1(0) != -1: count += 1
print(count, flush=True)
open("taken", "w").close()
time.sleep(60)
"""


async def test_one_sample_leaves_its_neighbours_their_inotify_instances(
    bounded: ProctorSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel grants each user of the machine 128 of them by default, and all samples are one user."""
    neighbour = await _open(monkeypatch, cgroups=False)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(bounded.exec, ["python3", "-c", TAKE])
            with anyio.fail_after(60):
                while not (await bounded.exec(["test", "-e", "taken"])).success:
                    await anyio.sleep(0.02)
            seen = await neighbour.exec(["python3", "-c", "import ctypes; print(ctypes.CDLL(None).inotify_init1(0))"])
            group.cancel_scope.cancel()
        assert int(seen.stdout) >= 0
    finally:
        await ProctorSandbox.sample_cleanup("test", None, {"default": neighbour}, False)


SEGMENTS = """
import ctypes
libc, count = ctypes.CDLL(None, use_errno=True), 0
while count < 64 and libc.shmget(0, 2**20, 0o1600) != -1: count += 1
print(count)
"""


async def test_shared_memory_that_lasts_is_bounded_for_the_sample_and_not_for_the_call(bounded: ProctorSandbox) -> None:
    first, second = [int((await bounded.exec(["python3", "-c", SEGMENTS])).stdout) for _ in range(2)]
    assert LIMITS.memory
    assert first <= LIMITS.memory // 16 // 2**20
    assert second == 0


async def test_what_needs_no_such_supply_does_without_it(bounded: ProctorSandbox) -> None:
    """A system call that is refused is one the kernel does not have: programs go on without."""
    result = await bounded.exec(
        [
            "python3",
            "-c",
            "import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.syscall(425, 1, 0), ctypes.get_errno())",
        ]
    )
    assert result.stdout == f"-1 {errno.ENOSYS}\n"


async def test_programs_that_share_memory_and_talk_work(bounded: ProctorSandbox) -> None:
    program = """
import multiprocessing, multiprocessing.shared_memory, mmap, socket, subprocess
def double(n): return 2 * n
with multiprocessing.get_context("fork").Pool(4) as pool: assert pool.map(double, range(100))[-1] == 198
shared = multiprocessing.shared_memory.SharedMemory(create=True, size=2**20)
shared.close(); shared.unlink()
mmap.mmap(-1, 2**20)[0] = 1
with socket.create_server(("127.0.0.1", 0)) as server: socket.create_connection(server.getsockname()).close()
assert subprocess.run(["sh", "-c", "seq 100000 | sort -n | tail -1"], capture_output=True).stdout == b"100000\\n"
print("works")
"""
    result = await bounded.exec(["python3", "-c", program], timeout=60)
    assert result.stdout == "works\n", result.stderr


def test_another_machine_s_calls_are_not_let_through() -> None:
    for machine, (audit, numbers) in MACHINES.items():
        program = list(struct.iter_unpack("HBBI", without(ALWAYS, machine)))
        for number, expected in [(numbers["keyctl"], ENOSYS), (numbers["keyctl"] | 2**30, ENOSYS), (0, ALLOWED)]:
            assert decide(program, audit, number) == expected
        assert decide(program, 0x40000003, 0) == ENOSYS  # i386
    assert without(ALWAYS, "riscv64") == b""


ALLOWED, ENOSYS = 0x7FFF0000, 0x00050000 | errno.ENOSYS


def decide(program: list[tuple[int, ...]], machine: int, number: int) -> int:
    """What the kernel would make of it: an interpreter of the four instructions in use."""
    at, loaded = 0, 0
    while True:
        code, true, false, value = program[at]
        if code == 0x06:
            return value
        if code == 0x20:
            loaded, step = {0: number, 4: machine}[value], 0
        else:
            step = true if (loaded == value if code == 0x15 else loaded >= value) else false
        at += 1 + step


async def test_files_are_bounded_in_sum_and_in_number(bounded: ProctorSandbox) -> None:
    result = await bounded.exec(["sh", "-c", "for i in 1 2 3; do head -c 4M /dev/zero > $i; done; du -sm ."])
    assert "No space left on device" in result.stderr
    assert int(result.stdout.split()[0]) <= 8
    result = await bounded.exec(["sh", "-c", "cd /tmp; for i in $(seq 3000); do : > $i || exit; done"])
    assert "No space left on device" in result.stderr


async def test_a_spec_lowers_limits_and_never_raises_them(bounded: ProctorSandbox) -> None:
    asked = SandboxLimits(memory=2**40, workspace=2**21)
    assert LIMITS.lowered(asked) == LIMITS.model_copy(update={"workspace": 2**21})
    assert SandboxLimits().lowered(asked) == asked
    assert LIMITS.lowered(None) == LIMITS


async def test_output_is_capped_at_the_limit(bounded: ProctorSandbox) -> None:
    result = await bounded.exec(["sh", "-c", "yes | head -c 10M; echo end"])
    assert result.stdout.endswith("end\n")
    assert len(result.stdout) < 2**16 + 100


async def test_the_files_end_with_the_process_that_started_the_sandbox() -> None:
    """The holder's standard input closes, whatever that process died of."""
    place = await Bubblewrap.open(make_directory(), LIMITS)
    assert place._holder.stdin
    await place._holder.stdin.aclose()
    assert await place._holder.wait() != 0
    await place.close()
    assert not place.directory.exists()


async def test_groups_of_killed_children_are_removed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Cgroup.make(LIMITS)
    if group is None:
        pytest.skip("no control group can be made here")
    left = [folder.parent / f"proctor-{2**22 + 1}-1" for folder in group.folders]  # beyond the kernel's largest pid
    for folder in left:
        folder.mkdir()
    group.remove()
    again = Cgroup.make(LIMITS)
    assert again
    again.remove()
    assert not any(folder.exists() for folder in (*left, *group.folders, *again.folders))


# Version 2 of the kernel's interface is not on every machine: what is read and written is shown on a copy of its files.


@pytest.fixture
def unified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of version 2 in which the process is in /a/b, and only the root hands its controllers down."""
    from app.runner import cgroup

    for folder, controllers in ((tmp_path, "cpu memory pids"), (tmp_path / "a", ""), (tmp_path / "a/b", "")):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text(controllers)
    monkeypatch.setattr(cgroup, "MOUNT", tmp_path)
    monkeypatch.setattr(cgroup, "_own_groups", lambda: [["0", "", "/a/b"]])
    return tmp_path


def _as_the_kernel(mkdir: Callable[..., None], *files: str) -> Callable[..., None]:
    def make(folder: Path, *args: object, **named: object) -> None:
        mkdir(folder, *args, **named)
        for file in files:
            (folder / file).write_text("max")

    return make


def test_in_version_2_the_group_is_made_where_controllers_are_handed_down(
    unified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("memory.max", "memory.swap.max", "pids.max", "cgroup.procs")
    monkeypatch.setattr(Path, "mkdir", _as_the_kernel(Path.mkdir, *files))
    (group,) = (made.folders for made in [Cgroup.make(LIMITS)] if made)
    (folder,) = group
    assert folder.parent == unified
    assert {name: (folder / name).read_text() for name in files[:3]} == {
        "memory.max": str(2**28 + 2 * 2**23 + 2**22),
        "memory.swap.max": "0",
        "pids.max": str(64 + 32),
    }


def test_where_the_kernel_does_not_take_the_limits_there_is_no_group(unified: Path) -> None:
    assert Cgroup.make(LIMITS) is None
    (unified / "cgroup.subtree_control").write_text("cpu")
    assert Cgroup.make(LIMITS) is None


@pytest.fixture
def container(unified: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a container's own tree: it has the controllers, hands none down, and the process is in it."""
    from app.runner import cgroup

    monkeypatch.setattr(cgroup, "_own_groups", lambda: [["0", "", "/"]])
    (unified / "cgroup.subtree_control").write_text("")
    (unified / "cgroup.controllers").write_text("cpu io memory pids\n")
    (unified / "cgroup.procs").write_text("1\n7\n")
    return unified


def test_a_container_s_own_group_is_made_to_hand_its_controllers_down(container: Path) -> None:
    hand_down()
    assert (container / "proctor-service" / "cgroup.procs").read_text() == "7", "the last that moved there"
    assert (container / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_a_group_that_others_are_in_is_left_alone(container: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.runner import cgroup

    monkeypatch.setattr(cgroup, "_own_groups", lambda: [["0", "", "/a"]])
    (container / "a" / "cgroup.controllers").write_text("memory pids")
    (container / "a" / "cgroup.procs").write_text(f"1\n{os.getpid()}")
    hand_down()
    assert (container / "a" / "cgroup.subtree_control").read_text() == ""
    (container / "a" / "cgroup.procs").write_text(f"{os.getpid()}")  # and one that was delegated to this process
    hand_down()
    assert (container / "a" / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_a_group_without_controllers_is_left_as_it_is(container: Path) -> None:
    (container / "cgroup.controllers").write_text("cpu")
    hand_down()
    assert not (container / "proctor-service").exists()


# The watchdog's eyes


def test_a_tree_is_a_process_and_all_that_descend_from_it() -> None:
    assert os.getpid() in tree(os.getppid())


@pytest.fixture
async def call() -> AsyncIterator[tuple[Process, int]]:
    """A process, and one that it has started."""
    async with await anyio.open_process(["sh", "-c", "sleep 600 >/dev/null & echo $!; wait"]) as process:
        assert process.stdout
        started = int(await process.stdout.receive())
        yield process, started
        os.kill(started, signal.SIGKILL)
        with suppress(ProcessLookupError):
            process.kill()


async def test_it_ends_no_call_while_nothing_is_over(tmp_path: Path, call: tuple[Process, int]) -> None:
    (tmp_path / "1").write_text(str(call[0].pid))
    watchdog = Watchdog(tmp_path, memory=2**40, processes=2, disks={tmp_path: 2**30})
    watchdog.look()
    assert not watchdog.ended
    assert call[0].returncode is None


async def test_it_ends_a_call_that_is_over(tmp_path: Path, call: tuple[Process, int]) -> None:
    process, _ = call
    (tmp_path / "1").write_text(str(process.pid))
    watchdog = Watchdog(tmp_path, processes=1)
    watchdog.look()
    assert watchdog.ended == {"1": "it had more than 1 processes"}
    assert await process.wait() == -signal.SIGKILL


async def test_it_ends_nobody_who_has_the_pid_of_a_call_that_is_gone(tmp_path: Path, call: tuple[Process, int]) -> None:
    process, other = call
    (tmp_path / "1").write_text(str(other))
    watchdog = Watchdog(tmp_path, processes=0)
    watchdog.look()
    assert not watchdog.ended
    assert tree(process.pid) == [process.pid, other]


async def test_a_look_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").write_text(str(os.getpid()))
    looks, third = [0], anyio.Event()

    def look(_: Watchdog) -> None:
        looks[0] += 1
        if looks[0] == 3:
            anyio.from_thread.run_sync(third.set)
        raise PermissionError("for once")

    monkeypatch.setattr(Watchdog, "look", look)
    async with anyio.create_task_group() as group:
        group.start_soon(Watchdog(tmp_path, processes=1).watch)
        with anyio.fail_after(30):
            await third.wait()
        group.cancel_scope.cancel()


# What a tool asks to have in the background


async def _serve(environment: ProctorSandbox, mark: str) -> str:
    """As Inspect's tools do: an executable in its place that leaves a server behind."""
    beating = f": {mark}; cd /workspace; while sleep 0.05; do date +%N > next; mv next beat; done"
    server = f"#!/bin/sh\n(setsid sh -c '{beating}' </dev/null >/dev/null 2>&1 &)\necho started $1\n"
    await environment.exec(["mkdir", "-p", SANDBOX_TOOLS_DIR])
    await environment.exec(["sh", "-c", f"cat > {SANDBOX_CLI}; chmod +x {SANDBOX_CLI}"], input=server)
    return (await environment.exec([SANDBOX_CLI, "start-server"])).stdout


async def test_a_server_that_says_too_much_at_its_start_costs_us_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = await _open(monkeypatch, True)
    await environment.exec(["mkdir", "-p", SANDBOX_TOOLS_DIR])
    server = "#!/bin/sh\nhead -c 8M /dev/zero | tr '\\0' x; echo end\n"
    await environment.exec(["sh", "-c", f"cat > {SANDBOX_CLI}; chmod +x {SANDBOX_CLI}"], input=server)
    result = await environment.exec([SANDBOX_CLI, "start-server"])
    assert result.success
    assert result.stdout.endswith("xend")
    assert 2**19 < len(result.stdout) <= 2**20
    await ProctorSandbox.sample_cleanup("test", None, {"default": environment}, False)


async def test_a_tool_server_outlives_its_call_and_ends_with_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = await _open(monkeypatch, True)
    mark = f"server-{os.getpid()}-{id(environment)}"
    assert await _serve(environment, mark) == "started start-server"
    first = await environment.exec(["sh", "-c", "until [ -s beat ]; do sleep 0.02; done; cat beat"], timeout=30)
    second = await environment.exec(
        ["sh", "-c", f'until [ "$(cat beat)" != "{first.stdout.strip()}" ]; do sleep 0.02; done'], timeout=30
    )
    assert second.success, "it beats on, from another call's view"
    await ProctorSandbox.sample_cleanup("test", None, {"default": environment}, False)
    assert not await stays_alive(mark)


async def test_a_place_is_closed_with_its_watch() -> None:
    launched: Launched = await open_place(Containment(limits=LIMITS))
    await launched.close()
    assert launched.watching is None or launched.watching.done()
    assert not launched.place.calls.exists()

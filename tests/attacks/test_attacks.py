"""Every attack gets through where nothing is isolated, and through Proctor's sandbox none does; and whatever they try, each
sample ends with an outcome of its own."""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

import pytest

import app
from app.local.cloud_tasks import CloudTasksEmulator
from app.runner.messages import LOGS, MESSAGE, Containment, Done, Job, Message, Progress, SampleEnded, SampleRef
from app.runner.reachable import is_root
from app.runner.supervisor import Crashed, Supervisor
from app.spec import SandboxLimits, Spec
from tests.attacks.attacks import ALONE, ATTACKS, LOOKING, SECRET, USING, WATCHED
from tests.faults import sandbox_do

pytestmark = pytest.mark.timeout(900)
"""Seconds: for the first test of each place, which waits until all attacks have been tried there."""

TASKS = Path(__file__).with_name("tasks.py")
SOURCE = Path(app.__file__)
LIMITS = SandboxLimits(memory=2**28, processes=128, workspace=2**25, tmp=2**25, cpu=60, output=2**20)
"""Small, so that little has to be used up to be too much."""

LOCALLY = [attack.name for attack in ATTACKS.values() if attack.not_local is None]
OURS = [
    attack.name
    for attack in (*LOOKING, *USING)
    if attack.name != "a file of root's" and attack.gets_through_cloud_run is None
]
"""What does not depend on the launcher alone. Cloud Run's shows the container's own files, /etc/shadow among them: there is
nothing in it."""

ROOTS = {attack.name for attack in ATTACKS.values() if attack.only_root}


@contextmanager
def listening(family: socket.AddressFamily, address: Any) -> Iterator[socket.socket]:
    """A listener that is let down by nobody: it accepts whoever comes."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(16)

    def accept() -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield listener
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture(scope="module")
async def targets(postgres: str) -> AsyncIterator[dict[str, Any]]:
    """What there is to be reached on this machine."""
    folder = Path(mkdtemp(prefix="proctor-attacked-"))
    folder.chmod(0o777)
    (folder / "writable").mkdir()
    (folder / "writable").chmod(0o777)
    (folder / "file").write_text(SECRET)
    (folder / "file").chmod(0o644)
    with ExitStack() as stack:
        port = stack.enter_context(listening(socket.AF_INET, ("127.0.0.1", 0))).getsockname()[1]
        stack.enter_context(listening(socket.AF_UNIX, f"\0{folder}"))
        stack.enter_context(listening(socket.AF_UNIX, f"{folder}/socket"))
        (folder / "socket").chmod(0o777)
        async with CloudTasksEmulator() as queue:
            database = postgres.rpartition("@")[2].partition("/")[0].split(":")
            yield {
                "secret": SECRET,
                "file": str(folder / "file"),
                "source": str(SOURCE),
                "hidden": str(SOURCE.parent / "examples/problems/*.md"),
                "scratch": str(folder),
                "writable": str(folder / "writable"),
                "listener": ["127.0.0.1", port],
                "database": [database[0], int(database[1])],
                "queue": ["127.0.0.1", int(queue.endpoint.rpartition(":")[2])],
                "abstract": str(folder),
                "socket": str(folder / "socket"),
                "output": LIMITS.output,
            }
    rmtree(folder)


def job(sandbox: str, targets: dict[str, Any], names: list[str]) -> Job:
    directory = Path(mkdtemp(prefix="proctor-attack-", dir=targets["scratch"]))
    directory.chmod(0o777)
    logs = f"{directory}/{LOGS}"  # the attempt's own; Inspect's checkpoints lie in there too
    own = {"mark": uuid4().hex, "logs": logs, "checkpoints": logs, **(ALONE if sandbox == "local" else WATCHED)}
    args = {"names": names, "targets": targets | own}
    return Job(
        kind="run",
        evaluation_id="attack",
        execution_id="attack.1",
        attempt=1,
        spec=Spec(task=f"{TASKS}@attacks", model="mockllm/model", sandbox=sandbox, task_args=args),
        directory=str(directory),
        samples=tuple(SampleRef(id=name, epoch=1) for name in ("neighbour", *names)),
        containment=Containment(allowed=("proctor", "local"), limits=LIMITS, child_memory=2**33),
    )


@pytest.fixture(scope="module")
async def supervisor() -> AsyncIterator[Supervisor]:
    async with Supervisor({**os.environ, "OPENAI_API_KEY": SECRET}) as supervisor:
        await supervisor.warm()
        yield supervisor


async def told(supervisor: Supervisor, work: Job) -> list[Message | Crashed]:
    async with supervisor.run(work) as child:
        return [message async for message in child]


AS_NOBODY = """
import os, subprocess, sys
held = os.open("/dev/null", 0)  # a low number for the pipe, as in any child
from pathlib import Path
from app.runner import bubblewrap, place, visible
from app.runner.child import main
from app.runner.messages import Job
from app.runner.warmup import exercise
from app.runner.writer import Writer
import tests.attacks.tasks
exercise()  # loads, as root, what an ordinary user may not read here
binary, packages = bubblewrap.binary(), visible.pytest_packages()
bubblewrap.binary, visible.pytest_packages = lambda: binary, lambda: packages
job = Job.model_validate_json(sys.stdin.read())
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
send, receive = reversed(os.pipe())  # this user's own, as in any child
os.dup2(send, held); os.close(send)
subprocess.Popen(["cat"], stdin=receive); os.close(receive)
import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as any process is that began as this user
visible.system_mounts.cache_clear(); visible.python_folders.cache_clear()
os.environ["HOME"] = os.environ["TMPDIR"] = job.directory
os.chdir(job.directory)
out = Writer(held)
main(job, out)
out.close()  # its thread ends with the process, told or not
"""


async def told_as_nobody(work: Job) -> list[Message]:
    """The same child, as a user who has nothing here."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AS_NOBODY),
        cwd=SOURCE.parents[1],
        env={**os.environ, "OPENAI_API_KEY": SECRET, "PYTHONPATH": str(SOURCE.parents[1])},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(work.model_dump_json().encode())
    assert process.returncode == 0, err.decode()
    return [MESSAGE.validate_json(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
async def locally(supervisor: Supervisor, targets: dict[str, Any]) -> list[Message | Crashed]:
    return await told(supervisor, job("local", targets, LOCALLY))


@pytest.fixture(scope="module")
async def contained(supervisor: Supervisor, targets: dict[str, Any]) -> list[Message | Crashed]:
    return await told(supervisor, job("proctor", targets, list(ATTACKS)))


@pytest.fixture(scope="module")
async def contained_by_cloud_run(targets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """By what stands for Cloud Run's launcher: what Proctor itself adds to it is under attack."""
    programs = tmp_path_factory.mktemp("programs")
    sandbox_do.install(programs)
    environment = {**os.environ, "OPENAI_API_KEY": SECRET, "PATH": f"{programs}:{os.environ['PATH']}"}
    work = job("proctor", targets, OURS)
    held = work.containment.model_copy(update={"launcher": "cloud_run", "hidden": (targets["scratch"],)})
    async with Supervisor(environment) as supervisor:
        return await told(supervisor, work.model_copy(update={"containment": held}))


@pytest.fixture(scope="module")
async def nobody_locally(targets: dict[str, Any]) -> list[Message]:
    return await told_as_nobody(job("local", targets, [name for name in LOCALLY if name not in ROOTS]))


@pytest.fixture(scope="module")
async def nobody_contained(targets: dict[str, Any]) -> list[Message]:
    return await told_as_nobody(job("proctor", targets, list(ATTACKS)))


def reached(messages: list[Any], name: str) -> bool:
    """Whether the attack got through. The sample must have ended as any other, with its score."""
    assert messages[-1] == Done(), messages[-1]
    (result,) = [m.result for m in messages if isinstance(m, SampleEnded) and m.result.sample.id == name]
    assert result.error is None, result.error.message
    return bool(result.scores["got_through"].value)


def forged(messages: list[Any]) -> bool:
    return any(isinstance(message, Progress) and message.step == "forged" for message in messages)


def shown(name: str, root: bool) -> None:
    """Skips what cannot be shown where nothing is isolated, with the reason."""
    if reason := ATTACKS[name].not_local:
        pytest.skip(f"{name}: not shown without a sandbox, {reason}")
    if name in ROOTS and not root:
        pytest.skip(f"{name}: not shown without a sandbox, only root can do that anywhere")


@pytest.mark.parametrize("name", ATTACKS)
async def test_it_gets_through_where_nothing_is_isolated(name: str, locally: list[Message | Crashed]) -> None:
    shown(name, is_root())
    assert reached(locally, name)


@pytest.mark.parametrize("name", ATTACKS)
async def test_it_does_not_get_through_the_sandbox(name: str, contained: list[Message | Crashed]) -> None:
    assert not reached(contained, name)


async def test_events_can_be_forged_only_where_nothing_is_isolated(
    locally: list[Message | Crashed], contained: list[Message | Crashed]
) -> None:
    assert forged(locally)
    assert not forged(contained)


@pytest.mark.parametrize("name", OURS)
async def test_it_does_not_get_through_cloud_run_s_launcher(name: str, contained_by_cloud_run: list[Any]) -> None:
    assert not reached(contained_by_cloud_run, name)


as_nobody = pytest.mark.skipif(not is_root(), reason="not root: the tests above ran as an ordinary user already")


@as_nobody
@pytest.mark.parametrize("name", ATTACKS)
async def test_it_gets_through_for_an_ordinary_user_too(name: str, nobody_locally: list[Message]) -> None:
    shown(name, root=False)
    assert reached(nobody_locally, name)


@as_nobody
@pytest.mark.parametrize("name", ATTACKS)
async def test_it_does_not_get_through_an_ordinary_user_s_sandbox(name: str, nobody_contained: list[Message]) -> None:
    assert not reached(nobody_contained, name)

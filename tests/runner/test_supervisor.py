import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from app.runner.messages import Done, Planned, Progress, SampleRef, Started
from app.runner.supervisor import OUTPUT, Child, Crashed, Supervisor
from app.runner.writer import Writer
from tests.runner.conftest import Attempt, MakeJob, done, ended, only

pytestmark = pytest.mark.xdist_group("runner")

FIRST = (SampleRef(id=1, epoch=1),)


def test_the_service_does_not_import_inspect() -> None:
    code = "import app.runner.supervisor, app.runner.forkserver, sys; assert 'inspect_ai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_child_tells_what_happens_and_then_that_it_is_done(make_job: MakeJob, attempt: Attempt) -> None:
    messages = await attempt(make_job("run", "simple", samples=FIRST))
    assert isinstance(messages[0], Started)
    assert messages[0].versions.keys() >= {"python", "inspect_ai", "proctor"}
    assert done(messages) == Done()
    (result,) = ended(messages)
    assert result.sample == SampleRef(id=1, epoch=1)
    assert result.usage == {"mockllm/model": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}}
    progress = [message for message in messages if isinstance(message, Progress)]
    assert (progress[-1].samples_done, progress[-1].model_calls, progress[-1].tokens) == (1, 1, 15)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "it was killed by SIGKILL, perhaps for want of memory"),
        ("exit", "it ended with exit code 3"),
        ("garbage", "it wrote what is no message"),
    ],
)
async def test_a_crash_is_a_value_with_a_reason(how: str, reason: str, make_job: MakeJob, attempt: Attempt) -> None:
    messages = await attempt(make_job("run", "misbehaving", spec={"task_args": {"how": how}}, samples=FIRST))
    assert isinstance(messages[-1], Crashed)
    assert messages[-1].reason.startswith(reason)
    if how == "exit":
        assert "last words" in messages[-1].output


async def test_a_message_without_end_is_a_crash(tmp_path: Path) -> None:
    receive, send = os.pipe()
    child = Child(receive, tmp_path / OUTPUT)
    child.lost("there is no process")

    def write() -> None:
        with open(send, "wb", 0) as pipe, suppress(BrokenPipeError):
            pipe.write(b"x" * (17 << 20))

    async with anyio.create_task_group() as group:
        group.start_soon(to_thread.run_sync, write)
        assert [message async for message in child] == [Crashed("it wrote a message of more than 16 MiB", "")]
        os.close(receive)


async def test_a_plan_of_any_size_is_told(tmp_path: Path) -> None:
    """As many samples as an evaluation may have, with the longest ids."""
    receive, send = os.pipe()
    child = Child(receive, tmp_path / OUTPUT)
    samples = tuple(SampleRef(id=f"{place}".zfill(10) + "x" * 990, epoch=1) for place in range(100_000))
    plan = Planned(task="large", samples=samples, digests=tuple(range(50_000)), whole=False, log="l")

    def write() -> None:
        out = Writer(send)
        out.send(plan)
        out.send(Done())
        out.close()

    async with anyio.create_task_group() as group:
        group.start_soon(to_thread.run_sync, write)
        told = [message async for message in child]
    os.close(receive)
    assert told == [plan, Done()]


async def test_stopping_ends_a_child_that_hangs_and_all_it_has_started(
    make_job: MakeJob, supervisor: Supervisor
) -> None:
    job = make_job("run", "misbehaving", spec={"task_args": {"how": "spawn and hang"}}, samples=FIRST)
    async with supervisor.run(job) as child:
        grandchild = await _grandchild(Path(job.directory, OUTPUT))
        assert _alive(grandchild)
        await child.stop(grace=0.2)
        assert child.pid is not None
        assert not _alive(child.pid), "nobody has to wait any more"
        messages = [message async for message in child]
    await _until(lambda: not _alive(grandchild))  # killed at the same time, and perhaps gone a little later
    assert isinstance(messages[-1], Crashed)
    assert messages[-1].reason == "it did not stop within 0.2 s"


async def test_a_child_that_is_stopped_finishes_its_log_and_reports_only_what_has_ended(
    make_job: MakeJob, supervisor: Supervisor
) -> None:
    both = (SampleRef(id=1, epoch=1), SampleRef(id=2, epoch=1))
    messages = []
    async with supervisor.run(make_job("run", "waits", samples=both)) as child:
        async for message in child:
            messages.append(message)
            if isinstance(message, Progress) and message.samples_done == 1 and message.model_calls == 2:
                await child.stop(grace=60)
    assert [result.sample.id for result in ended(messages)] == [1]
    failure = done(messages).failure
    assert failure is not None
    assert failure.error_class == "cancelled"


async def test_leaving_the_block_ends_the_child(make_job: MakeJob, supervisor: Supervisor) -> None:
    async with supervisor.run(make_job("run", "waits", samples=(SampleRef(id=2, epoch=1),))) as child:
        async for message in child:
            if isinstance(message, Progress) and message.model_calls == 1:
                break
    assert child.pid is not None
    assert not _alive(child.pid)


async def test_cancelling_the_caller_ends_the_child(make_job: MakeJob, supervisor: Supervisor) -> None:
    with anyio.CancelScope() as scope:
        async with supervisor.run(make_job("run", "waits", samples=(SampleRef(id=2, epoch=1),))) as child:
            async for message in child:
                if isinstance(message, Progress):
                    scope.cancel()
    assert scope.cancelled_caught
    assert child.pid is not None
    assert not _alive(child.pid)


async def test_a_child_that_was_not_begun_keeps_nobody_waiting(make_job: MakeJob) -> None:
    async with Supervisor(os.environ) as supervisor:
        began = time.monotonic()
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with supervisor.run(make_job("plan", "simple")):
                pass
        assert scope.cancelled_caught
        assert time.monotonic() - began < 5


async def test_a_child_has_none_of_the_services_settings(make_job: MakeJob, attempt: Attempt) -> None:
    (result,) = ended(await attempt(make_job("run", "environment", samples=FIRST)))
    value = result.scores["metadata"].value
    assert isinstance(value, dict)
    assert value["leaked"] == 0
    assert result.scores["metadata"].answer == "kept"  # the model's key, for contrast


async def test_children_do_not_draw_the_same_random_numbers(make_job: MakeJob, attempt: Attempt) -> None:
    drawn = []
    for _ in range(2):
        (result,) = ended(await attempt(make_job("run", "environment", samples=FIRST)))
        value = result.scores["metadata"].value
        assert isinstance(value, dict)
        drawn.append(value["numpy"])
    assert drawn[0] != drawn[1]


async def test_fifteen_children_work_at_once(make_job: MakeJob, attempt: Attempt) -> None:
    finished = []

    async def run() -> None:
        finished.append(done(await attempt(make_job("plan", "simple"))))

    async with anyio.create_task_group() as group:
        for _ in range(15):
            group.start_soon(run)
    assert finished == [Done()] * 15


async def test_a_child_is_killed_with_its_forkserver_and_the_next_gets_another(make_job: MakeJob) -> None:
    async with Supervisor(os.environ) as supervisor:
        async with supervisor.run(make_job("run", "waits", samples=(SampleRef(id=2, epoch=1),))) as child:
            assert child.pid is not None
            os.kill(_parent(child.pid), signal.SIGKILL)
            messages = [message async for message in child]
            assert messages[-1] == Crashed("its forkserver died", "")
            gone = child.pid
            await _until(lambda: not _alive(gone))
        async with supervisor.run(make_job("plan", "simple")) as child:
            assert only(Planned, [message async for message in child])


async def test_orphans_are_buried_though_the_service_is_a_containers_first_process(
    make_job: MakeJob, supervisor: Supervisor
) -> None:
    job = make_job("run", "misbehaving", spec={"task_args": {"how": "leave an orphan"}}, samples=FIRST)
    async with supervisor.run(job) as child:
        assert child.pid is not None
        forkserver = _parent(child.pid)
        orphan = await _grandchild(Path(job.directory, OUTPUT))
        child.kill()
    assert _parent(orphan) == forkserver, "not of the first process, which would let it lie"
    os.kill(orphan, signal.SIGKILL)
    await _until(lambda: not Path(f"/proc/{orphan}").exists())


SERVICE = """
import os, sys, anyio
from app.runner.messages import Job, Started
from app.runner.supervisor import Supervisor

async def main():
    async with Supervisor(os.environ) as supervisor, supervisor.run(Job.model_validate_json(sys.argv[1])) as child:
        async for message in child:
            if isinstance(message, Started):
                print(child.pid, flush=True)

anyio.run(main)
"""


async def test_nothing_outlives_a_service_that_is_killed(make_job: MakeJob) -> None:
    job = make_job("run", "misbehaving", spec={"task_args": {"how": "spawn and hang"}}, samples=FIRST)
    async with await anyio.open_process([sys.executable, "-c", SERVICE, job.model_dump_json()], stderr=None) as service:
        try:
            assert service.stdout is not None
            child = int(await service.stdout.receive())
            everything = [child, _parent(child), await _grandchild(Path(job.directory, OUTPUT))]
        finally:
            service.kill()
    await _until(lambda: not any(map(_alive, everything)))


async def test_the_forkserver_has_one_thread(supervisor: Supervisor, make_job: MakeJob) -> None:
    async with supervisor.run(make_job("plan", "simple")) as child:
        assert child.pid is not None
        assert len(os.listdir(f"/proc/{_parent(child.pid)}/task")) == 1


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _alive(pid: int) -> bool:
    """A zombie is not: nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):  # the latter: it went between open and read
        return False


async def _grandchild(output: Path) -> int:
    def told() -> bool:
        return output.exists() and "grandchild" in output.read_text()

    await _until(told)
    return int(output.read_text().split()[-1])


async def _until(condition: Callable[[], bool]) -> None:
    deadline = anyio.current_time() + 60
    while not condition():
        assert anyio.current_time() < deadline
        await anyio.sleep(0.02)


WHERE_EXCEPTIONS_ARE_LOST = """
import os, signal, socket, weakref
from app.runner.forkserver import Forkserver
class Module: pass
def callback(_):  # as importlib has them: what one raises is printed, and forgotten
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass
with Forkserver(socket.socketpair()[0]):
    module = Module()
    kept = weakref.ref(module, callback)
    del module
    print("it goes on")
"""


def test_a_forkserver_ends_when_it_is_told_to_in_the_middle_of_an_import() -> None:
    ran = subprocess.run([sys.executable, "-c", WHERE_EXCEPTIONS_ARE_LOST], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")

"""One log is made of many without reading what is in them, and a report that is cut short goes on where it was."""

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import anyio
import pytest

from app.runner.checkpoint import WIND_DOWN
from app.runner.members import copy_member
from app.runner.messages import (
    LOGS,
    MESSAGE,
    SLIM_BECAUSE,
    Job,
    Message,
    Packed,
    Paused,
    Planned,
    Reported,
    Started,
    Transcript,
)
from app.runner.run import interrupted
from app.runner.supervisor import Crashed, Supervisor
from tests.runner.conftest import Attempt, MakeJob, done, ended, only
from tests.runner.parts import make_parts

pytestmark = pytest.mark.xdist_group("runner")

MIB = 2**20

EQUAL = """
import json, sys
from pathlib import Path
from zipfile import ZipFile
from inspect_ai.log import *

merged, peer, *parts = sys.argv[1:]
log = read_eval_log(merged, header_only=True)
found = [sample for part in parts for sample in read_eval_log(part).samples]
places = {id: place for place, id in enumerate(log.eval.dataset.sample_ids)}
log.samples = sorted(found, key=lambda sample: (sample.epoch, places[sample.id]))
write_eval_log(log, peer)


def dump(value):
    if isinstance(value, list):
        return [dump(one) for one in value]
    return json.loads(value.model_dump_json(exclude={"location", "etag"}))


def same(read):
    one, other = dump(read(merged)), dump(read(peer))
    assert one == other and one, read


same(read_eval_log)
same(lambda path: read_eval_log(path, header_only=True))
same(lambda path: read_eval_log(path, resolve_attachments=True))
same(lambda path: read_eval_log(path, exclude_fields={"events", "messages"}))
same(read_eval_log_sample_summaries)
same(lambda path: list(read_eval_log_samples(path, all_samples_required=False)))
keys = [(sample.id, sample.epoch) for sample in log.samples]
same(lambda path: read_eval_log_samples_by_id(path, keys))
for sample in log.samples:
    same(lambda path: read_eval_log_sample(path, sample.id, sample.epoch))
    same(lambda path: read_eval_log_sample(path, uuid=sample.uuid))
with ZipFile(merged) as one, ZipFile(peer) as other:
    names = [sorted(n for n in archive.namelist() if "_journal/summaries" not in n) for archive in (one, other)]
    assert names[0] == names[1] and one.testzip() is None and len(set(one.namelist())) == len(one.namelist())
    for name in names[0]:
        assert json.loads(one.read(name)) == json.loads(other.read(name)), name
header = read_eval_log(merged, header_only=True)
header.eval.metadata = {"edited": True}
write_eval_log(header, merged, header_only=True)
assert read_eval_log(merged).eval.metadata == {"edited": True} and len(read_eval_log(merged).samples) == len(keys)
try:
    import pandas, pyarrow
    from inspect_ai.analysis import evals_df, messages_df, samples_df
except ImportError:
    sys.exit()
for frame in (samples_df, messages_df, evals_df):
    one, other = (frame(path).drop(columns=["log", "eval_id"], errors="ignore") for path in (merged, peer))
    assert len(one) and list(one.columns) == list(other.columns), frame
"""


async def python(code: str, *arguments: object) -> str:
    """In a process of its own: Inspect's synchronous functions leave event loops open behind them."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


async def plan_of(attempt: Attempt, make_job: MakeJob, samples: int) -> Path:
    plan = make_job("plan", "simple", spec={"task_args": {"n": samples}})
    return Path(plan.directory, LOGS, only(Planned, await attempt(plan)).log)


def report_of(make_job: MakeJob, plan: Path, transcripts: Sequence[Transcript], artifacts: Path) -> Job:
    spec = {"task_args": {"n": len(transcripts)}}
    more: dict[str, Any] = {"plan_log": str(plan), "transcripts": tuple(transcripts)}
    job = make_job("report", "simple", spec=spec, artifacts=f"file://{artifacts}", **more)
    return job.model_copy(update={"execution_id": "evaluation.report"})


def merged_log(job: Job, reported: Reported, artifacts: Path) -> Path:
    return artifacts / job.evaluation_id / job.execution_id / str(job.attempt) / reported.log


async def test_the_merged_log_reads_as_one_that_inspect_has_written(
    attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    """With odd ids, epochs, attachments and an errored sample."""
    spec = {"task_args": {"errors": True}}
    plan = make_job("plan", "many_faced", spec=spec)
    planned = only(Planned, await attempt(plan))
    parts, transcripts = list[Path](), list[Transcript]()
    for n in range(4):  # in executions that mix ids and epochs
        run = make_job("run", "many_faced", spec=spec, samples=planned.samples[n::4])
        for result in ended(await attempt(run)):
            path = Path(run.directory, LOGS, result.log)
            parts = [*parts, path] if path not in parts else parts
            transcripts.append(Transcript(sample=result.sample, log=f"file://{path}"))
    places = {"plan_log": str(Path(plan.directory, LOGS, planned.log)), "transcripts": tuple(transcripts)}
    job = make_job("report", "many_faced", spec=spec, artifacts=f"file://{tmp_path}/store", **places)
    reported = only(Reported, await attempt(job))
    assert SLIM_BECAUSE not in reported.results
    await python(EQUAL, merged_log(job, reported, tmp_path / "store"), tmp_path / "peer.eval", *parts)


async def test_memory_does_not_grow_with_transcripts(
    supervisor: Supervisor, attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    plan = await plan_of(attempt, make_job, 6)
    peaks = []
    for name, size in (("small", 1_000), ("large", 30 * MIB)):
        parts = await asyncio.to_thread(make_parts, tmp_path / name, 6, size)
        async with supervisor.run(report_of(make_job, plan, parts, tmp_path / "store")) as child:
            messages = [message async for message in child]
        assert SLIM_BECAUSE not in only(Reported, messages).results
        assert child.peak_bytes
        peaks.append(child.peak_bytes)
    assert peaks[1] - peaks[0] < 30 * MIB, "less than one of them"


async def test_a_report_that_is_cut_short_leaves_what_it_has_packed_to_the_next(
    supervisor: Supervisor, attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    plan, store = await plan_of(attempt, make_job, 3), tmp_path / "store"
    parts = await asyncio.to_thread(make_parts, tmp_path / "parts", 3, 1_000)
    first, blocked = tmp_path / "parts" / "1.eval", tmp_path / "parts" / "2.eval"
    log = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)  # whoever opens it waits for a writer
    messages: list[Message | Crashed] = []
    async with supervisor.run(report_of(make_job, plan, parts, store)) as child, anyio.create_task_group() as group:
        async for message in child:
            messages.append(message)
            if isinstance(message, Started):
                assert child.pid
                await listens(child.pid)
                child.wind_down()
                group.start_soon(let_go, blocked)
            if isinstance(message, Paused):
                group.start_soon(child.stop, 60.0)  # a busy machine takes longer than five seconds to leave
        group.cancel_scope.cancel()
    assert only(Packed, messages).samples == 1
    assert only(Paused, messages)
    assert done(messages).failure == interrupted()
    first.unlink()
    blocked.unlink()
    blocked.write_bytes(log)
    job = report_of(make_job, plan, parts, store)
    reported = only(Reported, await attempt(job))
    assert reported.results["completed_samples"] == 3
    assert await python(MESSAGES, merged_log(job, reported, store)) == "[(1, 2), (2, 2), (3, 2)]\n"


async def listens(pid: int) -> None:
    """Returns when it has a handler for the signal to wind down."""
    status, bit = Path(f"/proc/{pid}/status"), 1 << (WIND_DOWN - 1)
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & bit:
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
async def test_a_log_that_cannot_be_read_costs_its_own_samples_only_and_is_told_of(
    damage: str, attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    plan, store = await plan_of(attempt, make_job, 3), tmp_path / "store"
    parts = await asyncio.to_thread(make_parts, tmp_path / "parts", 3, 300_000)
    log = tmp_path / "parts" / "2.eval"
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 0xFF
    log.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "gone":
        log.unlink()
    job = report_of(make_job, plan, parts, store)
    reported = only(Reported, await attempt(job))
    assert reported.failure
    assert "1 samples have ended, but are lost: of 2 (epoch 1), its log cannot be read" in reported.failure.message
    assert reported.results["scores"][0]["metrics"]["accuracy"]["value"] == 1.0
    assert await python(MESSAGES, merged_log(job, reported, store)) == "[(1, 4), (3, 4)]\n"


async def let_go(fifo: Path) -> None:
    """Whoever opens it finds an empty log, which cannot be read."""
    while True:
        with suppress(OSError):  # nobody does yet
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        await asyncio.sleep(0.02)


MESSAGES = """
import sys
from inspect_ai.log import read_eval_log
print([(sample.id, len(sample.messages)) for sample in read_eval_log(sys.argv[1]).samples])
"""

FULL = """
import resource, sys
import app.runner.gather
from app.runner.messages import Job
from app.runner.report import report

class Out:
    def send(self, message):
        print(message.model_dump_json())

job, room, pack_bytes = sys.argv[1:]
app.runner.gather.PACK_BYTES = int(pack_bytes)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
report(Job.model_validate_json(job), Out())
"""


@pytest.mark.parametrize(("room", "pack_bytes"), [(200_000, 64 * MIB), (MIB, 1)], ids=["pack", "log"])
async def test_without_room_for_transcripts_the_metrics_and_a_slim_log_stand(
    room: int, pack_bytes: int, attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for a disk that is full: too full for a pack, or for the log of several packs."""
    plan, store = await plan_of(attempt, make_job, 3), tmp_path / "store"
    parts = await asyncio.to_thread(make_parts, tmp_path / "parts", 3, 2 * MIB)
    job = report_of(make_job, plan, parts, store)
    told = (await python(FULL, job.model_dump_json(), room, pack_bytes)).splitlines()
    reported = Reported.model_validate_json(told[-1])
    assert "File too large" in reported.results[SLIM_BECAUSE]
    assert reported.results["scores"][0]["metrics"]["accuracy"]["value"] == 1.0
    assert await python(MESSAGES, merged_log(job, reported, store)) == "[(1, 0), (2, 0), (3, 0)]\n"


REMOTE = """
import io, sys
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import app.runner.gather
from app.runner.messages import Job
from app.runner.report import report

class Upload:
    '''What an object store gives to write to.'''
    def __init__(self, store, path):
        self.store, self.path, self.data, self.closed = store, path, bytearray(), False
    def write(self, data):
        self.data += data
        return len(data)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.close()
    def flush(self):
        pass
    def tell(self):
        return len(self.data)
    def discard(self):
        pass
    def close(self):
        self.store.pipe_file(self.path, bytes(self.data))

class Remote(MemoryFileSystem):
    protocol = "remote"
    store, pseudo_dirs = {}, [""]
    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("remote://").strip("/")
    def _open(self, path, mode="rb", **more):
        return Upload(self, path) if mode == "wb" and not more.get("data") else super()._open(path, mode, **more)

class Out:
    def send(self, message):
        print(message.model_dump_json())

fsspec.register_implementation("remote", Remote)
store = fsspec.filesystem("remote")
job, merged, *parts = sys.argv[1:]
for path in parts:
    with open(path, "rb") as part:
        store.pipe_file("remote://b/" + path.rpartition("/")[2], part.read())
app.runner.gather.PACK_BYTES, app.runner.gather.BROUGHT_BYTES = 200_000, 300_000
report(Job.model_validate_json(job), Out())
(log,) = [path for path in store.find("remote://b/c# %41?") if path.endswith(".eval")]
with open(merged, "wb") as file:
    file.write(store.cat_file(log))
"""


async def test_packs_and_logs_of_a_remote_store_are_brought_some_at_a_time_and_written_forward(
    attempt: Attempt, make_job: MakeJob, tmp_path: Path
) -> None:
    plan = await plan_of(attempt, make_job, 5)
    parts = await asyncio.to_thread(make_parts, tmp_path / "parts", 5, 300_000)
    remote = [Transcript(sample=part.sample, log=f"remote://b/{part.sample.id}.eval") for part in parts]
    job = report_of(make_job, plan, remote, tmp_path).model_copy(update={"artifacts": "remote://b/c# %41?"})
    files = [str(tmp_path / "parts" / f"{n}.eval") for n in range(1, 6)]
    told = (await python(REMOTE, job.model_dump_json(), tmp_path / "merged.eval", *files)).splitlines()
    packed = [MESSAGE.validate_json(line) for line in told]
    assert [type(message) for message in packed] == [Packed, Packed, Reported]
    assert await python(MESSAGES, tmp_path / "merged.eval") == "[(1, 4), (2, 4), (3, 4), (4, 4), (5, 4)]\n"


def test_members_are_copied_beyond_what_a_zip_archive_once_could_hold(tmp_path: Path) -> None:
    """65,535 members, and 4 GiB: a hole in the file stands for those before."""
    with ZipFile(tmp_path / "source", "w", ZIP_STORED) as source:
        source.writestr("a", b"1")
    many, far = tmp_path / "many", tmp_path / "far"
    with ZipFile(tmp_path / "source") as source:
        with ZipFile(many, "w") as target:
            for number in range(66_000):
                copy_member(source, source.getinfo("a"), target, str(number))
        with ZipFile(far, "w") as target:
            assert target.fp
            target.fp.truncate(5 << 30)
            target.start_dir = target.fp.seek(5 << 30)
            copy_member(source, source.getinfo("a"), target)
    with ZipFile(many) as archive:
        assert archive.read("65999") == b"1"
    with ZipFile(far) as archive:
        assert archive.read("a") == b"1"


def test_a_member_is_copied_from_an_archive_that_was_appended_to(tmp_path: Path) -> None:
    class Forward(io.BytesIO):
        def seek(self, *_: int) -> int:
            raise OSError("only forward")

    stream = Forward()
    with ZipFile(stream, "w") as source:
        source.writestr("a", b"1" * 100)  # its sizes stand behind it
    with ZipFile(io.BytesIO(stream.getvalue())) as source, ZipFile(tmp_path / "target", "w") as target:
        copy_member(source, source.getinfo("a"), target, "b")
        copy_member(source, source.getinfo("a"), target, "c")
    with ZipFile(tmp_path / "target") as archive:
        assert archive.testzip() is None
        assert archive.read("b") == archive.read("c") == b"1" * 100

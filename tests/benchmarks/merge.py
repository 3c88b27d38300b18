"""What the one log of an evaluation costs: a report's child against `write_eval_log`, which reads every transcript.

Both begin with the same logs of one sample each, and read what they need of them. Memory is the largest resident set of the
process that does it, which tells it itself at its end.
"""

import asyncio
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from inspect_ai import eval
from inspect_ai.log import EvalLog

from app.runner.messages import Job, Transcript
from app.spec import Spec
from tests.report import Goal, Report, Value
from tests.runner.conftest import TASKS
from tests.runner.parts import make_parts
from tests.runner.tasks import simple

MIB = 2**20
GOAL_MIB = 250
"""That a report may take at most. Ours: the limit below which 15 of them fit into an instance of 4 GiB."""

_TOLD = """
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(int(peak) * 1024, time.process_time())
"""

_OURS = f"""
import sys, time
from app.runner.messages import Job
from app.runner.report import report

class Out:
    def send(self, message):
        pass

report(Job.model_validate_json(open(sys.argv[1]).read()), Out())
{_TOLD}"""

_PEER = f"""
import sys, time
from app.runner.messages import Job
from inspect_ai.log import read_eval_log, recompute_metrics, write_eval_log

job = Job.model_validate_json(open(sys.argv[1]).read())
log = read_eval_log(job.plan_log, header_only=True)
log.samples = [sample for t in job.transcripts for sample in read_eval_log(t.log.removeprefix("file://")).samples]
recompute_metrics(log)
write_eval_log(log, job.directory + "/peer.eval")
{_TOLD}"""


class Case(NamedTuple):
    what: str
    samples: int
    sample_bytes: int
    peer: int
    """Samples that the peer is given: as many as it has memory for."""


CASES = [Case("small samples", 10_000, 1_000, 10_000), Case("samples of 30 MB", 100, 30 * 10**6, 10)]
QUICK = [Case("small samples", 200, 1_000, 200), Case("samples of 30 MB", 4, 30 * 10**6, 4)]


class Cost(NamedTuple):
    peak: int
    cpu: float


async def measure(quick: bool) -> Report:
    rows, goals = list[dict[str, Value]](), list[Goal]()
    for case in QUICK if quick else CASES:
        with TemporaryDirectory(prefix="merge-") as name:
            folder = Path(name)
            parts = await asyncio.to_thread(make_parts, folder / "parts", case.samples, case.sample_bytes)
            ours = await _cost(_OURS, await asyncio.to_thread(_job, folder / "ours", parts))
            peer = await _cost(_PEER, await asyncio.to_thread(_job, folder / "peer", parts[: case.peer]))
        rows += [
            _row(case.what, "Proctor", case.samples, ours, peer),
            _row(case.what, "write_eval_log", case.peer, peer, peer),
        ]
        goals.append(Goal(f"{case.what}: peak, MiB", f"below {GOAL_MIB}", ours.peak / MIB, ours.peak / MIB < GOAL_MIB))
        if case.sample_bytes > MIB:
            ratio = peer.peak / ours.peak
            goals.append(Goal(f"{case.what}: ratio of peaks, write_eval_log / Proctor", "above 1", ratio, ratio > 1))
    return Report("merge", rows, goals)


def _row(what: str, by: str, samples: int, cost: Cost, peer: Cost) -> dict[str, Value]:
    return {
        "what": what,
        "by": by,
        "samples": samples,
        "peak, MiB": cost.peak / MIB,
        "× peak": cost.peak / peer.peak,
        "CPU s": cost.cpu,
        "CPU ms a sample": cost.cpu / samples * 1000,
    }


def _job(folder: Path, parts: list[Transcript]) -> Path:
    folder.mkdir()
    log: EvalLog = eval(
        simple(len(parts)), log_dir=str(folder / "plan"), run_samples=False, display="none", ctl_server=False
    )[0]
    job = Job(
        kind="report",
        evaluation_id="e",
        execution_id="e.report",
        attempt=1,
        spec=Spec(task=f"{TASKS}@simple", model="mockllm/model", task_args={"n": len(parts)}),
        directory=str(folder),
        plan_log=log.location,
        transcripts=tuple(parts),
        artifacts=f"file://{folder}/store",
    )
    (folder / "job.json").write_text(job.model_dump_json())
    return folder / "job.json"


async def _cost(code: str, job: Path) -> Cost:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(job)), env=os.environ, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"a merge ended with {process.returncode}")
    peak, cpu = told.split()[-2:]
    return Cost(int(peak), float(cpu))

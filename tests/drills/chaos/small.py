"""A small run within one process, with everything that the checker looks at: real ledger, real children, real store.

Two evaluations; a queue that is purged; an attempt that is late, for another has taken its lease over; a child and an agent
that are killed; a report that is delivered twice. In code that is right all of it ends well.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import psutil
from sqlalchemy import text

import app.web.tasks
from app.artifacts import Artifacts
from app.containment import Contained
from app.database.engine import open_engine
from app.database.session import Database
from app.evaluations.submit import Submissions
from app.execution import Answer, Executor
from app.execution import Push as Delivery
from app.leases import Leases
from app.ledger import Enqueue, Ledger, SweepTimes
from app.queue import Queue
from app.runner.supervisor import Supervisor
from app.saved import Saved
from app.scratch import Scratch
from app.settings import Settings, load
from app.spec import Spec
from tests.drills.chaos import gather
from tests.drills.chaos.history import History, Push, Submission
from tests.drills.chaos.load import TASKS
from tests.drills.chaos.logs import Logs
from tests.faults.models import Models, Script

LEASE = 1.0
TURNS = 2
PATIENCE = 60.0
AGAIN = 0.1
"""Seconds before a push is repeated, and until the sweeper looks for what should be in the queue."""

TIRED = 30
"""Sweeps that found nothing while something has not ended: nothing will come any more."""


class Tasks:
    """Stands for Cloud Tasks, as far as it can be purged."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    async def create(self, task: Enqueue) -> None:
        self.waiting.append(task.execution_id)


@dataclass
class Small:
    """`late` never renews its leases; `worker` does."""

    database: Database
    tasks: Tasks
    models: Models
    late: Executor
    worker: Executor
    logs: Logs
    folder: Path
    pushes: list[Push] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)

    async def story(self) -> History:
        began = time.time()
        plain = await self.submit("plain", "p", 2, how="wait", flags=str(self.folder))
        agent = await self.submit("agent", "a", 1, model="openai-api/unknown/agent", turns=TURNS)
        self.tasks.waiting.clear()  # purged
        await self._deliver_all({f"{plain}.1": self._take_over, f"{agent}.1": self._kill_agent})
        for evaluation in (plain, agent):
            await self.push(self.worker, f"{evaluation}.report")
        await asyncio.sleep(AGAIN)
        return await self._history(began)

    async def submit(
        self, task: str, tag: str, n: int, model: str = "mockllm/model", turns: int | None = None, **args: Any
    ) -> str:
        arguments = {"tag": tag, "n": n, **args}
        model_args: dict[str, Any] = dict(self.models.model_args) if turns else {}
        spec = Spec(task=f"{TASKS}@{task}", model=model, model_args=model_args, task_args=arguments, checkpoint="off")
        submissions = Submissions(self.worker.ledger, self.worker.queue)
        evaluation = str((await submissions.submit(spec, "drill")).evaluation_id)
        self.submissions.append(Submission(evaluation, task, tag, n, time.time(), turns=turns))
        return evaluation

    async def push(self, executor: Executor, execution: str, **more: Any) -> Answer:
        began = time.time()
        answer = await executor.execute(Delivery(execution, **more))
        status = 200 if answer.kind == "terminal" else 409
        self.pushes.append(Push(execution, executor.settings.worker, began, time.time(), status))
        return answer

    async def _deliver_all(self, special: dict[str, Any]) -> None:
        """What is in the queue, until every evaluation has ended or nothing comes any more."""
        swept = 0
        while swept < TIRED and await self._open():
            while self.tasks.waiting:
                swept = 0
                execution = self.tasks.waiting.pop(0)
                deliver = special.pop(execution, None)
                answer = await (deliver(execution) if deliver else self.push(self.worker, execution))
                if answer.kind == "again":
                    self.tasks.waiting.append(execution)
                    await asyncio.sleep(AGAIN)
            await asyncio.sleep(AGAIN)
            await vars(app.web.tasks)["enqueue_due"](self.worker.ledger, self.worker.queue)
            swept += 1

    async def _open(self) -> bool:
        (row,) = await self.database.run(text("SELECT count(*) AS n FROM evaluations WHERE state = 'running'"))
        return bool(row.n)

    async def _take_over(self, execution: str) -> Answer:
        """The first attempt ends its work after a second one has begun."""
        first = asyncio.create_task(self.push(self.late, execution))
        claim_id = uuid4()
        async with asyncio.timeout(PATIENCE):
            while not len(self.late.leases):
                await asyncio.sleep(AGAIN)
            await asyncio.sleep(LEASE)
            while not ((claim := await self.worker.ledger.claim(execution, claim_id)) and claim.granted):
                await asyncio.sleep(AGAIN)
        (self.folder / "p").touch()
        await first
        await self._settled(execution)
        return await self.push(self.worker, execution, claim_id=claim_id)

    async def _settled(self, execution: str) -> None:
        """Returns when the late one has had its say, however long after its answer."""
        async with asyncio.timeout(PATIENCE):
            while len(self.late.leases):
                await asyncio.sleep(AGAIN)

    async def _kill_agent(self, execution: str) -> Answer:
        """Its child, in the middle of a turn."""
        pushed = asyncio.create_task(self.push(self.worker, execution))
        async with asyncio.timeout(PATIENCE):
            await self.models.arrival("a/1", 2)
        for process in psutil.Process().children(recursive=True):
            if execution in _output_of(process):
                process.kill()
        return await pushed

    async def _history(self, began: float) -> History:
        root = self.folder / "artifacts"
        url = self.worker.settings.database_url
        assert url
        rows = await gather.rows(url.get_secret_value())
        return History(
            root=f"file://{root}",
            began=began,
            faults_ended=time.time(),
            ended=time.time(),
            submissions=self.submissions,
            pushes=self.pushes,
            calls=gather.calls(self.models.requests),
            files=gather.files(root),
            logged=await gather.logged(self.logs, root, rows),
            **rows,
        )


def _output_of(process: psutil.Process) -> str:
    try:
        return str(Path(f"/proc/{process.pid}/fd/1").readlink())
    except OSError:
        return ""


@asynccontextmanager
async def open_small(database_url: str, folder: Path, supervisor: Supervisor, logs: Logs) -> AsyncIterator[Small]:
    settings = load(
        database_url=database_url,
        artifacts=f"file://{folder}/artifacts",
        scratch=folder / "scratch",
        lease=LEASE,
        renew_interval=LEASE / 4,
        statement_timeout=LEASE / 2,
        worker="worker",
        sweep_after=AGAIN,
        sweep_after_enqueue=AGAIN,
    )
    late = settings.model_copy(update={"renew_interval": PATIENCE, "worker": "late"})
    tasks = Tasks()
    async with (
        open_engine(settings) as engine,
        Scratch(settings.scratch) as scratch,
        Models(Script(TURNS)) as models,
        Contained(settings) as contained,
    ):
        database = Database(engine, settings)

        def executor(settings: Settings) -> Executor:
            sweep = SweepTimes(settings.sweep_after, settings.sweep_after_release, settings.sweep_after_enqueue)
            ledger = Ledger(database, lease=settings.lease, worker=settings.worker, sweep=sweep)
            return Executor(
                ledger=ledger,
                queue=cast(Queue, tasks),
                artifacts=(artifacts := Artifacts(settings.artifacts)),
                saved=Saved(artifacts),
                scratch=scratch,
                supervisor=supervisor,
                contained=contained,
                leases=Leases(ledger, settings),
                settings=settings,
            )

        yield Small(database, tasks, models, executor(late), executor(settings), logs, folder)

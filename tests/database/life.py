"""The life of one evaluation in the ledger, as whatever code is in PYTHONPATH lives it. Run by itself: the code of an earlier
revision, for which nothing of the tests' own is there.

Prints where that code lies, and how the evaluation ended. What is called here has been there since revision 0002.
"""

import asyncio
import sys
from pathlib import Path
from uuid import UUID, uuid4

import app
from app.database import preflight
from app.database.engine import open_engine
from app.database.migrate import newest_revision
from app.database.session import Database
from app.evaluations.read import Reader
from app.ledger import Claim, End, Enqueue, Held, Ledger, Settlement
from app.runner.messages import Failure, SampleRef, SampleResult, ScoreValue
from app.settings import load
from app.spec import Spec

SINCE = "0003"
"""Code of this revision is the first to accept newer tables that serve it."""


def scored(id: int) -> tuple[SampleResult, str]:
    result = SampleResult(sample=SampleRef(id=id, epoch=1), scores={"match": ScoreValue(value=1)}, log="a.eval")
    return result, "file:///logs/a.eval"


async def claim(ledger: Ledger, id: str) -> Claim:
    claim = await ledger.claim(id, uuid4(), {"x-cloudtasks-taskname": "t"})
    assert claim is not None
    assert claim.granted, claim
    return claim


async def live(database: Database, ledger: Ledger) -> str:
    evaluation = (await ledger.submit(Spec(task="t", model="m"), "me")).evaluation_id
    plan = await claim(ledger, f"{evaluation}.plan")
    runs = [[SampleRef(id=n, epoch=1)] for n in (1, 2, 3)]
    await ledger.settle(plan.execution_id, plan.attempt, Settlement("succeeded", runs=runs, versions={"a": "1"}))
    due = await ledger.take_due(10)
    await ledger.enqueued(due)
    assert sorted(due, key=lambda task: task.execution_id) == [Enqueue(f"{evaluation}.{n}", 1) for n in (1, 2, 3)]

    first = await claim(ledger, f"{evaluation}.1")
    assert await ledger.record(first.execution_id, first.attempt, [scored(1)])
    assert [r.lost for r in await ledger.renew([Held(first.execution_id, first.attempt, {"tokens": 5})])] == [False]
    await ledger.settle(first.execution_id, first.attempt, Settlement("interrupted"))
    for n in (1, 2):
        run = await claim(ledger, f"{evaluation}.{n}")
        await ledger.interrupted(run)
        await ledger.settle(run.execution_id, run.attempt, Settlement("succeeded", samples=[scored(n)]))
    failed = Settlement("failed", error=Failure(error_class="evaluation", message="It broke."))
    third = await claim(ledger, f"{evaluation}.3")
    await ledger.settle(third.execution_id, third.attempt, failed)
    await end(ledger, f"{evaluation}.report", "failed")

    assert await ledger.retry(evaluation) == ("failed", 1)
    third = await claim(ledger, f"{evaluation}.3")
    settled = await ledger.settle(third.execution_id, third.attempt, Settlement("succeeded", samples=[scored(3)]))
    assert settled is not None
    assert settled.report
    assert len((await ledger.to_report(evaluation)).transcripts) == 3
    await end(ledger, f"{evaluation}.report", "succeeded")
    await ledger.cancel(evaluation)
    return await seen(Reader(database), evaluation)


async def end(ledger: Ledger, report: str, state: str) -> None:
    reporting = await claim(ledger, report)
    how = End("succeeded" if state == "succeeded" else "failed", results={"scores": []}, log="file:///logs/all.eval")
    await ledger.settle(reporting.execution_id, reporting.attempt, Settlement("succeeded", end=how))


async def seen(reader: Reader, id: UUID) -> str:
    view = await reader.evaluation(id)
    assert view.samples.succeeded == 3
    assert len((await reader.samples(view.id)).samples) == 3
    assert len((await reader.execution(f"{id}.3")).attempts) == 2
    assert [found.id for found in (await reader.evaluations()).evaluations] == [view.id]
    return view.state


async def main(url: str) -> None:
    settings = load(database_url=url)
    async with open_engine(settings) as engine:
        database = Database(engine, settings)
        if newest_revision() >= SINCE:
            await preflight.look(database)
        state = await live(database, Ledger(database, lease=120, worker="w", revision="before"))
    print(Path(app.__file__).parent, state)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

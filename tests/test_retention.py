"""What is older than settings say is deleted, a little at a time; results never are, nor anything of what still runs."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from uuid import UUID

import pytest
from sqlalchemy import text

from app.artifacts import Artifacts
from app.database.session import Database
from app.errors import Conflict
from app.evaluations.read import Reader
from app.evaluations.submit import Submissions
from app.ledger import Ledger
from app.queue import open_queue
from app.retention import Retention, Swept
from app.saved import Saved
from app.settings import Settings, load
from tests.ledger import rows
from tests.ledger.factories import claim, end_days_ago, ended, planned, report, run_out, settle, submitted
from tests.test_saved import NoMarksDeleted

LEASE_OVER = text(
    "UPDATE evaluations SET retention_lease = now() - interval '1 s' WHERE transcripts_deleted_at IS NULL"
)
TRANSCRIPTS = [".1/1/a.eval", ".1/2/a.eval"]
LOGS = [".plan/1/plan.header", ".report/1/all.eval", ".1/2/outcome.json", *TRANSCRIPTS]
CHECKPOINTS = [".1/1/checkpoint/a.eval.part", ".1/1/checkpoint/a/ckpt-00001.json", ".1/1/checkpoint.json"]


@pytest.fixture
def artifacts(settings: Settings) -> Artifacts:
    return Artifacts(settings.artifacts)


@pytest.fixture
def retention(ledger: Ledger, artifacts: Artifacts) -> Retention:
    return Retention(ledger, artifacts, Saved(artifacts), keep_transcripts=90, keep_checkpoints=7)


async def filled(artifacts: Artifacts, evaluation: UUID) -> UUID:
    """With files as attempts leave them."""
    for name in LOGS + CHECKPOINTS:
        store = artifacts.transcripts if name in TRANSCRIPTS else artifacts
        await artifacts.write(store.url(str(evaluation), f"{evaluation}{name}"), b"x")
    return evaluation


async def kept(artifacts: Artifacts, evaluation: UUID) -> list[str]:
    folders = [store.url(str(evaluation)) for store in (artifacts, artifacts.transcripts)]
    names = [name for folder in folders for name in await artifacts.names(folder)]
    return sorted(name.removeprefix(str(evaluation)) for name in names)


async def old(database: Database, ledger: Ledger, artifacts: Artifacts, days: float) -> UUID:
    """Over for so long, with its files."""
    evaluation = await filled(artifacts, await ended(ledger, "succeeded", "failed"))
    await end_days_ago(database, evaluation, days)
    return evaluation


async def test_transcripts_go_by_age_and_results_stay(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention
) -> None:
    aged, young = [await old(database, ledger, artifacts, days) for days in (91, 89)]
    before = await rows.results(database, aged)
    assert await retention.sweep() == Swept(transcripts=1, checkpoints=1)
    assert await kept(artifacts, aged) == []
    assert await kept(artifacts, young) == sorted(LOGS)
    assert await rows.results(database, aged) == before
    assert await retention.sweep() == Swept(0, 0)

    reader = Reader(database)
    gone, there = await reader.evaluation(aged), await reader.evaluation(young)
    assert gone.transcripts_deleted_at
    assert there.transcripts_deleted_at is None
    assert gone.results == there.results == {"accuracy": 1}
    assert gone.log is None
    shown = [(await reader.samples(id)).samples[0] for id in (aged, young)]
    assert [(s.state, s.scores["match"]["value"], s.transcript is None) for s in shown] == [
        ("succeeded", 1, True),
        ("succeeded", 1, False),
    ]


async def test_checkpoints_that_were_left_behind_go_by_age_and_logs_stay(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention
) -> None:
    aged, young = [await old(database, ledger, artifacts, days) for days in (8, 6)]
    assert await retention.sweep() == Swept(transcripts=0, checkpoints=1)
    assert await kept(artifacts, aged) == sorted(LOGS)
    assert await kept(artifacts, young) == sorted(LOGS + CHECKPOINTS)

    # a retry may leave some behind once more
    await ledger.retry(aged)
    await filled(artifacts, aged)
    await settle(ledger, await claim(ledger, f"{aged}.2"))
    await report(ledger, aged)
    assert await retention.sweep() == Swept(0, 0)
    await end_days_ago(database, aged, 8)
    assert await retention.sweep() == Swept(0, 1)
    assert await kept(artifacts, aged) == sorted(LOGS)


async def test_what_runs_loses_nothing_however_old_it_is(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention
) -> None:
    running = [await submitted(ledger), await planned(ledger), await old(database, ledger, artifacts, 60)]
    await ledger.retry(running[-1])
    for evaluation in running:
        await filled(artifacts, evaluation)
    await database.run(text("UPDATE evaluations SET created_at = now() - interval '1000 days'"))
    assert await retention.sweep() == Swept(0, 0)
    for evaluation in running:
        assert await kept(artifacts, evaluation) == sorted(LOGS + CHECKPOINTS)


async def test_never_means_never(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention
) -> None:
    aged = await old(database, ledger, artifacts, 10_000)
    for_ever = load(database_url="postgresql://u:p@h/d", keep_transcripts="never", keep_checkpoints="never")
    assert (for_ever.keep_transcripts, for_ever.keep_checkpoints) == (None, None)
    assert await replace(retention, keep_transcripts=None, keep_checkpoints=None).sweep() == Swept(0, 0)
    assert await kept(artifacts, aged) == sorted(LOGS + CHECKPOINTS)


async def test_without_its_transcripts_an_evaluation_is_not_retried(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention, submissions: Submissions
) -> None:
    """Its report could not be put together any more. So from the moment that deleting begins."""
    aged = await old(database, ledger, artifacts, 91)
    await ledger.expire("transcripts", days=90)
    everything = await rows.everything(database)
    with pytest.raises(Conflict, match="submit its spec anew"):
        await submissions.retry(aged)
    reader = Reader(database)
    explained = (await reader.explanation(aged)).explanation + (await reader.execution(f"{aged}.2")).explanation
    assert "cannot be retried" in " ".join(explained)
    assert "proctor retry" not in " ".join(explained)
    assert await rows.everything(database) == everything


async def test_while_checkpoints_are_being_deleted_a_retry_has_to_wait(
    ledger: Ledger, database: Database, artifacts: Artifacts, submissions: Submissions
) -> None:
    aged = await old(database, ledger, artifacts, 8)
    (taken,) = await ledger.expire("checkpoints", days=7)
    with pytest.raises(Conflict, match="try again in a minute"):
        await submissions.retry(aged)
    await ledger.expired("checkpoints", taken, done=True)
    assert await submissions.retry(aged) == 1


@pytest.fixture
async def submissions(ledger: Ledger, settings: Settings) -> AsyncIterator[Submissions]:
    """With a queue that nobody listens to: the sweeper makes up for it."""
    nobody = settings.model_copy(update={"queue_endpoint": "127.0.0.1:9", "queue_patience": 0.1})
    async with open_queue(nobody) as queue:
        yield Submissions(ledger, queue)


async def test_many_sweeps_at_once_share_the_work(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention
) -> None:
    aged = [await old(database, ledger, artifacts, 91) for _ in range(25)]
    swept = await asyncio.gather(*(retention.sweep(seconds=60) for _ in range(4)))
    assert sum(one.transcripts for one in swept) == 25
    assert [name for evaluation in aged for name in await kept(artifacts, evaluation)] == []


async def test_a_sweep_that_died_is_made_up_for_once_its_lease_is_over(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention
) -> None:
    aged = await old(database, ledger, artifacts, 91)
    (died,) = await ledger.expire("transcripts", days=90)
    assert await retention.sweep() == Swept(0, 0), "it is another's"
    await database.run(LEASE_OVER)
    assert await retention.sweep() == Swept(1, 0)
    await ledger.expired("transcripts", died, done=False)  # it was only slow
    row = await rows.evaluation(database, aged)
    assert row.transcripts_deleted_at
    assert row.checkpoints_deleted_at


class Stubborn(Artifacts):
    """Lets a number of deletions through, then refuses, as a bucket without the right to."""

    left = 0

    async def delete(self, urls: Iterable[str]) -> None:
        if self.left <= 0:
            raise PermissionError("403")
        self.left -= 1
        await super().delete(urls)


@pytest.mark.parametrize("deletions", [0, 3])
async def test_what_could_not_be_deleted_whole_keeps_nobody_up_and_is_gone_on_with(
    ledger: Ledger, database: Database, settings: Settings, artifacts: Artifacts, retention: Retention, deletions: int
) -> None:
    aged = await old(database, ledger, artifacts, 91)
    stubborn = Stubborn(settings.artifacts)
    stubborn.left = deletions
    assert await replace(retention, artifacts=stubborn, keep_checkpoints=None).sweep() == Swept(0, 0)
    assert len(await kept(artifacts, aged)) == len(LOGS + CHECKPOINTS) - deletions
    assert (await rows.evaluation(database, aged)).transcripts_deleted_at is None
    other = await old(database, ledger, artifacts, 90.5)
    assert await retention.sweep() == Swept(1, 0), "others go first"
    assert await kept(artifacts, other) == []
    await database.run(LEASE_OVER)
    assert await retention.sweep() == Swept(1, 0)
    assert await kept(artifacts, aged) == []


async def test_what_says_that_a_checkpoint_is_whole_goes_before_it(
    ledger: Ledger, database: Database, settings: Settings, artifacts: Artifacts, retention: Retention
) -> None:
    """Or an attempt after a retry would resume from half of one, should the sweep die in between."""
    aged = await old(database, ledger, artifacts, 8)
    assert await replace(retention, artifacts=NoMarksDeleted(settings.artifacts)).sweep() == Swept(0, 0)
    assert await kept(artifacts, aged) == sorted(LOGS + CHECKPOINTS)


async def test_a_sweep_ends_when_its_time_is_over(
    ledger: Ledger, database: Database, artifacts: Artifacts, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of an evaluation, if need be: here after each two of its files."""
    aged = await old(database, ledger, artifacts, 91)
    files = len(LOGS + CHECKPOINTS)
    monkeypatch.setattr("app.retention.FILES", 2)
    monkeypatch.setattr("app.retention.time", SimpleNamespace(monotonic=count().__next__))  # a second at each look
    sweeps = 0
    while await kept(artifacts, aged):
        sweeps += 1
        await retention.sweep(seconds=2.5)
        assert len(await kept(artifacts, aged)) == files - 2 * sweeps
        assert ((await rows.evaluation(database, aged)).transcripts_deleted_at is None) == (sweeps < 4)
    assert sweeps == 4


async def test_an_empty_folder_is_no_reason_to_come_again(
    ledger: Ledger, database: Database, retention: Retention
) -> None:
    evaluation = await planned(ledger)
    await run_out(ledger, evaluation, "failed")
    await report(ledger, evaluation)
    await end_days_ago(database, evaluation, 91)
    assert await retention.sweep() == Swept(1, 0)
    assert await retention.sweep() == Swept(0, 0)

"""By which versions each attempt was made, and so each sample."""

from app.database.session import Database
from app.ledger import End, Ledger, Settlement
from tests.ledger import rows
from tests.ledger.factories import claim, errored, let_expire, planned, report, scored, settle

OLD, NEW = {"inspect_ai": "1"}, {"inspect_ai": "2"}


async def test_an_attempt_that_is_lost_leaves_word_of_its_versions_with_its_first_sample(
    ledger: Ledger, database: Database
) -> None:
    run = f"{await planned(ledger, samples=2)}.1"
    first = await claim(ledger, run)
    await ledger.record(run, first.attempt, [scored(1)], OLD)
    await ledger.record(run, first.attempt, [])  # a checkpoint
    await let_expire(database, run)
    await settle(ledger, await claim(ledger, run), samples=[scored(1001)], versions=NEW)
    assert [row.versions for row in await rows.attempts(database, run)] == [OLD, NEW]


async def test_a_sample_counts_for_the_attempt_that_its_result_is_of(ledger: Ledger, database: Database) -> None:
    evaluation = await planned(ledger, 3)
    for n, versions in enumerate((OLD, NEW), 1):
        await settle(ledger, await claim(ledger, f"{evaluation}.{n}"), samples=[scored(n)], versions=versions)
    third = f"{evaluation}.3"
    await settle(ledger, await claim(ledger, third), "failed", max_failures=2, samples=[errored(3)], versions=OLD)
    assert sorted(await ledger.versions(evaluation), key=str) == [((OLD,), 2), ((NEW,), 1)]
    await settle(ledger, await claim(ledger, third), samples=[scored(3)], versions=NEW)
    assert sorted(await ledger.versions(evaluation), key=str) == [((OLD,), 1), ((NEW,), 2)]


async def test_a_sample_counts_for_the_attempts_too_whose_state_its_own_went_on_from(ledger: Ledger) -> None:
    evaluation = await planned(ledger, samples=2)
    run = await claim(ledger, f"{evaluation}.1")
    await ledger.record(run.execution_id, run.attempt, [scored(1)], NEW, [OLD])
    assert await ledger.versions(evaluation) == [((NEW, OLD), 1)]
    await settle(ledger, run, samples=[scored(1), scored(1001)], versions=NEW, earlier_versions=[OLD])
    assert await ledger.versions(evaluation) == [((NEW, OLD), 2)]


async def test_what_the_report_found_mixed_stays_with_its_results_until_the_next(
    ledger: Ledger, database: Database
) -> None:
    evaluation = await planned(ledger)
    await settle(ledger, await claim(ledger, f"{evaluation}.1"), "failed")
    found = [{"name": "inspect_ai", "samples": {"1": 1, "2": 2}, "flagged": True}]
    await report(ledger, evaluation, End("failed", mixed_versions=found))
    assert (await rows.evaluation(database, evaluation)).mixed_versions == found
    await ledger.retry(evaluation)
    assert (await rows.evaluation(database, evaluation)).mixed_versions == found
    await settle(ledger, await claim(ledger, f"{evaluation}.1"))
    await report(ledger, evaluation, End("succeeded", {"accuracy": 1}))
    assert (await rows.evaluation(database, evaluation)).mixed_versions is None


async def test_a_stale_attempt_says_nothing_of_versions(ledger: Ledger, database: Database) -> None:
    run = f"{await planned(ledger)}.1"
    stale = await claim(ledger, run)
    await let_expire(database, run)
    await claim(ledger, run)
    before = await rows.everything(database)
    assert not await ledger.record(run, stale.attempt, [scored(1)], OLD)
    assert (await ledger.settle(run, stale.attempt, Settlement("succeeded", versions=OLD))) is not None
    assert await rows.everything(database) == before

"""No evaluation is stranded, wherever its worker is killed: some places of the drill, and that the drill would tell."""

import random
from collections.abc import AsyncIterator

import pytest

from tests.conftest import own_database
from tests.drills.instance import UPKEEP, Place, name_of
from tests.drills.stranded import BY_TIME, Drill, End, open_drill, places, report, told

KILLS = 2


@pytest.fixture(scope="module")
async def drill(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Drill]:
    async with own_database(postgres) as url, open_drill(tmp_path_factory.mktemp("drill"), url) as drill:
        yield drill


async def test_an_evaluation_ends_wherever_its_worker_is_killed(drill: Drill) -> None:
    # twice: what only a worker's first evaluation asks, or a slow moment, is no place to wait for
    counted = await drill.count(rehearsals=0) & await drill.count(rehearsals=0)
    seed = random.randrange(10**6)
    ours = [place for place in places(counted) if place.message not in BY_TIME]
    print(f"seed {seed}: {told(counted, KILLS)}")
    for place in random.Random(seed).sample(ours, KILLS):
        end = await drill.kill_at(place)
        assert not end.wrong, end
        assert end.seconds is not None, end


async def test_without_the_sweeper_a_worker_killed_after_the_submission_strands_its_evaluation(drill: Drill) -> None:
    """So the drill does see it; and that a client asks again does not make up for it."""
    drill.sweeping, drill.patience = False, 6
    end = await drill.kill_at(Place("ledger.submit", 1, "after"))
    assert end.seconds is not None, "it was killed"
    assert end.wrong == "stranded: plan pending after 0 attempts"


def test_each_message_is_a_place_twice() -> None:
    counted = {"ledger.submit": 1, "queue.CreateTask": 2}
    assert told(counted, 6) == "3 messages, 1 to the database and 2 to the queue; 6 kills"
    assert places(counted) == [
        Place("ledger.submit", 1, "before"),
        Place("ledger.submit", 1, "after"),
        Place("queue.CreateTask", 1, "before"),
        Place("queue.CreateTask", 1, "after"),
        Place("queue.CreateTask", 2, "before"),
        Place("queue.CreateTask", 2, "after"),
    ]


def test_statements_are_told_by_their_name_or_by_what_they_read() -> None:
    assert name_of("/* ledger.claim */ \nWITH target AS (SELECT 1)") == "ledger.claim"
    assert name_of("SELECT evaluations.id \nFROM evaluations \nWHERE evaluations.id = $1::UUID") == "read evaluations"
    assert name_of(";") == name_of("SET transaction_timeout = 1350") == UPKEEP


def test_the_report_tells_what_went_wrong_and_what_was_never_met() -> None:
    submit, claim, ping = (Place(name, 1, "before") for name in ("ledger.submit", "ledger.claim", UPKEEP))
    counted = {"ledger.submit": 1, "ledger.claim": 1, UPKEEP: 1}
    well = report(counted, [End(submit, "", 0, 2.5), End(claim, "", 1, 3.5), End(ping, "", 0, None)], 3, 7)
    assert well.met
    assert [(row["message"], row["kills"], row["not met"]) for row in well.rows] == [
        ("ledger.submit", 1, 0),
        ("ledger.claim", 1, 0),
        (UPKEEP, 0, 1),
        ("all (seed 7)", 2, 1),
    ]
    assert (well.rows[-1]["p50 s to the end"], well.rows[-1]["samples that ran again"]) == (2.5, 1)
    wrong = report(counted, [End(submit, "stranded: plan pending after 0 attempts", 0, 60.0)], 3, 7)
    assert [goal.met for goal in wrong.goals] == [False, False, True]
    assert wrong.goals[0].measured == "before ledger.submit 1: stranded: plan pending after 0 attempts"
    assert not report(counted, [End(claim, "", 0, None)], 1, 7).met

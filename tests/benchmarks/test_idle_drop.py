"""The benchmark itself: the bug is there before the fix and gone with Proctor, and its figures are what they say."""

import json
import math
from xml.etree import ElementTree

import pytest

from tests.benchmarks import chart, idle_drop
from tests.benchmarks.arrivals import AT_ONCE, LONGEST, SHORTEST, plan, renumbered
from tests.benchmarks.gauges import Gauge, percentile, upper_bound
from tests.report import Report, Value, as_json


async def test_the_bug_is_there_before_the_fix_and_gone_with_proctor() -> None:
    report = await idle_drop.measure(quick=True)
    assert [goal.name for goal in report.goals if not goal.met] == []
    before, fixed, ours = report.rows
    assert (before["row"], fixed["row"], ours["row"]) == ("before the fix", "the story's fix", "Proctor")
    assert float(before["failed %"] or 0) > 5
    assert (ours["failed %"], ours["lost"], ours["recorded twice"]) == (0, 0, 0)
    assert set(json.loads(as_json(report))) == {"name", "machine", "rows", "goals"}
    ElementTree.fromstring(chart.draw(report))


def test_every_row_sees_the_same_evaluations() -> None:
    few, many = plan(1, 60, 3), plan(1, 600, 3)
    times = [[(batch.pause, [(a.at, a.lasts) for a in batch.arrivals]) for batch in mine] for mine in many]
    for mine, theirs in zip(few, times, strict=True):
        for batch, (pause, arrivals) in zip(mine, theirs, strict=False):
            assert batch.pause == pause
            assert [(a.at, a.lasts) for a in batch.arrivals] == arrivals[: len(batch.arrivals)]
    every = [a for mine in many for batch in mine for a in batch.arrivals]
    assert sorted(a.number for a in every) == list(range(1, 601))
    assert all(SHORTEST <= a.lasts <= LONGEST for a in every)
    assert max(len(batch.arrivals) for mine in many for batch in mine) <= AT_ONCE
    numbers = [a.number for mine in renumbered(many[1:]) for batch in mine for a in batch.arrivals]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("failures", "n", "bound"),
    [
        (0, 30_000, 1 - 0.05 ** (1 / 30_000)),  # "the rule of three" in its exact form
        (0, 1, 0.95),
        (1, 10, 0.394163),  # Clopper and Pearson's, from tables
        (5, 5, 1.0),
    ],
)
def test_the_bound_is_that_of_clopper_and_pearson(failures: int, n: int, bound: float) -> None:
    assert upper_bound(failures, n) == pytest.approx(bound, rel=1e-4)


def test_percentiles_are_nearest_ranks() -> None:
    assert [percentile([3, 1, 2, 4], share) for share in (0.25, 0.5, 0.99)] == [1, 2, 4]
    assert math.isnan(percentile([], 0.5))


def test_parts_of_a_row_add_up() -> None:
    both = Gauge(evaluations=3, failed={1, 3}, calls=[1], seconds=2) + Gauge(
        evaluations=2, failed={1}, lost=1, seconds=5
    )
    assert (both.evaluations, len(both.failed), both.lost, both.seconds) == (5, 3, 1, 5)


def test_a_row_without_failures_says_so_in_the_chart() -> None:
    row: dict[str, Value] = {"idle connections end by": "FIN", "row": "Proctor", "evaluations": 10_020, "failed %": 0.0}
    texts = [text.text for text in ElementTree.fromstring(chart.draw(Report("idle_drop", [row]))).iter() if text.text]
    assert "0 of 10,020" in texts

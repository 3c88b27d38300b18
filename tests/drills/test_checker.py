"""The drill's checker: what it has nothing to say about, and what it finds. Runs are real, and so are the bugs planted."""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app.runner.supervisor import Supervisor
from tests.conftest import own_database
from tests.drills.chaos.checker import check
from tests.drills.chaos.figures import report
from tests.drills.chaos.history import Fault, File, History, Push, Result, load
from tests.drills.chaos.logs import Logs, open_logs
from tests.drills.chaos.plants import PLANTS
from tests.drills.chaos.small import open_small
from tests.drills.chaos.violation import Rule, Violation

T = TypeVar("T")

FOUND = {
    "no-fence": "stale",
    "early-2xx": "acknowledged early",
    "no-outbox": "lost",
    "double-report": "doubled",
    "stale-artifact": "artifact",
}


@pytest.fixture(scope="module")
async def supervisor() -> AsyncIterator[Supervisor]:
    async with Supervisor(os.environ) as supervisor:
        await supervisor.warm()
        yield supervisor


@pytest.fixture(scope="module")
async def logs() -> AsyncIterator[Logs]:
    async with open_logs() as logs:
        yield logs


@pytest.fixture(scope="module")
async def clean(
    postgres: str, supervisor: Supervisor, logs: Logs, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[History]:
    folder = tmp_path_factory.mktemp("clean")
    async with own_database(postgres) as url, open_small(url, folder, supervisor, logs) as small:
        yield await small.story()


def rules(history: History) -> set[str]:
    return {violation.rule for violation in check(history)}


async def test_code_that_is_right_leaves_nothing_to_say(clean: History, tmp_path: Path) -> None:
    assert check(clean) == []
    outcomes = sorted(str(attempt.outcome) for attempt in clean.attempts)
    assert outcomes == ["interrupted"] * 2 + ["succeeded"] * 7, "two were lost: the story is told"
    clean.save(tmp_path / "history.json")
    kept = load(tmp_path / "history.json")
    assert (kept.results, kept.attempts, kept.logged) == (clean.results, clean.attempts, clean.logged)


@pytest.mark.parametrize("name", PLANTS)
async def test_a_planted_bug_is_found(
    name: str,
    database_url: str,
    tmp_path: Path,
    supervisor: Supervisor,
    logs: Logs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    PLANTS[name](monkeypatch.setattr)
    async with open_small(database_url, tmp_path, supervisor, logs) as small:
        history = await small.story()
    assert FOUND[name] in rules(history), check(history)


# What the five do not show: each rule by itself, in a history that was made wrong --------------------------------------

Wrong = Callable[[History], History]


def but(field: str, change: Callable[[Any], bool], **to: Any) -> Wrong:
    """The history with other values in the first of a field's items that fits."""

    def wrong(history: History) -> History:
        items: list[Any] = list(getattr(history, field))
        place = next(place for place, item in enumerate(items) if change(item))
        items[place] = replace(items[place], **{k: v(items[place]) if callable(v) else v for k, v in to.items()})
        return changed(history, field, items)

    return wrong


def changed(history: History, field: str, items: Any) -> History:
    fields: dict[str, Any] = {field: items}
    return replace(history, **fields)


def without(field: str, which: Callable[[Any], bool]) -> Wrong:
    return lambda h: changed(h, field, [item for item in getattr(h, field) if not which(item)])


def twice(field: str, which: Callable[[Any], bool], **to: Any) -> Wrong:
    def wrong(history: History) -> History:
        items: Sequence[Any] = getattr(history, field)
        again = replace(next(item for item in items if which(item)), **to)
        return changed(history, field, [*items, again])

    return wrong


def anyone(_: object) -> bool:
    return True


def ends(suffix: str) -> Callable[[Any], bool]:
    """By the execution, or the execution's id."""
    return lambda item: str(getattr(item, "execution", None) or item.id).endswith(suffix)


def is_agents(call: Any) -> bool:
    return bool(call.conversation == "a/1" and call.kind == "agent")


def results_with(**to: Any) -> Callable[[Any], Any]:
    return lambda evaluation: evaluation.results | to


def of_attempt_one(result: Result) -> str:
    return result.transcript.replace(f"/{result.attempt}/", "/1/")


def mean_of(value: float) -> Callable[[Any], Any]:
    def results(evaluation: Any) -> Any:
        (score,) = evaluation.results["scores"]
        metrics = score["metrics"] | {"mean": score["metrics"]["mean"] | {"value": value}}
        return evaluation.results | {"scores": [score | {"metrics": metrics}]}

    return results


MISTAKES: dict[str, tuple[str, Wrong]] = {
    "an evaluation is not there": ("lost", without("evaluations", anyone)),
    "an evaluation never ends": ("lost", but("evaluations", anyone, state="running", finished_at=None)),
    "an execution never ends": ("lost", but("executions", ends(".1"), state="running", finished_at=None)),
    "a result is not there": ("lost", without("results", ends(".2"))),
    "a sample was never planned": ("lost", without("executions", ends(".2"))),
    "a result is there twice": ("doubled", twice("results", anyone)),
    "an execution repeats another's sample": ("doubled", but("executions", ends(".2"), samples=(("1", 1),))),
    "an evaluation was made twice": ("doubled", without("submissions", anyone)),
    "an attempt succeeded after another had": ("doubled", but("attempts", ends(".1"), outcome="succeeded")),
    "an evaluation failed": ("failed", but("evaluations", anyone, state="failed")),
    "an evaluation was cancelled by nobody": ("failed", but("evaluations", anyone, cancel_requested_at=1.0)),
    "a worker died": ("failed", lambda h: replace(h, died=["worker-0.1"])),
    "an attempt has no row": ("held twice", without("attempts", ends(".2"))),
    "two attempts overlap": ("held twice", but("attempts", ends(".1"), ended_at=lambda a: a.ended_at + 60)),
    "an attempt was left open": ("held twice", but("attempts", ends(".2"), ended_at=None, outcome=None)),
    "a push was acknowledged too early": ("acknowledged early", but("pushes", ends(".1"), status=200)),
    "nothing was acknowledged": (
        "acknowledged early",
        lambda h: replace(h, pushes=[*h.pushes, Push("nobody.1", "worker", 1.0, 2.0, 204)]),
    ),
    "a result was recorded before its attempt": ("stale", but("results", ends(".2"), recorded_at=1.0)),
    "a result was recorded after its attempt": (
        "stale",
        but("results", ends(".2"), recorded_at=lambda r: r.recorded_at + 60),
    ),
    "a result was recorded by an earlier attempt": (
        "stale",
        but("results", lambda r: r.attempt == 2, attempt=1, transcript=of_attempt_one),
    ),
    "a transcript is an earlier attempt's": (
        "artifact",
        but("results", lambda r: r.attempt == 2 and "/2/" in r.transcript, transcript=of_attempt_one),
    ),
    "a transcript is another execution's": (
        "artifact",
        but("results", ends(".2"), transcript=lambda r: r.transcript.replace(".2/", ".1/")),
    ),
    "a log is not there": ("artifact", without("logged", anyone)),
    "a log says another score": ("artifact", but("logged", lambda x: "plan" not in x.execution, scores={"known": 9.0})),
    "a log was written by another attempt": ("artifact", but("logged", lambda x: "plan" not in x.execution, attempt=9)),
    "a merged log lacks a sample": ("artifact", without("logged", lambda x: "plan" in x.execution and x.sample == "2")),
    "a merged log is not there": ("artifact", but("evaluations", anyone, log="file:///nowhere.eval")),
    "a score is wrong": ("wrong", but("results", anyone, scores={"known": {"value": 9.0}})),
    "a sample errored": ("wrong", but("results", anyone, error={"message": "it broke"})),
    "the mean is wrong": ("counts", but("evaluations", anyone, results=mean_of(0.9))),
    "the total is wrong": ("counts", but("evaluations", anyone, results=results_with(total_samples=1))),
    "too few are complete": ("counts", but("evaluations", anyone, results=results_with(completed_samples=1))),
    "the tokens are wrong": ("counts", but("evaluations", anyone, usage={})),
    "an evaluation has no results": ("counts", but("evaluations", anyone, results=None)),
    "a report came before the end": ("counts", but("attempts", ends(".report"), started_at=1.0)),
    "a turn was paid for too often": (
        "spent",
        lambda h: replace(h, calls=[*h.calls, *[c for c in h.calls if is_agents(c) and c.turns == 0]]),
    ),
    "more was paid again than was lost": (
        "spent",
        lambda h: but("submissions", lambda s: s.turns, saved=True)(
            replace(h, calls=[*h.calls, *[c for c in h.calls if is_agents(c)] * 2])
        ),
    ),
    "a sample's usage is not that of its turns": (
        "counts",
        but("results", lambda r: "agent" in r.transcript, usage={}),
    ),
    "an attempt spent long after the end": ("spent", but("calls", is_agents, at=lambda c: c.at + 1_000)),
    "a score came from nowhere": ("spent", without("calls", is_agents)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_history_that_is_wrong_is_found_out(mistake: str, clean: History) -> None:
    rule, wrong = MISTAKES[mistake]
    assert rule in rules(wrong(clean)), check(wrong(clean))


async def test_a_checkpoint_is_left_behind_only_by_who_could_not_delete_it(clean: History) -> None:
    evaluation = clean.evaluations[0]
    report = next(a for a in clean.attempts if a.execution == f"{evaluation.id}.report")
    ended = evaluation.finished_at or 0

    def left(*faults: Fault, modified: float) -> set[str]:
        file = File(f"{evaluation.id}/{evaluation.id}.1/1/checkpoint/logs/x.json", modified)
        return rules(replace(clean, files=[*clean.files, file], faults=faults))

    before, after = report.started_at - 1, ended + 1
    assert left(modified=before) == {"left behind"}
    assert left(modified=after) == set(), "by an attempt that did not know yet"
    assert left(Fault("store failing", ended, after), modified=before) == set()
    assert left(Fault("store failing", before - 1, before), modified=before) == {"left behind"}
    assert left(Fault("worker killed", ended, ended, report.worker), modified=before) == {"left behind"}


async def test_what_was_lost_three_times_may_fail(clean: History) -> None:
    error = {"error_class": "infrastructure", "message": "Its worker was lost 3 times without progress."}
    given_up = but("executions", ends(".2"), state="failed", error=error)(clean)
    failed = but("evaluations", anyone, state="failed", results=None)(given_up)
    assert "failed" in rules(but("evaluations", anyone, state="failed")(clean))
    assert "failed" not in rules(failed)
    assert "failed" in rules(given_up), "then it must"


async def test_the_figures_tell_what_a_kill_has_cost(clean: History) -> None:
    killed = next(a for a in clean.attempts if "SIGKILL" in str(a.error))
    again = next(a for a in clean.attempts if (a.execution, a.attempt) == (killed.execution, killed.attempt + 1))
    at = (killed.ended_at or 0) - 0.1
    fault = Fault("child killed", at, at, held=((killed.execution, killed.attempt),))
    attempts = [replace(a, due_at=a.started_at - 0.25) if a is again else a for a in clean.attempts]
    rows = {row["fault"]: row for row in report(replace(clean, faults=[fault], attempts=attempts), []).rows}
    asked_again = [c for c in clean.calls if is_agents(c) and c.at < again.started_at and c.answered is not None]
    assert rows["child killed"] == {
        "fault": "child killed",
        "times": 1,
        "attempts lost": 1,
        "resumed after p50 s": pytest.approx(again.started_at - at),
        "resumed after max s": pytest.approx(again.started_at - at),
        "of it due p50 s": pytest.approx(0.25),
        "of them agents": 1,
        "tokens wasted each": sum(c.tokens for c in asked_again),
    }
    assert asked_again
    assert (rows["all"]["attempts lost"], rows["none of these"]["attempts lost"]) == (2, 1)


async def test_a_violation_fails_the_goal_that_it_belongs_to(clean: History) -> None:
    assert report(clean, []).met
    rules: tuple[Rule, ...] = ("lost", "held twice", "failed", "stale")
    for place, rule in enumerate(rules):
        goals = report(clean, [Violation(rule, "e.1", "because")]).goals
        assert [goal.met for goal in goals] == [n != place for n in range(5)]


async def test_a_drill_whose_client_stood_still_is_none(clean: History) -> None:
    """Its last faults met no work."""
    last = max(submission.submitted for submission in clean.submissions)
    goals = {goal.name: goal for goal in report(replace(clean, began=last, faults_ended=last + 600), []).goals}
    assert not goals["longest time without a submission, s"].met
    assert sum(not goal.met for goal in goals.values()) == 1

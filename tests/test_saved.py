"""What an attempt leaves for the next: whole checkpoints, outcomes, and nothing once it is over."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.artifacts import Artifacts
from app.ledger import End, Settlement, _settle_parameters
from app.outcomes import Heard
from app.runner.messages import ENDED, LOGS, Failure, Job, SampleRef, SampleResult, ScoreValue
from app.saved import CHECKPOINT, COMMITTED, OUTCOME, Saved, Shipping
from app.spec import Spec

SAMPLE = SampleRef(id="a", epoch=1)
LOG = "2026-01-01_task_x.eval"
OUTCOMES = {
    "a run": Settlement(
        "succeeded",
        samples=[(SampleResult(sample=SAMPLE, scores={"s": ScoreValue(value=1.0)}, log=LOG), "file:///a.eval")],
        versions={"inspect_ai": "2"},
        earlier_versions=[{"inspect_ai": "1"}],
    ),
    "a failure": Settlement("failed", error=Failure(error_class="model", message="refused"), max_failures=2),
    "a plan": Settlement("succeeded", runs=[[SAMPLE], [SampleRef(id=7, epoch=2)]], runs_due=1.5),
    "a report": Settlement(
        "succeeded", end=End("succeeded", {"scores": [1, None]}, {"m": {"total_tokens": 5}}, log="l")
    ),
}


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(f"file://{tmp_path}/store")


@pytest.fixture
def saved(artifacts: Artifacts) -> Saved:
    return Saved(artifacts)


def job(tmp_path: Path, attempt: int, kind: str = "run") -> Job:
    folder = tmp_path / "scratch" / str(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    spec = Spec(task="t", model="m")
    return Job.model_validate(
        {"kind": kind, "evaluation_id": "e", "execution_id": "e.1", "attempt": attempt, "spec": spec}
        | {"directory": str(folder)}
    )


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


class Progress:
    """Counts how often the ledger is told."""

    def __init__(self) -> None:
        self.times = 0

    async def __call__(self) -> None:
        self.times += 1


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
async def test_an_outcome_comes_back_as_it_was(saved: Saved, tmp_path: Path, outcome: Settlement) -> None:
    await saved.keep(job(tmp_path, 1), outcome)
    left = await saved.left_by(job(tmp_path, 2), [1])
    assert left.outcome
    assert left.outcome_of == 1
    assert _settle_parameters("e.1", 2, left.outcome) == _settle_parameters("e.1", 2, outcome), "for the ledger"
    assert (await saved.left_by(job(tmp_path, 2), [])).outcome is None, "it was recorded: nobody asks"


async def test_what_cost_the_other_attempt_is_not_counted_again(saved: Saved, tmp_path: Path) -> None:
    await saved.keep(job(tmp_path, 1), Settlement("succeeded", usage={"tokens": 9}, cost=0.5))
    outcome = (await saved.left_by(job(tmp_path, 2), [1])).outcome
    assert outcome
    assert (outcome.usage, outcome.cost) == (None, None)


async def test_an_outcome_that_cannot_be_read_is_none(
    saved: Saved, artifacts: Artifacts, tmp_path: Path, every_log: None
) -> None:
    await artifacts.write(artifacts.url("e", "e.1", 1, OUTCOME), b'{"outcome": "of another version"}')
    with capture_logs() as told:
        assert (await saved.left_by(job(tmp_path, 2), [1])).outcome is None
    assert any("cannot be read" in line["event"] for line in told)


async def test_a_checkpoint_is_shipped_with_its_commit_point_last_and_fetched_whole(
    saved: Saved, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, progress = job(tmp_path, 1), Progress()
    wanted = [".eval-set-id", "x.checkpoints/a__1/ckpt-00001.json", "x.checkpoints/a__1/restic/host/data/6e/6eb3"]
    passing = [LOG, "x.checkpoints/a__1/context/events.json", "x.checkpoints/a__1/restic/host/locks/1"]
    write(Path(first.directory, LOGS), *wanted, *passing)
    write(Path(first.directory, ENDED), LOG)
    sent: list[str] = []
    ship = artifacts.ship

    async def watched(file: Path, url: str) -> None:
        sent.append(url)
        await ship(file, url)

    monkeypatch.setattr(artifacts, "ship", watched)
    async with Shipping(artifacts, first, Heard(checkpoints=1), progress) as shipping:
        shipping.due()
    assert sent[-1].endswith("ckpt-00001.json")
    assert progress.times == 1
    names = await artifacts.names(artifacts.url("e", "e.1", 1))
    assert sorted(names) == sorted([COMMITTED, *(f"{CHECKPOINT}/{n}" for n in (*wanted, f"{LOG}.part"))])
    second = job(tmp_path, 2)
    assert (await saved.left_by(second, [1])).resumable == 1
    await saved.fetch(second, 1)
    logs = Path(second.directory, LOGS)
    assert sorted(str(f.relative_to(logs)) for f in logs.rglob("*") if f.is_file()) == sorted([*wanted, LOG])


async def test_what_is_left_out_of_a_checkpoint_is_told_by_its_place_in_it(
    saved: Saved, artifacts: Artifacts, tmp_path: Path
) -> None:
    """Not by a folder above, nor by the name of a log, a sample or a sandbox."""
    first = job(tmp_path / "context" / "locks", 1)
    wanted = [
        "context.checkpoints/locks__1/ckpt-00001.json",
        "x.checkpoints/context__1/restic/host/keys/1",
        "x.checkpoints/a__1/sandboxes/context/archive/1.tar",
        "x.checkpoints/a__1/sandboxes/locks/archive/1.tar",
    ]
    passing = [
        "context.checkpoints/locks__1/context/events.json",
        "x.checkpoints/a__1/sandboxes/locks/restic/locks/1",
        "x.checkpoints/a__1/restic/host/locks/1",
    ]
    write(Path(first.directory, LOGS), *wanted, *passing)
    async with Shipping(artifacts, first, Heard(), Progress()) as shipping:
        shipping.due()
    names = await artifacts.names(artifacts.url("e", "e.1", 1))
    assert sorted(names) == sorted([COMMITTED, *(f"{CHECKPOINT}/{n}" for n in wanted)])


async def test_only_what_is_new_is_shipped_and_the_ledger_is_told_once(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, progress = job(tmp_path, 1), Progress()
    write(Path(first.directory, LOGS), "x/ckpt-00001.json")
    shipping = Shipping(artifacts, first, Heard(checkpoints=1), progress)
    await shipping._ship()
    write(Path(first.directory, LOGS), "x/ckpt-00002.json")
    sent: list[str] = []

    async def watched(file: Path, url: str) -> None:
        sent.append(file.name)

    monkeypatch.setattr(artifacts, "ship", watched)
    await shipping._ship()
    assert (sent, progress.times) == (["ckpt-00002.json"], 1)


async def test_a_log_alone_is_no_progress_nor_is_what_an_earlier_attempt_had_saved(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    """Else an attempt that dies each time after its first sample's log would be tried for ever."""
    second, progress, heard = job(tmp_path, 2), Progress(), Heard()
    write(Path(second.directory, LOGS), "x/ckpt-00001.json")  # fetched
    write(Path(second.directory, ENDED), "a.eval")
    shipping = Shipping(artifacts, second, heard, progress)
    await shipping._ship()
    assert progress.times == 0
    heard.checkpoints += 1
    await shipping._ship()
    assert progress.times == 1


async def test_a_checkpoint_says_by_which_versions_its_state_was_made(
    saved: Saved, artifacts: Artifacts, tmp_path: Path
) -> None:
    second = job(tmp_path, 2)
    write(Path(second.directory, LOGS), "x/ckpt-00001.json")
    heard = Heard(versions={"inspect_ai": "2"}, earlier_versions=[{"inspect_ai": "1"}])
    async with Shipping(artifacts, second, heard, Progress()) as shipping:
        shipping.due()
    assert await saved.made_by(job(tmp_path, 3), 2) == [{"inspect_ai": "2"}, {"inspect_ai": "1"}]


async def test_a_checkpoint_of_a_proctor_that_wrote_no_versions_may_be_of_any(
    saved: Saved, artifacts: Artifacts, tmp_path: Path
) -> None:
    await artifacts.write(artifacts.url("e", "e.1", 1, COMMITTED), b"{}")
    assert await saved.made_by(job(tmp_path, 2), 1) == [{}]


async def test_half_a_checkpoint_is_not_resumed_from(saved: Saved, artifacts: Artifacts, tmp_path: Path) -> None:
    """Attempt 3 was killed while it shipped its first; attempt 1's is whole."""
    for attempt, name in ((1, f"{CHECKPOINT}/x"), (1, COMMITTED), (3, f"{CHECKPOINT}/x")):
        await artifacts.write(artifacts.url("e", "e.1", attempt, name), b"{}")
    assert (await saved.left_by(job(tmp_path, 4), [3, 2, 1])).resumable == 1
    assert (await saved.left_by(job(tmp_path, 4), [3])).resumable is None, "attempt 2 had failed by itself"


async def test_of_what_is_over_only_logs_and_outcomes_stay(saved: Saved, artifacts: Artifacts) -> None:
    kept = [f"e.1/2/{LOG}", f"e.1/1/{OUTCOME}", "e.2/1/checkpoint.eval"]
    later = [f"e.1/12/{COMMITTED}", f"e.1/12/{CHECKPOINT}/a/b", f"e.2/3/{CHECKPOINT}/c"]
    for name in (*kept, *later, f"e.1/1/{COMMITTED}", f"e.1/1/{CHECKPOINT}/a/b", f"e.1/2/{CHECKPOINT}/a/b"):
        await artifacts.write(artifacts.url("e", name), b"{}")
    await saved.discard("e", "e.1", through=2)
    assert sorted(await artifacts.names(artifacts.url("e"))) == sorted([*kept, *later])
    await saved.discard("e")
    assert sorted(await artifacts.names(artifacts.url("e"))) == sorted(kept)


@pytest.mark.parametrize("counted", [1, 2])
async def test_of_all_merged_logs_so_far_the_one_that_counts_stays(
    saved: Saved, artifacts: Artifacts, counted: int
) -> None:
    """Attempt 2 may have recorded what attempt 1 had come to; attempt 3 is at work."""
    logs = [artifacts.url("e", "e.report", attempt, f"{attempt}.eval") for attempt in (1, 2, 3)]
    other = [artifacts.url("e", name) for name in (f"e.report/1/{OUTCOME}", "e.1/1/a.eval")]
    for url in logs + other:
        await artifacts.write(url, b"{}")
    await saved.supersede("e", "e.report", counted=logs[counted - 1], through=2)
    left = {artifacts.url("e", name) for name in await artifacts.names(artifacts.url("e"))}
    assert left == {logs[counted - 1], logs[2], *other}


class NoMarksDeleted(Artifacts):
    """A store that stops in the midst of deleting, at the worst place."""

    async def delete(self, urls: Iterable[str]) -> None:
        for url in urls:
            if url.endswith(COMMITTED):
                raise PermissionError("not yours")
            await super().delete([url])


async def test_a_checkpoint_that_says_it_is_whole_is_whole_while_it_is_being_deleted(tmp_path: Path) -> None:
    artifacts = NoMarksDeleted(f"file://{tmp_path}")
    for name in (COMMITTED, *(f"{CHECKPOINT}/{n}" for n in range(20))):
        await artifacts.write(artifacts.url("e", "e.1", 1, name), b"{}")
    await Saved(artifacts).discard("e", "e.1")
    assert len(await artifacts.names(artifacts.url("e"))) == 21


async def test_a_store_that_refuses_costs_the_checkpoint_and_not_the_work(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_log: None
) -> None:
    async def refused(*_: object) -> None:
        raise PermissionError("not yours")

    first, progress = job(tmp_path, 1), Progress()
    write(Path(first.directory, LOGS), "x/ckpt-00001.json")
    with monkeypatch.context() as patch, capture_logs() as told:
        patch.setattr(artifacts, "ship", refused)
        async with Shipping(artifacts, first, Heard(checkpoints=1), progress) as shipping:
            shipping.due()
    assert [line["event"] for line in told if line.get("execution") == "e.1"] == ["checkpoint not shipped"]
    assert progress.times == 0
    await shipping._ship()
    assert progress.times == 1, "the next takes it along"

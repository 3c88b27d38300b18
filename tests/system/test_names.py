"""Names that mean something to a URL, a shell, a glob or a file system go the whole way, from submission to reader."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.database.session import Database
from app.evaluations.read import Reader
from app.ledger import Ledger
from app.local.demo import viewing
from app.local.stack import open_stack
from app.runner.checkpoint import find_restic
from app.spec import Spec
from tests.system.conftest import TASKS, fanned_out, run, samples, spec
from tests.system.scripted import AGENT, scripted
from tests.system.test_resume import QUICK, saved, to_the_end
from tests.system.worker import push, working

FOLDER = "c#proj why? %41 50%25 a+b&c;d ~ [x]*{y} Grüße :: file: 'q' \"q\" $HOME two\nlines \\ dot."
NAMES = [
    "C# riddles",
    "50%25 off",
    "why?",
    "%41",
    "a/b",
    "'single' and \"double\"",
    "two\nlines",
    "[x]*{y}",
    "~",
    "a::b",
    "file://x",
    "many_faced_task",
    "Grüße ✓ " + "ü" * 300,
    "x" * 300,
]
READ = """
import sys
from pathlib import Path
from inspect_ai.log import read_eval_log, read_eval_log_sample_summaries
for log in sys.argv[1:]:
    whole = read_eval_log(log)
    assert (whole.status, [sample.id for sample in whole.samples]) == ("success", [1, 2]), log
    assert all(sample.output.completion == "fine" for sample in whole.samples)
    assert read_eval_log(log, header_only=True).results.total_samples == 2
    assert len(read_eval_log_sample_summaries(log)) == 2
    print(repr(whole.eval.task))
"""
HERE = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


async def test_a_name_in_a_folder_of_any_name_goes_the_whole_way(tmp_path: Path) -> None:
    data = tmp_path / FOLDER.replace("\n", " ")  # which initdb refuses
    places: dict[str, Any] = {"artifacts": f"file://{tmp_path / FOLDER}", "scratch": tmp_path / FOLDER / "scratch"}
    folder = tmp_path / "c#proj why? %41 'q' ünï"  # as far as Inspect itself can load a task from
    folder.mkdir()
    tasks = shutil.copy(TASKS, folder / "tasks.py")
    async with (
        open_stack(data, min_backoff=0.1, log_level="warning", **places) as stack,
        httpx.AsyncClient(base_url=stack.url, timeout=60) as client,
    ):
        views = await asyncio.gather(*(run(client, spec(f"{tasks}@named", task_args={"name": name})) for name in NAMES))
        assert [(view["state"], view["error"]) for view in views] == [("succeeded", None)] * len(NAMES)
        transcripts = [[s["transcript"] for s in await samples(client, view["id"])] for view in views]
    logs = [view["log"] for view in views]
    read = await _shell([sys.executable, "-c", READ, *logs])
    assert read.splitlines() == [repr(name) for name in NAMES]
    for (first, second), log in zip(transcripts, logs, strict=True):
        code = "import sys; from inspect_ai.log import read_eval_log as r; print(*(len(r(t).samples) for t in sys.argv[1:]))"
        if log is logs[0]:
            assert await _shell([sys.executable, "-c", code, first, second]) == "1 1\n"
        assert Path(first.removeprefix("file://")).is_file()
        assert len(Path(log).name.encode()) < 200


async def test_what_the_printed_line_opens_lists_the_logs(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """But for the viewer, which would not end: `--help` in its place, after the same line."""
    view = await run(client, spec(task_args={"n": 1}))
    folder = tmp_path / FOLDER
    shutil.copytree(Path(view["log"].removeprefix("file://")).parent, folder)
    assert "--log-dir" in await _shell(["bash", "-c", f"{viewing(folder)} --help"])
    listing = viewing(folder).replace(" view ", " list logs ")
    assert Path(view["log"]).name in await _shell(["bash", "-c", listing])


@pytest.mark.skipif(
    find_restic() is None, reason="restic 0.18 or newer is missing: `make setup` installs it where apt has one"
)
async def test_work_goes_on_from_a_checkpoint_below_a_folder_of_any_name(
    database_url: str, database: Database, ledger: Ledger, tmp_path: Path
) -> None:
    """Also below one that is named as what a checkpoint leaves out."""
    folder = tmp_path / "context" / "locks" / FOLDER
    async with scripted(turns=3) as model:
        name: dict[str, Any] = {"task_args": {"name": "C# 100%41? " + "x" * 300}}
        task = f"{TASKS.with_name('agents.py')}@notes"
        wanted = Spec(**{"task": task, "checkpoint": "turn", "max_failures": 1, **model.spec, **name})
        evaluation: UUID = await fanned_out(ledger, wanted, ["a"])
        model.hold.add((AGENT, 2))
        places: dict[str, Any] = {"database_url": database_url, "scratch": folder / "scratch"}
        async with working(folder, **places, **QUICK) as worker:
            pushed = asyncio.create_task(push(worker, f"{evaluation}.1"))
            await model.called(AGENT, 2)
            await saved(worker, evaluation, 2)
            await worker.kill()
            await asyncio.wait({pushed})
            pushed.exception()
        model.hold.clear()
        async with working(folder, **places, **QUICK) as worker:
            assert (await to_the_end(worker, evaluation))["state"] == "succeeded"
    assert model.calls.count((AGENT, 0)) == model.calls.count((AGENT, 1)) == 1, "what was saved is not done again"
    (result,) = (await Reader(database).samples(evaluation)).samples
    assert result.note == "Attempt 2 went on from the checkpoint of attempt 1."


async def _shell(command: list[str]) -> str:
    done = await asyncio.to_thread(subprocess.run, command, env=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

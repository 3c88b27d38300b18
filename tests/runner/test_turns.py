"""How many samples use a sandbox at once, where nothing bounds all the memory that one may hold."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from app.outcomes import Heard, stopped
from app.runner import turns
from app.runner.messages import Containment, Waiting
from app.runner.sandbox import ProctorSandbox, contain
from app.runner.turns import Turn, take


async def _free(folder: Path, count: int) -> Turn | None:
    with anyio.move_on_after(0.5):
        return await take(folder, count, lambda: None)
    return None


async def test_there_are_no_more_than_so_many_turns(tmp_path: Path) -> None:
    folder = tmp_path / "turns"
    held = [await take(folder, 2, lambda: None) for _ in range(2)]
    assert await _free(folder, 2) is None
    held.pop().end()
    assert await _free(folder, 2)


async def test_a_turn_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    program = (
        "import sys, anyio; from pathlib import Path; from app.runner.turns import take\n"
        "async def main():\n  await take(Path(sys.argv[1]), 1, print)\n  print('taken', flush=True)\n  sys.stdin.read()\n"
        "anyio.run(main)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=-1, stdout=-1) as other:
        assert other.stdout
        assert other.stdout.readline() == b"taken\n"
        assert await _free(tmp_path, 1) is None
        other.kill()
    assert await _free(tmp_path, 1)


async def test_a_long_wait_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.0)
    turn, told = await take(tmp_path, 1, lambda: None), anyio.Event()
    waits = []

    def waiting() -> None:
        waits.append(Waiting())
        told.set()

    async with anyio.create_task_group() as group:
        group.start_soon(take, tmp_path, 1, waiting)
        await told.wait()
        turn.end()
    assert len(waits) == 1


async def test_a_sample_s_sandbox_takes_a_turn_and_gives_it_back(tmp_path: Path) -> None:
    contain(Containment(at_once=1, turns=str(tmp_path)))
    try:
        environments = await ProctorSandbox.sample_init("test", None, {})
        assert await _free(tmp_path, 1) is None
        await ProctorSandbox.sample_cleanup("test", None, environments, False)
        assert await _free(tmp_path, 1)
    finally:
        contain(Containment())


async def test_a_sandbox_that_cannot_start_gives_its_turn_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    contain(Containment(launcher="cloud_run", at_once=1, turns=str(tmp_path)))
    try:
        with pytest.raises(Exception, match="There is no `sandbox` program"):
            await ProctorSandbox.sample_init("test", None, {})
    finally:
        contain(Containment())
    assert await _free(tmp_path, 1)


def test_who_waited_for_a_turn_until_the_deadline_is_not_charged_for_it() -> None:
    assert stopped("deadline", Heard(), 1740).outcome == "failed"
    assert stopped("deadline", Heard(waited=True), 1740).outcome == "interrupted"

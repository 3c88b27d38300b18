"""Attempts' folders go with their attempts, and those of killed workers with the next worker."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.scratch import Scratch

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from app.scratch import Scratch

async def main():
    async with Scratch(Path(sys.argv[1])) as scratch, scratch.folder("e.1", 1) as folder:
        (folder / "file").touch()
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_folder_goes_with_its_attempt(tmp_path: Path) -> None:
    async with Scratch(tmp_path) as scratch:
        async with scratch.folder("e.1", 1) as one, scratch.folder("e.1", 2) as two:
            (one / "file").touch()
            assert one != two
        assert not one.parent.exists()
    assert list(tmp_path.iterdir()) == []


async def test_a_killed_worker_s_folders_go_with_the_next_and_a_living_one_s_stay(tmp_path: Path) -> None:
    async with Scratch(tmp_path) as living, living.folder("e.1", 1) as used:
        with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE) as killed:
            assert killed.stdout
            assert killed.stdout.readline() == b"ready\n"
            os.kill(killed.pid, signal.SIGKILL)
        assert len(list(tmp_path.iterdir())) == 2
        async with Scratch(tmp_path):
            assert used.is_dir()
            assert len(list(tmp_path.iterdir())) == 2, "its own, and the living one's"


async def test_a_folder_that_is_taken_for_a_dead_worker_s_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another worker that begins in the same moment."""
    flock, others = fcntl.flock, [Scratch(tmp_path)]

    def late(file: int, how: int) -> None:
        if others:
            others.pop()._remove_the_dead()
        flock(file, how)

    monkeypatch.setattr("app.scratch.fcntl.flock", late)
    async with Scratch(tmp_path), Scratch(tmp_path):
        assert len(list(tmp_path.glob("worker-*/lock"))) == 2, "the second one has left the first one's folder alone"

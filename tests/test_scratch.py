"""The scratch folder is one user's alone; attempts' folders go with their attempts, and those of killed workers with the next
worker."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.runner.reachable import is_root
from app.scratch import Scratch, make_private

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


# Whose it is


def _mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o7777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_it_is_made_for_its_user_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_private(tmp_path / "not there yet" / "scratch")
    finally:
        os.umask(before)
    assert _mode(tmp_path / "not there yet" / "scratch") == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o711, 0o777, 0o770])
async def test_our_own_that_is_open_to_others_is_closed_to_them(tmp_path: Path, mode: int) -> None:
    (tmp_path / "worker-of-an-earlier-version").mkdir()
    tmp_path.chmod(mode)
    async with Scratch(tmp_path):
        assert _mode(tmp_path) == 0o700


@pytest.mark.skipif(not is_root(), reason="only root can give a folder to another user")
@pytest.mark.parametrize("mode", [0o700, 0o777])
async def test_another_user_s_is_refused(tmp_path: Path, mode: int) -> None:
    os.chown(tmp_path, 12345, 12345)
    tmp_path.chmod(mode)
    with pytest.raises(SettingsError, match=r"PROCTOR_SCRATCH: .* belongs to another user \(uid 12345\)"):
        async with Scratch(tmp_path):
            pass
    assert _mode(tmp_path) == mode


@pytest.mark.skipif(is_root(), reason="root: /root, or any other folder, would be its own")
def test_a_folder_that_is_closed_to_us_is_told_to_be_another_s() -> None:
    with pytest.raises(SettingsError, match="belongs to another user"):
        make_private(Path("/"))


def test_a_link_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    (tmp_path / "goal").mkdir(mode=0o700)
    for goal in ("goal", "nowhere"):
        (tmp_path / "scratch").symlink_to(goal)
        with pytest.raises(SettingsError, match="it is a symbolic link"):
            make_private(tmp_path / "scratch")
        (tmp_path / "scratch").unlink()
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SettingsError, match=r"^PROCTOR_SCRATCH: [^\n]*(Not a directory|File exists)[^\n]*$"):
            make_private(path)


@pytest.mark.parametrize(("mode", "holds"), [(0o1777, None), (0o755, "passwd")])
def test_a_folder_that_others_use_is_refused_and_not_closed_to_them(
    tmp_path: Path, mode: int, holds: str | None
) -> None:
    """`PROCTOR_SCRATCH=/tmp`, or `/etc`: root owns it, and the machine needs it."""
    if holds:
        (tmp_path / holds).touch()
    tmp_path.chmod(mode)
    with pytest.raises(SettingsError, match="open to others"):
        make_private(tmp_path)
    assert _mode(tmp_path) == mode

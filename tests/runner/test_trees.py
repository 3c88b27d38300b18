"""Folders that hostile code has filled are counted and removed, whatever it has done to them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.runner.reachable import is_root
from app.runner.trees import Uncountable, remove, size_of
from app.runner.watchdog import Watchdog

LOTS = 2**40


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "filled"
    folder.mkdir()
    yield folder
    if folder.exists():
        subprocess.run(["chmod", "-R", "u+rwX", folder], check=False)
        subprocess.run(["rm", "-rf", folder], check=True)


def _deepen(folder: Path, levels: int) -> None:
    deepen = "import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(int(sys.argv[2])): os.mkdir('d' * 99); os.chdir('d' * 99)"
    program = f"{deepen}\nopen('file', 'w').write('x' * 10**6)"
    subprocess.run([sys.executable, "-c", program, folder, str(levels)], check=True)


def test_files_count_wherever_they_lie(folder: Path) -> None:
    _deepen(folder, 100)
    assert 10**6 + 100 * 4096 <= size_of(folder, LOTS) < 1.1 * 10**6 + 101 * 4096 * 2


def test_empty_files_take_a_page_each(folder: Path) -> None:
    for number in range(100):
        (folder / str(number)).touch()
    assert size_of(folder, LOTS) == 100 * 4096


def test_a_closed_folder_counts_and_stays_closed(folder: Path) -> None:
    (folder / "closed").mkdir()
    (folder / "closed" / "file").write_bytes(b"x" * 10**6)
    (folder / "closed").chmod(0)
    assert size_of(folder, LOTS) >= 10**6
    assert (folder / "closed").stat().st_mode & 0o777 == 0


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("/usr")
    (tmp_path / "kept").touch()
    (folder / "up").symlink_to(tmp_path)
    assert size_of(folder, LOTS) <= 2 * 4096
    assert remove(folder)
    assert (tmp_path / "kept").exists()


def test_what_is_nested_too_deep_to_be_counted_is_over(folder: Path) -> None:
    _deepen(folder, 3000)
    with pytest.raises(Uncountable, match="nested deeper than"):
        size_of(folder, LOTS)


def test_everything_goes(folder: Path) -> None:
    _deepen(folder, 3000)
    for number in range(3):
        (folder / f"closed-{number}" / "inner").mkdir(parents=True)
        (folder / f"closed-{number}" / "inner" / "file").touch()
        (folder / f"closed-{number}" / "inner").chmod(0o100)
        (folder / f"closed-{number}").chmod(0o400)
    os.mkfifo(folder / "pipe")
    folder.chmod(0)
    assert remove(folder)
    assert not folder.exists()


@pytest.mark.skipif(not is_root(), reason="only root can make files of another user's")
def test_what_cannot_be_removed_is_told_and_the_rest_goes(folder: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from app.runner.trees import remove\n"
        "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\nprint(remove(Path(sys.argv[1])))"
    )
    with tempfile.TemporaryDirectory() as other:
        Path(other).chmod(0o755)
        mine = Path(other, "filled")
        (mine / "another's").mkdir(parents=True)
        (mine / "another's" / "file").touch()
        (mine / "own").mkdir()
        for path in (mine, mine / "own"):
            os.chown(path, 65534, 65534)
        told = subprocess.run([sys.executable, "-c", program, mine], check=True, capture_output=True, text=True)
        assert told.stdout == "False\n"
        assert [path.name for path in mine.iterdir()] == ["another's"]


def test_a_measure_that_fails_keeps_no_other_from_being_taken(tmp_path: Path) -> None:
    (tmp_path / "calls").mkdir()
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "file").write_bytes(b"x" * 10**6)
    watchdog = Watchdog(tmp_path / "calls", disks={tmp_path / "gone": 1, tmp_path / "large": 1, tmp_path / "small": 1})
    assert watchdog._over([]) == "its files in /large were larger than 0 MiB together"


def test_what_cannot_be_watched_for_long_is_over(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, disks={tmp_path / "gone": 1})
    looks = [watchdog._over([]) for _ in range(10)]
    assert looks == [None] * 9 + ["it could not be watched"]
    (tmp_path / "gone").mkdir()
    assert watchdog._over([]) is None, "one look that succeeds is enough"

"""The sandbox works wherever Proctor is installed: what its user cannot reach is copied to where it can."""

import os
import tempfile
from pathlib import Path

import pytest

from app.runner import reachable as where
from app.runner.reachable import is_root, reachable, where_reachable

as_root = pytest.mark.skipif(
    not is_root(), reason="an ordinary user's sandbox is that user's own: nothing is out of reach"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that only its owner may enter, with a package in it; and a temporary directory of its own."""
    temporary = Path(tempfile.mkdtemp())  # pytest's own are closed to others
    temporary.chmod(0o755)
    monkeypatch.setattr(where, "TEMPORARY", str(temporary))
    home = tmp_path / "home"
    (home / "package" / "inner").mkdir(parents=True)
    (home / "package" / "inner" / "program").write_text("#!/bin/sh\n")
    (home / "package" / "inner" / "program").chmod(0o700)
    (home / "other").mkdir()
    home.chmod(0o700)
    return home


@as_root
def test_what_is_out_of_reach_is_copied_once_and_nothing_beside_it(home: Path) -> None:
    assert not reachable(home)
    copied = where_reachable(home, ["package"])
    assert reachable(copied / "package" / "inner")
    assert (copied / "package" / "inner" / "program").stat().st_mode & 0o777 == 0o755
    assert [p.name for p in copied.iterdir()] == ["package"]
    assert where_reachable(home, ["package"]) == copied
    assert len(list(copied.parent.iterdir())) == 1


@as_root
def test_a_copy_that_somebody_else_could_have_made_is_refused(home: Path) -> None:
    copied = where_reachable(home, ["package"])
    copied.chmod(0o777)
    with pytest.raises(PermissionError, match="somebody else"):
        where_reachable(home, ["package"])
    copied.chmod(0o755)
    os.chown(copied, 12345, 12345)
    with pytest.raises(PermissionError, match="somebody else"):
        where_reachable(home, ["package"])


def test_what_can_be_reached_stays_where_it_is() -> None:
    assert where_reachable(Path("/usr"), ["bin"]) == Path("/usr")

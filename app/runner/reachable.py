"""What the sandbox's user must be able to reach, wherever Proctor is installed.

Root's sandbox becomes another user before bubblewrap starts, and a home directory may shut that one out. What it needs
from there (bubblewrap's binary, pytest's packages) is copied once to where it may go.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

TEMPORARY = tempfile.gettempdir()
"""As the process began with it: a child's own temporary files go elsewhere, and these outlive it."""


def is_root() -> bool:
    return os.geteuid() == 0


def reachable(folder: Path) -> bool:
    """Whether the sandbox's user outside may enter the folder."""
    if not is_root():
        return os.access(folder, os.R_OK | os.X_OK)
    return folder.is_dir() and all(step.stat().st_mode & 0o001 for step in (folder, *folder.resolve().parents))


def where_reachable(root: Path, names: Sequence[str]) -> Path:
    """A folder with `names` (files or folders of `root`) that can be reached: `root` itself, or a copy of those.

    The copy's name says what it is of, so that it is made once; it is taken only if it is ours and nobody else may
    write to it, for anybody can make folders in the temporary directory.
    """
    return root if reachable(root) else _kept(root, names)


def _kept(root: Path, names: Sequence[str]) -> Path:
    stamps = [(name, (root / name).stat().st_mtime_ns) for name in names]
    kept = Path(TEMPORARY, f"proctor-{sha256(repr((root, stamps)).encode()).hexdigest()[:16]}")
    if not _is_ours(kept):
        _copy(root, names, kept)
    return kept


def together(paths: Sequence[Path]) -> Path:
    """A folder with a copy of each of these, which lie side by side: for a launcher that mounts folders only."""
    root = paths[0].parent
    return _kept(root, [path.name for path in paths])


def _is_ours(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    if not folder.is_symlink() and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return True
    raise PermissionError(f"{folder} is somebody else's: remove it, the sandbox's programs belong there.")


def _copy(root: Path, names: Sequence[str], kept: Path) -> None:
    half = Path(tempfile.mkdtemp(prefix="proctor-half-", dir=TEMPORARY))
    for name in names:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, half / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, half / name)
    for folder, _, files in os.walk(half):
        Path(folder).chmod(0o755)  # programs and libraries, for another user to run
        for file in files:
            path = Path(folder, file)
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    try:
        half.rename(kept)
    except OSError:  # somebody of ours was quicker
        shutil.rmtree(half)
        if not _is_ours(kept):
            raise

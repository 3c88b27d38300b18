"""What the code in a sandbox can see of the machine: the system, a Python and pytest, all read-only, and nothing of the
service: neither its source (hidden tests are part of it) nor the packages installed for it."""

import functools
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.runner.reachable import reachable, where_reachable

PYTEST = "/opt/pytest"
"""Where the sandbox has pytest. It is on the default PYTHONPATH, which `python3 -I` ignores."""

_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/os-release")
"""The machine's own; by the last, Inspect knows which tools to bring."""


@functools.cache
def system_mounts() -> tuple[str, ...]:
    """What is the same for every sample: the system, Python and pytest, all read-only."""
    return (
        *("--ro-bind", "/usr", "/usr"),
        *(part for name in ("bin", "sbin", "lib", "lib32", "lib64") for part in _top_folder(Path("/", name))),
        *(part for path in _ETC for part in ("--ro-bind-try", path, path)),
        *(part for f in python_folders() for name in ("bin", "lib") for part in _read_only(f / name, f / name)),
        *(part for folder in covered_folders() for part in ("--tmpfs", str(folder), "--remount-ro", str(folder))),
        *(part for path in pytest_packages() for part in _read_only(path, Path(PYTEST, path.name))),
    )


def _top_folder(folder: Path) -> tuple[str, ...]:
    if folder.is_symlink():
        return ("--symlink", str(folder.readlink()), str(folder))
    return _read_only(folder, folder) if folder.is_dir() else ()


def _read_only(source: Path, target: Path) -> tuple[str, str, str]:
    return ("--ro-bind", str(source), str(target))


@functools.cache
def python_folders() -> tuple[Path, ...]:
    """Where the service's Python lives, if that is not in /usr (a pyenv, say) and the sandbox's user can get there.

    Only its `bin` and `lib` are shown. Otherwise the sandbox has the system's Python.
    """
    base = Path(sys.base_prefix).resolve()
    if base.is_relative_to("/usr") or not reachable(base / "bin") or not reachable(base / "lib"):
        return ()
    return (base,)


def covered_folders(shown: Sequence[Path] | None = None) -> list[Path]:
    """Folders that would be shown and must not: what is installed for the service, its source (hidden tests are part of
    it), and other sources by convention. Each is to be covered by an empty one. `shown`: what is shown; by default what
    `system_mounts` does."""
    shown = shown or [Path("/usr"), *(folder / "lib" for folder in python_folders())]
    covered: list[Path] = []
    for folder in sorted(folder.resolve() for folder in _service_folders()):
        inside = any(folder.is_relative_to(root) and folder != root for root in shown)
        if inside and folder.is_dir() and not any(folder.is_relative_to(done) for done in covered):
            covered.append(folder)
    return covered


def _service_folders() -> Iterator[Path]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield from (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    yield from (Path(folder) for folder in site.getsitepackages())
    yield Path(sys.base_prefix, "lib", version, "site-packages")
    yield Path(__file__).resolve().parents[2]
    yield from (Path("/usr/src"), Path("/usr/local/src"))


def pytest_packages() -> list[Path]:
    """What pytest consists of, and nothing else of the service's packages. Empty if pytest is not installed."""
    names = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
    specs = [importlib.util.find_spec(name) for name in names]
    if not all(specs):
        return []
    files = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    found = [file.parent if file.name == "__init__.py" else file for file in files]
    packages = found[0].parent  # pip puts them side by side
    if any(path.parent != packages for path in found):
        return found
    folder = where_reachable(packages, [path.name for path in found])
    return [folder / path.name for path in found]

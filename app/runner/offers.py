"""Which tasks there are: packages that were installed since the forkserver started among them, and what to do if the one
asked for is not."""

import importlib
import site
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

from inspect_ai import list_tasks

# Private: there is no public way to what is registered, nor to have Inspect forget what it has looked for in vain.
from inspect_ai._util import package as _packages
from inspect_ai._util.entrypoints import clear_entry_points_state, ensure_entry_points
from inspect_ai._util.registry import registry_find, registry_lookup
from inspect_ai.util import registry_info

_MOST = 30
"""Tasks that a message lists. Ours: it is cut at 1,000 characters."""


def look_again(task: str) -> None:
    """If `package/name` is not known, also among what was installed meanwhile. In a child: it is of no use to others."""
    if "@" in task or "/" not in task or registry_lookup("task", task) is not None:
        return
    for folder in (*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])):
        with suppress(OSError):
            site.addsitedir(folder)  # `.pth` files: what is installed editable
    importlib.invalidate_caches()
    clear_entry_points_state()
    for one in vars(_packages).values():
        if clear := getattr(one, "cache_clear", None):
            clear()


def instead(task: str) -> str:
    """What is there, and what to do; `task` is not."""
    file, at, name = task.rpartition("@")
    if at:
        return _instead_in_file(file, name)
    package, slash, name = task.partition("/")
    if not slash:
        return "Name it as `package/name` of an installed package, as `file.py@name`, or as `proctor/NAME`."
    ensure_entry_points(package)
    if tasks := _of_package(package):
        return f"{_near(name, tasks)}The package {package!r} offers: {_listed(tasks)}."
    offering = sorted({one.name for one in entry_points(group="inspect_ai")} - {"proctor", "proctor_examples"})
    among = f" Those that do: {_listed(offering)}." if offering else ""
    return (
        f"{_near(package, offering)}No installed package offers tasks as `{package}/…`: it is to be installed where the"
        f" service runs, with an entry point {package!r} in the group `inspect_ai` that imports them.{among} Or name the task"
        " as `file.py@name`."
    )


def _instead_in_file(file: str, name: str) -> str:
    path = Path(file).absolute()
    found = list_tasks(path.name, root_dir=path.parent) if path.is_file() else []
    tasks = sorted(one.name for one in found)
    return f"{_near(name, tasks)}Tasks in {file}: {_listed(tasks) or 'none, for lack of a function with `@task`'}."


def _of_package(package: str) -> list[str]:
    prefix = f"{package}/"
    found = registry_find(lambda info: info.type == "task" and info.name.startswith(prefix))
    return sorted(registry_info(one).name.removeprefix(prefix) for one in found)


def _near(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more

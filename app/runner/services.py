"""Refuses a task that wants several sandboxes for a sample, where it would get one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from inspect_ai import Task
from inspect_ai._eval.task.util import (
    task_run_dir,  # private: the folder of the task's file, where Inspect looks itself
)
from inspect_ai.util import SandboxEnvironmentSpec

from app.runner.failures import refusal
from app.spec import Spec

_ONE_EACH = ("proctor", "local")
_COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
"""Names by which `docker` finds one beside the task's file, without being told."""


def refuse_several_sandboxes(spec: Spec, task: Task) -> None:
    for declared in _declared(task):
        if (spec.sandbox or declared.type) not in _ONE_EACH:
            continue
        services = _services(declared, Path(task_run_dir(task)))
        if len(services) > 1:
            raise refusal(
                f"The task {spec.task!r} wants {len(services)} sandboxes for a sample ({', '.join(sorted(services))}), and"
                f" `{spec.sandbox or declared.type}` gives each sample one."
            )


def _declared(task: Task) -> Iterator[SandboxEnvironmentSpec]:
    seen = set[tuple[str, str]]()
    for one in (task.sandbox, *(sample.sandbox for sample in task.dataset)):
        if one is not None and (key := (one.type, str(one.config))) not in seen:
            seen.add(key)
            yield one


def _services(declared: SandboxEnvironmentSpec, folder: Path) -> list[str]:
    """Names of the services in its compose file; none if there is no such file, or another kind of file."""
    config = declared.config
    if config is not None and not isinstance(config, str):
        return list(map(str, getattr(config, "services", None) or ()))
    names = [config] if config else list(_COMPOSE_FILES) if declared.type == "docker" else []
    for file in (folder / name for name in names):
        if file.suffix in (".yaml", ".yml") and file.is_file():
            return _named(file)
    return []


def _named(file: Path) -> list[str]:
    try:
        read: Any = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError):
        return []
    services = read.get("services") if isinstance(read, dict) else None
    return list(map(str, services)) if isinstance(services, dict) else []

"""Which tasks, models and queues a spec may name, where the operator bounds them; and that it holds no key."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from app.errors import InvalidRequest
from app.evaluations.keys import keys_in
from app.redaction import Secrets
from app.spec import Spec

ALL = ("*",)


@dataclass(frozen=True)
class Allowed:
    """Patterns with `*` and `?`, in which `*` spans `/` too.

    A task is held to them as Inspect reads it: the last `@` parts a file from the name of a task in it. A pattern with an
    `@` of its own is held to both sides; one without, to the file alone."""

    tasks: Sequence[str] = ALL
    models: Sequence[str] = ALL
    queues: Sequence[str] | None = None
    """Names; None: any."""
    secrets: Secrets = field(default_factory=Secrets)

    def check(self, spec: Spec) -> None:
        """Raises `InvalidRequest` that says what is allowed."""
        if keys := keys_in(spec, self.secrets):  # first: no other message may repeat one
            raise InvalidRequest(" ".join(f"{one['field']}: {one['message']}" for one in keys), keys)
        wrong = [] if self._has_task(spec.task) else [_wrong("task", spec.task, self.tasks)]
        named = {"model": spec.model} | {f"model_roles.{role}": name for role, name in spec.model_roles.items()}
        wrong += [_wrong(field, name, self.models) for field, name in named.items() if not _fits(name, self.models)]
        if spec.queue is not None and self.queues is not None and spec.queue not in self.queues:
            wrong.append(_wrong("queue", spec.queue, self.queues))
        if wrong:
            raise InvalidRequest(" ".join(f"{one['field']}: {one['message']}" for one in wrong), wrong)

    def _has_task(self, task: str) -> bool:
        file, at, name = task.rpartition("@")
        if tuple(self.tasks) == ALL:
            return True
        if not at:
            return _fits(task, self.tasks) and _stays(task) and not _GLOB.intersection(task)
        # Inspect looks a name with `/` up among all installed packages' tasks, whatever file was loaded before
        own = "/" not in name or self._has_task(name)
        return own and _stays(file) and any(_fits_both(file, name, pattern) for pattern in self.tasks)


_GLOB = frozenset("*?[")
"""Inspect takes a task without `@` for a glob, too: what it finds may be called otherwise than what fits."""


def _stays(path: str) -> bool:
    """`suite/*` is not to reach what `suite/../other` names."""
    return ".." not in path.split("/")


def _fits_both(file: str, name: str, pattern: str) -> bool:
    of_file, at, of_name = pattern.rpartition("@")
    if not at or "/" in of_name:  # that is a folder's
        return fnmatchcase(file, pattern)
    return fnmatchcase(file, of_file) and fnmatchcase(name, of_name)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _wrong(field: str, name: str, patterns: Sequence[str]) -> dict[str, str]:
    return {"field": field, "message": f"{name!r} is not allowed here. Allowed are: {', '.join(patterns)}."}

"""Which tasks, models and queues a spec may name, where the operator bounds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from app.errors import InvalidRequest
from app.spec import Spec

ALL = ("*",)


@dataclass(frozen=True)
class Allowed:
    """Patterns with `*` and `?`, in which `*` spans `/` too."""

    tasks: Sequence[str] = ALL
    models: Sequence[str] = ALL
    queues: Sequence[str] | None = None
    """Names; None: any."""

    def check(self, spec: Spec) -> None:
        """Raises `InvalidRequest` that says what is allowed."""
        wrong = [] if self._has_task(spec.task) else [_wrong("task", spec.task, self.tasks)]
        named = {"model": spec.model} | {f"model_roles.{role}": name for role, name in spec.model_roles.items()}
        wrong += [_wrong(field, name, self.models) for field, name in named.items() if not _fits(name, self.models)]
        if spec.queue is not None and self.queues is not None and spec.queue not in self.queues:
            wrong.append(_wrong("queue", spec.queue, self.queues))
        if wrong:
            raise InvalidRequest(" ".join(f"{one['field']}: {one['message']}" for one in wrong), wrong)

    def _has_task(self, task: str) -> bool:
        """`suite/*` is not to reach what `suite/../other` names."""
        return _fits(task, self.tasks) and (tuple(self.tasks) == ALL or ".." not in task.split("/"))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _wrong(field: str, name: str, patterns: Sequence[str]) -> dict[str, str]:
    return {"field": field, "message": f"{name!r} is not allowed here. Allowed are: {', '.join(patterns)}."}

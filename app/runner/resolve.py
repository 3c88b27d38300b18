"""From a spec to Inspect's objects: the task, the model, the roles."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

from inspect_ai import Task

# Private. There is no public way from "package/name" or "file.py@name" to a Task: `eval()` loads one but keeps it. This
# function also gives the task's own code its model and its roles.
from inspect_ai._eval.eval import eval_resolve_tasks
from inspect_ai._util.error import PrerequisiteError  # private too: how that function says that there is no such task
from inspect_ai.model import GenerateConfig, GenerateConfigArgs, Model, get_model

from app import yaml_text
from app.runner.failures import refusal, refused
from app.runner.messages import Containment
from app.runner.offers import instead, look_again
from app.spec import Spec

_EXAMPLES = "proctor/"
_NEEDS_DOCKER = "docker"
"""With a compose file or without."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    task: Task
    model: Model
    roles: dict[str, Model]
    whole: bool
    """The task decides by itself which samples end, or makes them as it goes: they must be one execution."""


def resolve(spec: Spec) -> Subject:
    """Everything a run needs and nothing that only a run could find out: what is missing is refused here, once, rather
    than by each sample."""
    with refused(f"The model {spec.model!r} cannot be used", "model"):
        arguments = yaml_text.python(spec.model_args)
        model = get_model(spec.model, **arguments)
    roles = {}
    for role, name in spec.model_roles.items():
        with refused(f"The model {name!r} of the role {role!r} cannot be used", "model"):
            roles[role] = get_model(name, config=GenerateConfig(**retries(spec)), memoize=False)
    task = load_task(spec, model, roles)
    return Subject(task, model, roles, whole=task.early_stopping is not None or task.sample_source is not None)


def retries(spec: Spec) -> GenerateConfigArgs:
    """How long a model's call may be tried: as Inspect has it for the model itself, and so for each role."""
    given = spec.model_dump(include={"max_retries", "timeout", "attempt_timeout"})
    return cast(GenerateConfigArgs, {name: value for name, value in given.items() if value is not None})


def load_task(spec: Spec, model: Model, roles: dict[str, Model]) -> Task:
    with refused(f"The task {spec.task!r} cannot be loaded"):
        _check_file(spec.task)
        look_again(spec.task)
        try:
            found = eval_resolve_tasks(
                tasks=_example(spec.task) if spec.task.startswith(_EXAMPLES) else spec.task,
                task_args=yaml_text.python(spec.task_args),
                models=[model],
                model_roles=dict(roles),
                config=GenerateConfig(),
                approval=None,
                sandbox=None,
                sample_shuffle=None,
            )[0]
        except PrerequisiteError as error:
            if f"Task named '{spec.task.rpartition('@')[2]}' not found" not in str(error.message):
                raise
            found = []
    if not found:
        raise refusal(f"There is no task {spec.task!r}. {instead(spec.task)}")
    if len(found) > 1:
        names = ", ".join(one.task.name for one in found)
        raise refusal(f"{spec.task!r} names {len(found)} tasks ({names}): pick one as `file.py@name`.")
    return found[0].task


def _check_file(task: str) -> None:
    """Inspect takes a file that cannot be parsed for one without tasks."""
    file, at, _ = task.rpartition("@")
    if not at and task.endswith(".py"):
        raise refusal(f"{task!r} names a file: say which of its tasks as `{task}@name`.")
    if file.endswith(".py") and Path(file).is_file():
        compile(Path(file).read_bytes(), file, "exec")


def _example(name: str) -> Callable[..., Task]:
    from app.examples import TASKS  # not for specs that name other tasks: these may import a lot

    try:
        return TASKS[name.removeprefix(_EXAMPLES)]
    except KeyError:
        known = ", ".join(f"{_EXAMPLES}{known}" for known in sorted(TASKS))
        raise refusal(f"There is no task {name!r}. Proctor's own are: {known}.") from None


def check_sandbox(spec: Spec, task: Task, containment: Containment) -> None:
    """Refuses what would run agents' code where it may not, or cannot. Only plans and runs need a sandbox."""
    for sandbox in sorted({spec.sandbox} if spec.sandbox else declared_sandboxes(task)):
        asks = f"The spec asks for the sandbox {sandbox!r}" if spec.sandbox else f"{spec.task!r} declares {sandbox!r}"
        if sandbox == _NEEDS_DOCKER:
            raise refusal(
                f"The task {spec.task!r} declares the sandbox {sandbox!r}, which cannot run here."
                " Set `sandbox: proctor` in the spec to run its commands in Proctor's own sandbox."
            )
        if sandbox == "local" and spec.sandbox is None:
            raise refusal(
                f"The task {spec.task!r} declares the sandbox 'local', which isolates nothing. Set `sandbox: proctor` in the"
                " spec; or `sandbox: local`, to ask for it by name."
            )
        if not any(fnmatchcase(sandbox, pattern) for pattern in containment.allowed):
            raise refusal(
                f"{asks}, which this service does not allow. Set `sandbox: proctor` in the spec, or ask its operator to"
                " add it to PROCTOR_ALLOWED_SANDBOXES."
            )
        if sandbox == "proctor" and containment.launcher is None:
            raise refusal(containment.refusal, "infrastructure")


def declared_sandboxes(task: Task) -> Iterable[str]:
    """The kinds of sandbox that a task and its samples want."""
    declared = [task.sandbox, *(sample.sandbox for sample in task.dataset)]
    return {sandbox.type for sandbox in declared if sandbox is not None}

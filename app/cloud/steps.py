"""A plan is data: steps that may be taken any number of times. They can be printed as shell, or taken."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from app.cloud import gcloud
from app.cloud.gcloud import Argv


@dataclass(frozen=True)
class Step:
    """`check` prints something if, and only if, the thing is there: then it is brought up to date by `update`, otherwise
    made by `create`. Without `check`, `create` may be said as often as one likes. What comes after `gcloud`, each."""

    title: str
    create: Argv
    check: Argv | None = None
    update: Argv | None = None


@dataclass(frozen=True)
class Remark:
    """What no command here may do, with what to do: a secret's value, a superuser's statement."""

    title: str
    lines: tuple[str, ...]


def shell(steps: Iterable[Step | Remark]) -> Iterator[str]:
    """Lines for a terminal; each step is whole, so that a part may be pasted."""
    for step in steps:
        yield f"# {step.title}"
        if isinstance(step, Remark):
            yield from (f"#   {line}" for line in step.lines)
        elif step.check is None:
            yield _line(step.create)
        elif step.update is None:
            yield f'[ -n "$({_line(step.check)} 2>/dev/null)" ] || {_line(step.create)}'
        else:
            yield f'if [ -n "$({_line(step.check)} 2>/dev/null)" ]; then'
            yield f"  {_line(step.update)}"
            yield f"else {_line(step.create)}; fi"
        yield ""


def take(steps: Iterable[Step | Remark], say: Callable[[str], None]) -> None:
    """In their order. Raises `GcloudFailed` at the first that fails; what was done stays, and the next run goes on."""
    for step in steps:
        if isinstance(step, Remark):
            say(f"to do    {step.title}")
            for line in step.lines:
                say(f"           {line}")
        else:
            say(f"{_take(step):<8} {step.title}")


def _take(step: Step) -> str:
    if step.check is None or not gcloud.finds(step.check):
        gcloud.run(step.create)
        return "set" if step.check is None else "created"
    if step.update is None:
        return "there"
    gcloud.run(step.update)
    return "set"


def _line(argv: Argv) -> str:
    return shlex.join(["gcloud", *argv, "--quiet"])

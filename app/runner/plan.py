"""Lists an evaluation's samples without running any."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from inspect_ai import Task, eval
from inspect_ai.dataset import Dataset
from inspect_ai.log import EvalLog
from inspect_ai.util import registry_info

from app.runner.failures import refusal, refused
from app.runner.messages import Job, Planned, SampleRef
from app.runner.resolve import Subject, check_sandbox, load_task, resolve
from app.runner.run import options
from app.runner.writer import Writer
from app.spec import Spec


def plan(job: Job, out: Writer) -> None:
    subject = resolve(job.spec)
    task = subject.task
    check_sandbox(job.spec, task, job.containment)
    _refuse_changing_order(job.spec, subject)
    with refused(f"The task {job.spec.task!r} cannot be planned"):
        log = eval(
            task,
            **options(job, subject),
            limit=job.spec.limit,
            fail_on_error=job.spec.fail_on_error,
            run_samples=False,
        )[0]
    _refuse_ignored_arguments(job.spec, task, log)
    ids = log.eval.dataset.sample_ids or []
    _refuse_ambiguous(ids)
    epochs = log.eval.config.epochs or 1
    out.send(
        Planned(
            task=task.name,
            samples=tuple(SampleRef(id=id, epoch=epoch) for epoch in range(1, epochs + 1) for id in ids),
            whole=subject.whole,
            log=Path(log.location).name,
            task_version=str(task.version),
        )
    )


def _refuse_ambiguous(ids: Sequence[int | str]) -> None:
    """Inspect's logs tell samples apart by the text of their ids, and so do result rows."""
    for text, count in Counter(str(id) for id in ids).items():
        if count > 1:
            raise refusal(f"The dataset has {count} samples with the id {text!r}, as text and as a number: rename one.")


def _refuse_ignored_arguments(spec: Spec, task: Task, log: EvalLog) -> None:
    """Inspect only warns of an argument that the task does not take."""
    ignored = spec.task_args.keys() - log.eval.task_args_passed.keys()
    if ignored:
        takes = ", ".join(registry_info(task).metadata.get("params", [])) or "none"
        raise refusal(f"The task {spec.task!r} takes no argument {min(ignored)!r}; it takes: {takes}.")


def _refuse_changing_order(spec: Spec, subject: Subject) -> None:
    """Samples without ids are numbered by place, so an unseeded shuffle gives each process other samples for the same
    ids. Whether a seed was used is not recorded: loading the task again tells."""
    dataset = subject.task.dataset
    if not dataset.shuffled or all(sample.id is not None for sample in dataset):
        return
    order = _order(dataset)
    for _ in range(_loads_to_tell(len(dataset))):
        if _order(load_task(spec, subject.model, subject.roles).dataset) != order:
            raise refusal(
                f"The task {spec.task!r} shuffles its samples without a seed and gives them no ids, so no two processes"
                " would mean the same samples: give it a seed, or ids."
            )


def _order(dataset: Dataset) -> list[str]:
    return [str(sample.input) for sample in dataset]


def _loads_to_tell(samples: int) -> int:
    """How often an unseeded shuffle must come out the same for that to be less likely than one in a million."""
    return 0 if samples < 2 else math.ceil(math.log(1e6) / math.lgamma(samples + 1))

"""Lists an evaluation's samples without running any."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from inspect_ai import Task, eval
from inspect_ai.dataset import Dataset

from app.runner.arguments import check_arguments
from app.runner.costs import price_models
from app.runner.digest import digest
from app.runner.error_policy import error_limit
from app.runner.failures import refusal, refused
from app.runner.messages import Job, Planned, SampleRef
from app.runner.resolve import check_sandbox, resolve
from app.runner.run import name_logs, number, options
from app.runner.same import REMEDY, shown
from app.runner.sample_ids import refuse_odd_ids
from app.runner.services import refuse_several_sandboxes
from app.runner.twin import Pairs, id_digest, twin
from app.runner.unattended import refuse_humans
from app.runner.writer import Writer
from app.spec import Spec

_TELLING = 1.0
"""Seconds after which a task is not loaded yet another time."""


def plan(job: Job, out: Writer) -> None:
    with twin(lambda: _numbered(resolve(job.spec).task)) as other:
        began = time.monotonic()
        subject = resolve(job.spec)
        price_models(job, subject)
        seconds = time.monotonic() - began
        task = subject.task
        name_logs(task)
        check_sandbox(job.spec, task, job.containment)
        refuse_several_sandboxes(job.spec, task)
        refuse_humans(task)
        refuse_odd_ids(task.name, [sample.id for sample in _numbered(task)])
        samples = list(task.dataset)[: job.spec.limit]
        ids = [sample.id for sample in samples if sample.id is not None]
        other.ask(ids)
        digests = [digest(sample) for sample in samples]
        with refused(f"The task {job.spec.task!r} cannot be planned"):
            log = eval(
                task,
                **options(job, subject),
                limit=job.spec.limit,
                fail_on_error=job.spec.fail_on_error,
                continue_on_fail=job.spec.continue_on_fail,
                run_samples=False,
            )[0]
        check_arguments(job.spec, task, log.eval.task_args_passed)
        for _ in range(_loads_to_tell(len(ids))):
            _refuse_other_samples(job.spec, ids, digests, other.answer(seconds))
            if time.monotonic() - began > _TELLING + 2 * seconds:
                break
            other.ask(ids)
    planned = log.eval.dataset.sample_ids or []
    config = log.eval.config
    epochs = config.epochs or 1
    known = len(planned) * epochs if task.sample_source is None else None
    limit = error_limit(config.fail_on_error, known, continue_on_fail=config.continue_on_fail)
    out.send(
        Planned(
            task=task.name,
            samples=tuple(SampleRef(id=id, epoch=epoch) for epoch in range(1, epochs + 1) for id in planned),
            digests=tuple(digests) if len(planned) == len(digests) else (),
            whole=subject.whole,
            log=Path(log.location).name,
            error_limit=limit,
            task_version=str(task.version),
        )
    )


def _numbered(task: Task) -> Dataset:
    number(task.dataset)
    return task.dataset


def _refuse_other_samples(spec: Spec, ids: Sequence[int | str], digests: Sequence[int], again: Pairs | None) -> None:
    """`again`: what loading the task in another process gave for these ids; None: nothing can be said."""
    if again is None:
        return
    for place, (id, known) in enumerate(zip(ids, digests, strict=True), start=1):
        found = again.get(id_digest(id))
        if found is None:
            raise refusal(
                f"The task {spec.task!r} gives its samples other ids each time it is loaded (sample {place} was"
                f" {shown(id)} now), so no two processes would mean the same samples. {REMEDY}"
            )
        if found != known:
            raise refusal(
                f"The task {spec.task!r} gives another sample {shown(id)} each time it is loaded, so no two processes would"
                f" mean the same sample. {REMEDY}"
            )


def _loads_to_tell(samples: int) -> int:
    """How often an unseeded shuffle must come out the same for that to be less likely than one in ten thousand; but no
    more than five times: a run looks at its own samples too."""
    return min(5, math.ceil(math.log(1e4) / max(math.lgamma(samples + 1), 0.1))) if samples else 0

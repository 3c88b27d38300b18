"""Runs exactly the samples it is given, as they would run in one whole evaluation."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval_set, task_with
from inspect_ai.dataset import Dataset, MemoryDataset, Sample
from inspect_ai.log import EvalError, EvalLog, EvalSpec, read_eval_log_sample, read_eval_log_sample_summaries
from inspect_ai.scorer import SampleScore
from inspect_ai.util import EarlyStop
from pydantic import JsonValue

from app.addresses import folder_for_inspect, task_name
from app.runner import hooks
from app.runner.checkpoint import configure, wind_down
from app.runner.costs import price_models
from app.runner.failures import recorded_failure, refusal
from app.runner.messages import LOGS, Failure, Job, Prepared, SampleRef
from app.runner.resolve import Subject, check_sandbox, resolve, retries
from app.runner.results import scorer_names
from app.runner.same import check_same, shown
from app.runner.writer import Writer


def run(job: Job, out: Writer) -> Failure | None:
    """Called again in a folder that holds an interrupted attempt's log and checkpoints, it resumes there."""
    wind_down.listen()
    subject = resolve(job.spec)
    price_models(job, subject)
    name_logs(subject.task)
    check_sandbox(job.spec, subject.task, job.containment)
    if job.digests:
        number(subject.task.dataset)
        planned = zip(job.samples, job.digests, strict=True)
        check_same(subject.task, {sample.id: known for sample, known in planned})
    task = subject.task if subject.whole else only(subject.task, job.samples, job.scored)
    checkpoints = configure(job.spec, task)
    told = hooks.register(out, Path(job.directory, LOGS), scorer_names(subject.task.scorer))
    out.send(
        Prepared(no_checkpoints=checkpoints.none_because, task_version=str(subject.task.version), whole=subject.whole)
    )
    _, logs = eval_set(
        task,
        **options(job, subject),
        checkpoint=checkpoints.config,
        limit=job.spec.limit if subject.whole else None,
        fail_on_error=False,  # the report applies the spec's policy, to all samples together
        retry_on_error=job.spec.retry_on_error,
        retry_attempts=0,  # the ledger counts the failures
        log_buffer=1,  # each sample is in the log before it is reported
    )
    _tell_the_rest(logs, told)
    told.finish()
    return _verdict(job, subject, logs)


def _tell_the_rest(logs: Sequence[EvalLog], told: hooks.Told) -> None:
    """Samples that had ended before an interruption are in the log, but nothing ends a second time; and what goes wrong in
    a hook is swallowed."""
    for log in logs:
        for ended in read_eval_log_sample_summaries(log.location):
            ref = SampleRef(id=ended.id, epoch=ended.epoch)
            if ended.completed and ref not in told.samples:
                told.ended(read_eval_log_sample(log.location, ended.id, ended.epoch))


def options(job: Job, subject: Subject) -> dict[str, Any]:
    """What `eval` and `eval_set` are given alike, so that a run's log says the same as the plan's."""
    spec = job.spec
    return {
        "model": subject.model,
        "model_roles": dict(subject.roles),
        "sandbox": spec.sandbox,
        "epochs": spec.epochs,
        "message_limit": spec.message_limit,
        "token_limit": spec.token_limit,
        "time_limit": spec.time_limit,
        "working_limit": spec.working_limit,
        "cost_limit": spec.cost_limit,
        **retries(spec),
        "tags": [f"{key}:{value}" for key, value in spec.tags.items()] or None,
        "metadata": _metadata(job),
        "log_dir": folder_for_inspect(Path(job.directory, LOGS)),
        "log_format": "eval",
        "log_realtime": False,
        "display": "none",
        "ctl_server": False,
        "score_display": False,  # metrics after each sample, for nobody to see
    }


def name_logs(task: Task) -> None:
    """Inspect names a log's file after its task, whatever is in that name or however long it is."""
    os.environ["INSPECT_EVAL_LOG_FILE_PATTERN"] = f"{task_name(task.name)}_{{id}}"


def _metadata(job: Job) -> dict[str, Any]:
    """What the log says of how it came about. No part of what tells tasks apart: a later attempt may resume the log."""
    metadata = {"evaluation_id": job.evaluation_id, "execution_id": job.execution_id, "attempt": job.attempt}
    return metadata if job.resumes is None else metadata | {"resumes_attempt": job.resumes}


class _Only:
    """Inspect's `EarlyStopping`: skips every epoch but those asked for. The number of epochs stays the task's own, for
    reducers, caches and `state.epoch` depend on it."""

    def __init__(self, samples: Collection[SampleRef]) -> None:
        self._samples = frozenset(samples)

    async def start_task(self, task: EvalSpec, samples: list[Sample], epochs: int) -> str:
        return "proctor"

    async def schedule_sample(self, id: str | int, epoch: int) -> EarlyStop | None:
        if SampleRef(id=id, epoch=epoch) in self._samples:
            return None
        return EarlyStop(id=id, epoch=epoch, reason="another execution's")

    async def complete_sample(self, id: str | int, epoch: int, scores: dict[str, SampleScore]) -> None:
        pass

    async def complete_task(self) -> dict[str, JsonValue]:
        return {}


def only(task: Task, samples: Sequence[SampleRef], scored: Collection[SampleRef] = ()) -> Task:
    """The task with just these samples, of which `scored` are skipped. Not `sample_id=`, which is a pattern and a
    selector: "007" would also run 7."""
    number(task.dataset)
    wanted = {sample.id for sample in samples}
    chosen = [sample for sample in task.dataset if sample.id in wanted]
    missing = wanted - {sample.id for sample in chosen}
    if missing:
        raise refusal(
            f"The dataset of {task.name!r} has no sample {min(missing, key=str)!r} any more: it must give the same"
            " samples each time the task is loaded."
        )
    dataset = MemoryDataset(
        chosen, name=task.dataset.name, location=task.dataset.location, shuffled=task.dataset.shuffled
    )
    return task_with(task, dataset=dataset, early_stopping=_Only(frozenset(samples) - frozenset(scored)))


def number(dataset: Dataset) -> None:
    """Gives samples without an id the one that Inspect would: their place in the dataset, from 1."""
    for place, sample in enumerate(dataset, start=1):
        if sample.id is None:
            sample.id = place


def _verdict(job: Job, subject: Subject, logs: Sequence[EvalLog]) -> Failure | None:
    """Only logs can be trusted: after an interruption `eval_set` has returned success and no logs at all."""
    if len(logs) != 1 or logs[0].status not in ("success", "error"):
        return interrupted()
    log = logs[0]
    missing = _wanted(job, subject, log) - _ended(log)
    if log.status == "success" and missing:
        sample = min(missing, key=lambda one: (one.epoch, str(one.id)))
        message = f"Inspect ended the run without a result of sample {shown(sample.id)}, epoch {sample.epoch}."
        return Failure(error_class="infrastructure", message=message)
    if log.status == "success" or not (missing or subject.whole):
        return None  # what failed after them, such as a metric that cannot be computed from so few, is not their fault
    error = log.error or EvalError(message="Inspect gives no reason.", traceback="", traceback_ansi="")
    return recorded_failure(error)


def _wanted(job: Job, subject: Subject, log: EvalLog) -> set[SampleRef]:
    """The samples that must have ended: not those that the task has left out, where it stops early by itself, nor any that
    it makes as it goes."""
    if not subject.whole:
        return set(job.samples) - set(job.scored)
    stopping = log.results.early_stopping if log.results else None
    if subject.task.sample_source is not None or stopping is None:
        return set()
    return set(job.samples) - {SampleRef(id=stop.id, epoch=stop.epoch) for stop in stopping.early_stops}


def _ended(log: EvalLog) -> set[SampleRef]:
    ended = read_eval_log_sample_summaries(log.location)
    return {SampleRef(id=sample.id, epoch=sample.epoch) for sample in ended if sample.completed}


def interrupted() -> Failure:
    return Failure(error_class="cancelled", message="It was interrupted.")

"""Puts an evaluation's samples together again: its metrics, and one log of all of them.

Both come out as one whole evaluation by Inspect would have given them: the plan's log is its header, the samples lie in
the same order, and the metrics are computed by Inspect.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from inspect_ai.log import (
    EvalError,
    EvalLog,
    EvalSample,
    EvalStats,
    read_eval_log,
)
from inspect_ai.model import ModelUsage

from app.addresses import file_name, readable, task_name
from app.runner import values
from app.runner.checkpoint import wind_down
from app.runner.error_policy import exceeded
from app.runner.gather import Gathering
from app.runner.hooks import as_json, usage_by_model
from app.runner.merge import save
from app.runner.messages import SLIM_BECAUSE, Failure, Job, Reported, SampleRef, Transcript
from app.runner.resolve import Subject, resolve
from app.runner.results import compute
from app.runner.run import number
from app.runner.same import check_same
from app.runner.writer import Writer


def report(job: Job, out: Writer) -> None:
    assert job.plan_log is not None, "a plan that failed has nothing to report"
    subject = resolve(job.spec)  # the task's own metrics have to be known to Inspect
    number(subject.task.dataset)
    check_same(subject.task, {t.sample.id: t.digest for t in job.transcripts if t.digest is not None})
    wind_down.listen()
    gathering = Gathering(job, out)
    gathering.gather()
    log = read_eval_log(readable(job.plan_log), header_only=True, format="eval")
    log.samples = _in_order(gathering.samples.values(), log)
    _summarise(log, _header(job.transcripts), subject, gathering.values)
    _tell_of_unreadable(log, gathering.unreadable)
    name = _name(log)
    slim_because = save(log, gathering, name, Path(job.directory))
    assert log.results is not None
    failure = Failure(error_class="evaluation", message=log.error.message, final=True) if log.error else None
    results = as_json(log.results.model_dump(mode="json", exclude_none=True))
    assert isinstance(results, dict)
    if slim_because:
        results[SLIM_BECAUSE] = slim_because
    usage = usage_by_model(log.stats.model_usage)
    out.send(Reported(results=results, usage=usage, failure=failure, log=name))


def _name(log: EvalLog) -> str:
    """As Inspect names its logs."""
    return f"{file_name(log.eval.created)}_{task_name(log.eval.task)}_{file_name(log.eval.task_id)}.eval"


def _summarise(log: EvalLog, part: EvalLog | None, subject: Subject, kept: Mapping[SampleRef, values.Values]) -> None:
    """Fills in everything but the samples. `part`: the header of one execution's log; of the only one, if the task is run
    whole."""
    assert log.samples is not None
    planned = len(log.eval.dataset.sample_ids or []) * (log.eval.config.epochs or 1)
    early_stopping = None
    if part is not None:
        log.plan = part.plan
        if subject.whole and part.results is not None:
            planned = part.results.total_samples
            early_stopping = part.results.early_stopping
    wrong = compute(log, subject.task, log.samples, kept, planned=planned, early_stopping=early_stopping)
    log.stats = _stats(log.samples)
    errors = sum(sample.error is not None for sample in log.samples)
    missing = 0 if subject.whole else planned - len(log.samples)
    message = _too_many_errors(log.eval.config.fail_on_error, errors, missing, planned)
    first = next((sample.error.message for sample in log.samples if sample.error), None)
    if message and first:
        message = f"{message} The first error: {first}"
    log.error = EvalError(message=message, traceback="", traceback_ansi="") if message else wrong
    log.status = "error" if log.error else "success"


def _tell_of_unreadable(log: EvalLog, unreadable: Mapping[SampleRef, str]) -> None:
    """Whatever the policy: the metrics would be those of fewer samples, and nobody would know."""
    if not unreadable:
        return
    sample, reason = next(iter(unreadable.items()))
    message = f"{len(unreadable)} samples have ended, but are lost: of {sample.id!r} (epoch {sample.epoch}), {reason}."
    before = f" {log.error.message}" if log.error else ""
    log.status, log.error = "error", EvalError(message=message + before, traceback="", traceback_ansi="")


def _too_many_errors(policy: bool | float | None, errors: int, missing: int, planned: int) -> str | None:
    """Inspect's `fail_on_error`, where samples that never ended count as errored ones."""
    failed = errors + missing
    if not exceeded(policy, failed, planned):
        return None
    never_ended = f" and {missing} never ended" if missing else ""
    rule = True if policy is None else policy
    return f"{errors} of {planned} samples errored{never_ended}; `fail_on_error` is {rule}."


def _stats(samples: Iterable[EvalSample]) -> EvalStats:
    """Counted from the samples, for a log's own statistics miss what earlier attempts at it have used."""
    stats = EvalStats()
    for sample in samples:
        _add(stats.model_usage, sample.model_usage)
        _add(stats.role_usage, sample.role_usage)
    stats.started_at = min((sample.started_at for sample in samples if sample.started_at), default="")
    stats.completed_at = max((sample.completed_at for sample in samples if sample.completed_at), default="")
    return stats


def _add(total: dict[str, ModelUsage], used: Mapping[str, ModelUsage]) -> None:
    for name, usage in used.items():
        total[name] = total[name] + usage if name in total else usage


def _header(transcripts: Iterable[Transcript]) -> EvalLog | None:
    """Of the first log that can be read."""
    for log in dict.fromkeys(transcript.log for transcript in transcripts):
        with suppress(Exception):
            return read_eval_log(readable(log), header_only=True)
    return None


def _in_order(samples: Iterable[EvalSample], plan: EvalLog) -> list[EvalSample]:
    """That of a whole evaluation: epoch by epoch, in the dataset's order; what the plan does not know, last."""
    places = {id: place for place, id in enumerate(plan.eval.dataset.sample_ids or [])}
    return sorted(samples, key=lambda sample: (sample.epoch, places.get(sample.id, len(places))))

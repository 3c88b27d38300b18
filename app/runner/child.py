"""One attempt at one execution, in a process of its own: Inspect runs here, and only here.

The child knows nothing of the database or the queue. It gets a `Job`, works in the job's folder and tells what happens.
"""

import os
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

from app.prices import Prices
from app.runner.failures import Refused, failure
from app.runner.messages import Done, Failure, Job, Started, Waiting
from app.runner.plan import plan
from app.runner.report import report
from app.runner.run import interrupted, run
from app.runner.sandbox import contain
from app.runner.tolerance import tolerate
from app.runner.writer import Writer
from app.versions import PRICES


def main(job: Job, out: Writer) -> None:
    """`Done` is always the last message, whatever happens before."""
    _bound(job.containment.child_memory)
    tolerate()
    limits = job.containment.limits.lowered(job.spec.sandbox_limits)
    contain(job.containment.model_copy(update={"limits": limits}), waiting=lambda: out.send(Waiting()))
    out.send(Started(pid=os.getpid(), versions=_versions(job)))
    out.send(Done(failure=_attempt(job, out)))


def _attempt(job: Job, out: Writer) -> Failure | None:
    try:
        match job.kind:
            case "plan":
                plan(job, out)
            case "run":
                return run(job, out)
            case "report":
                report(job, out)
    except Refused as refused:
        return refused.failure
    except KeyboardInterrupt:
        return interrupted()
    except Exception as error:
        return failure(error, f"The {job.kind} failed", "evaluation")
    return None


def _bound(memory: int | None) -> None:
    """A child that wants too much gets a MemoryError of its own, before the kernel chooses whom to kill."""
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _versions(job: Job) -> dict[str, str]:
    """Of the packages that decide what a result means; the task's own among them, if it has one."""
    found = {"python": sys.version.split()[0]}
    for package in ("proctor", "inspect_ai", job.spec.task.partition("/")[0]):
        try:
            found[package] = version(package)
        except (PackageNotFoundError, ValueError):
            continue
    return found | {PRICES: Prices(job.prices).source()}

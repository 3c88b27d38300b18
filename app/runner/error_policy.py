"""Inspect's `fail_on_error`: how many errored samples an evaluation may have. Its meaning is that of the installed version,
`inspect_ai._eval.task.error._should_eval_fail`: what is below 1 is a share of all samples, what is not is a count, and 1.0
is the count 1, whatever its type."""

import math


def exceeded(policy: bool | float | None, errors: int, samples: int) -> bool:
    """`samples`: all, times epochs."""
    if policy is None or policy is True:
        return errors > 0
    if policy is False:
        return False
    return errors >= (policy * samples if policy < 1 else policy)


def error_limit(policy: bool | float | None, samples: int | None, *, continue_on_fail: bool | None) -> int | None:
    """The errored samples at which no further sample starts; None: they all run, whatever becomes of them. `samples`: all,
    times epochs; None: nobody knows yet, so a share of them is for the report to find out."""
    if policy is False or continue_on_fail:
        return None
    if policy is None or policy is True:
        return 1
    if policy >= 1:
        return math.ceil(policy)
    return max(1, math.ceil(policy * samples)) if samples is not None else None

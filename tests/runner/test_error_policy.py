"""`fail_on_error` means what it means to the installed Inspect."""

from itertools import product

import pytest
from inspect_ai._eval.task.error import SampleErrorHandler, _should_eval_fail

from app.runner.error_policy import error_limit, exceeded

POLICIES = [None, True, False, 0, 0.0, 0.1, 0.3, 1 / 3, 0.5, 0.999, 1, 1.0, 1.5, 2, 7.0]
SAMPLES = [1, 2, 3, 7, 10, 30]


@pytest.mark.parametrize(("policy", "samples"), list(product(POLICIES, SAMPLES)))
def test_an_evaluation_fails_when_inspect_fails_it(policy: bool | float | None, samples: int) -> None:
    for errors in range(samples + 1):
        assert exceeded(policy, errors, samples) == _should_eval_fail(errors, samples, policy)


@pytest.mark.parametrize(("policy", "samples"), list(product(POLICIES, SAMPLES)))
def test_it_stops_at_the_error_at_which_inspect_raises(policy: bool | float | None, samples: int) -> None:
    handler = SampleErrorHandler(policy, samples)
    raised = [n for n in range(1, samples + 1) if handler(RuntimeError())[1] is not None]
    limit = error_limit(policy, samples, continue_on_fail=None)
    assert raised == [n for n in range(1, samples + 1) if limit is not None and n >= limit]


def test_a_share_of_nobody_knows_how_many_stops_nothing() -> None:
    assert error_limit(0.5, None, continue_on_fail=None) is None
    assert error_limit(2, None, continue_on_fail=None) == 2
    assert error_limit(True, 9, continue_on_fail=True) is None

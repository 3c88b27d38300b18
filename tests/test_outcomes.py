"""What an attempt came to, from what its child has said."""

from uuid import uuid4

from app.ledger import Claim
from app.outcomes import Heard, ran
from app.runner.messages import Failure, SampleRef, SampleResult
from app.spec import Spec

SAMPLES = (SampleRef(id="a", epoch=1), SampleRef(id="b", epoch=1))
CLAIM = Claim(
    execution_id="e.1",
    evaluation_id=uuid4(),
    kind="run",
    verdict="claimed",
    state="pending",
    attempt=1,
    crashes=0,
    failures=0,
    holder=None,
    lease_left=None,
    cancel=False,
    spec=Spec(task="a/b", model="mockllm/model"),
    samples=SAMPLES,
    error=None,
)


def _heard(*ended: SampleRef, **more: object) -> Heard:
    heard = Heard(samples=[(SampleResult(sample=sample, log="a.eval"), "file:///a.eval") for sample in ended])
    for name, value in more.items():
        setattr(heard, name, value)
    return heard


def test_a_run_has_succeeded_only_when_each_wanted_sample_has_its_result() -> None:
    assert ran(CLAIM, _heard(*SAMPLES), SAMPLES).outcome == "succeeded"
    lacking = ran(CLAIM, _heard(SAMPLES[0]), SAMPLES)
    assert lacking.outcome == "failed"
    assert lacking.error is not None
    assert (lacking.error.error_class, "'b'" in lacking.error.message) == ("infrastructure", True)
    assert lacking.max_failures == CLAIM.spec.max_failures, "it is tried again"


def test_a_task_that_stops_early_need_not_end_every_sample_and_its_results_stand_together() -> None:
    settlement = ran(CLAIM, _heard(SAMPLES[0], whole=True), SAMPLES)
    assert (settlement.outcome, settlement.replace) == ("succeeded", True)


def test_a_run_that_did_not_finish_replaces_nothing() -> None:
    broken = Failure(error_class="evaluation", message="It cannot be loaded.", final=True)
    settlement = ran(CLAIM, _heard(whole=True, failure=broken), SAMPLES)
    assert (settlement.outcome, settlement.replace) == ("failed", False)

from pathlib import Path

import pytest
from anyio import to_thread
from inspect_ai.log import read_eval_log_sample

from app.runner.messages import LOGS, Done, SampleRef
from tests.runner.conftest import Attempt, MakeJob, done, ended

pytestmark = pytest.mark.xdist_group("runner")


async def test_exactly_the_given_samples_run(attempt: Attempt, make_job: MakeJob) -> None:
    """Ids that Inspect's own `sample_id` would take for patterns, or for one another."""
    wanted = {SampleRef(id="a*", epoch=2), SampleRef(id="007", epoch=1), SampleRef(id="a[1]", epoch=3)}
    messages = await attempt(make_job("run", "many_faced", samples=tuple(wanted)))
    assert done(messages) == Done()
    assert {result.sample for result in ended(messages)} == wanted - {SampleRef(id="007", epoch=2)}


async def test_a_sample_is_in_the_log_it_names(attempt: Attempt, make_job: MakeJob) -> None:
    job = make_job("run", "simple", samples=(SampleRef(id=2, epoch=1),))
    (result,) = ended(await attempt(job))
    sample = await to_thread.run_sync(read_eval_log_sample, Path(job.directory, LOGS, result.log), 2, 1)
    assert sample.input == "question 1"


async def test_an_error_belongs_to_its_sample(attempt: Attempt, make_job: MakeJob) -> None:
    samples = (SampleRef(id="a[1]", epoch=2), SampleRef(id="ab", epoch=2))
    messages = await attempt(make_job("run", "many_faced", spec={"task_args": {"errors": True}}, samples=samples))
    assert done(messages) == Done()
    results = {result.sample.id: result for result in ended(messages)}
    error = results["a[1]"].error
    assert error is not None
    assert (error.error_class, error.final) == ("evaluation", False)
    assert "this sample fails" in error.message
    assert results["ab"].error is None


async def test_a_sample_that_meets_a_limit_says_which(attempt: Attempt, make_job: MakeJob) -> None:
    job = make_job("run", "simple", spec={"token_limit": 12}, samples=(SampleRef(id=1, epoch=1),))
    (result,) = ended(await attempt(job))
    assert (result.limit, result.error) == ("token", None)


async def test_not_a_number_becomes_null(attempt: Attempt, make_job: MakeJob) -> None:
    (result,) = ended(await attempt(make_job("run", "not_a_number", samples=(SampleRef(id="n", epoch=1),))))
    score = result.scores["undefined"]
    assert score.value is None
    assert len(score.explanation or "") == 2_000


async def test_what_is_long_in_a_score_is_cut_and_the_log_has_it_whole(attempt: Attempt, make_job: MakeJob) -> None:
    job = make_job("run", "says_much", samples=(SampleRef(id="n", epoch=1),))
    (result,) = ended(await attempt(job))
    score = result.scores["talkative"]
    assert score.answer == "é" * 1_999 + "…"
    assert isinstance(score.value, dict)
    assert score.value == {"words": f"{'é' * 1_988}…", "…": "2 more"}
    assert (score.explanation, score.cut) == ("short", ("value", "answer"))
    sample = await to_thread.run_sync(read_eval_log_sample, Path(job.directory, LOGS, result.log), "n", 1)
    assert sample.scores is not None
    whole = sample.scores["talkative"]
    assert (whole.answer, whole.value) == ("é" * 3_000, {"words": "é" * 3_000, "count": 1.5, "rest": "dropped"})


async def test_a_metric_that_needs_more_samples_does_not_fail_this_one(attempt: Attempt, make_job: MakeJob) -> None:
    messages = await attempt(make_job("run", "metric_of_two", samples=(SampleRef(id=1, epoch=1),)))
    assert done(messages) == Done()
    assert len(ended(messages)) == 1


async def test_a_sample_that_is_gone_is_refused(attempt: Attempt, make_job: MakeJob) -> None:
    failure = done(await attempt(make_job("run", "simple", samples=(SampleRef(id="9", epoch=1),)))).failure
    assert failure is not None
    assert failure.final
    assert "no sample '9' any more" in failure.message


async def test_a_task_that_stops_early_does_so_when_run_whole(attempt: Attempt, make_job: MakeJob) -> None:
    everything = tuple(SampleRef(id=id, epoch=1) for id in (1, 2, 3, 4))
    messages = await attempt(make_job("run", "stops_early", samples=everything))
    assert done(messages) == Done()
    assert len(ended(messages)) == 2

"""How fast the emulator pushes and how long it waits: the rules exactly, and each once live."""

from datetime import UTC, datetime, timedelta

import anyio
import pytest
from google.cloud import tasks_v2

from app.local.dispatcher import spent
from app.local.queue_pacing import (
    EASING_SECONDS,
    ERROR_WINDOW,
    FLOOR_RATE,
    SETTLING_SECONDS,
    SLOW_RATE,
    Pace,
    backoff,
    burst_size,
)
from tests.local.conftest import QUEUE, Bench, ms


def pauses(minimum: float, maximum: float, doublings: int, count: int) -> list[float]:
    return [backoff(failures, minimum, maximum, doublings) for failures in range(1, count + 1)]


def test_backoff_doubles_then_grows_linearly_then_stays_at_the_maximum() -> None:
    """The example in Google's documentation of `max_doublings`."""
    assert pauses(10, 300, 3, 8) == [10, 20, 40, 80, 160, 240, 300, 300]


def test_backoff_without_doublings_is_linear_and_with_many_only_doubles() -> None:
    assert pauses(5, 60, 0, 4) == [5, 10, 15, 20]
    assert pauses(5, 60, 4, 6) == [5, 10, 20, 40, 60, 60]
    assert backoff(10**6, 0.1, 3600, 16) == 3600
    assert backoff(10**6, 0.1, 3600, 2**31 - 1) == 3600


@pytest.mark.parametrize(("rate", "burst"), [(500, 100), (100, 20), (51, 11), (5, 10), (0.25, 10)])
def test_the_burst_follows_from_the_rate(rate: float, burst: int) -> None:
    assert burst_size(rate) == burst


def drain(pace: Pace, now: float) -> int:
    taken = 0
    while pace.delay(now) == 0:
        pace.take()
        taken += 1
    return taken


def test_a_token_bucket_gives_its_burst_then_the_rate() -> None:
    pace = Pace(50, now=0)
    assert drain(pace, 0) == 10
    assert pace.delay(0) == pytest.approx(1 / 50)
    assert drain(pace, 0.1) == 5
    assert drain(pace, 1000) == 10


def test_a_lower_rate_applies_at_once() -> None:
    pace = Pace(500, now=0)
    pace.change(5, now=0)
    assert drain(pace, 0) == 10
    assert pace.delay(0) == pytest.approx(0.2)


@pytest.mark.parametrize("status", [429, 503])
def test_429_and_503_slow_the_queue_down_and_it_recovers(status: int) -> None:
    pace = Pace(500, now=0)
    pace.heard(status, True, now=0)
    assert pace.rate == SLOW_RATE
    assert pace.delay(0) == pytest.approx(1 / SLOW_RATE)
    rates = [pace.rate for step in range(8) if pace.delay(EASING_SECONDS * step) >= 0]
    assert rates == [8, 16, 32, 64, 128, 256, 500, 500]
    assert drain(pace, 100) == burst_size(500)


def test_answers_to_pushes_sent_before_a_slow_down_do_not_slow_further() -> None:
    pace = Pace(500, now=0)
    for _ in range(100):
        pace.heard(503, True, now=0.1)
    assert pace.rate == SLOW_RATE
    pace.heard(503, True, now=0.1 + SETTLING_SECONDS)
    assert pace.rate == SLOW_RATE / 2


def test_a_slowed_queue_keeps_a_least_rate() -> None:
    pace, slow = Pace(500, now=0), Pace(FLOOR_RATE / 2, now=0)
    for step in range(50):
        for each in (pace, slow):
            each.heard(503, True, now=step * SETTLING_SECONDS * 1.01)
    assert pace.rate == FLOOR_RATE
    assert slow.rate == FLOOR_RATE / 2


def test_a_high_rate_of_errors_slows_the_queue_down_and_a_low_one_does_not() -> None:
    healthy, failing = Pace(500, now=0), Pace(500, now=0)
    for number in range(ERROR_WINDOW):
        healthy.heard(500, number % 2 == 0, now=0)
        assert failing.rate == 500
        failing.heard(500, number % 2 == 0 or number == 1, now=0)
    assert healthy.rate == 500
    assert failing.rate == SLOW_RATE


@pytest.mark.parametrize(
    ("attempts", "duration", "tried", "seconds", "given_up"),
    [
        (3, 0, 2, 1000, False),
        (3, 0, 3, 0, True),
        (3, 10, 3, 9, False),
        (3, 10, 2, 11, False),
        (3, 10, 3, 10, True),
        (-1, 0, 10**6, 10**6, False),
        (-1, 10, 1, 9, False),
        (-1, 10, 1, 10, True),
    ],
)
def test_a_task_is_given_up_when_every_limit_is_spent(
    attempts: int, duration: int, tried: int, seconds: int, given_up: bool
) -> None:
    first = datetime(2026, 1, 1, tzinfo=UTC)
    task = tasks_v2.Task.pb(tasks_v2.Task(dispatch_count=tried, first_attempt={"dispatch_time": first}))
    retry = tasks_v2.RetryConfig(max_attempts=attempts, max_retry_duration=timedelta(seconds=duration))
    assert spent(task, tasks_v2.RetryConfig.pb(retry), first + timedelta(seconds=seconds)) is given_up


async def test_a_queue_pushes_no_faster_than_its_rate(bench: Bench) -> None:
    await bench.queue(rate_limits={"max_dispatches_per_second": 50})
    await bench.client.pause_queue(name=QUEUE)
    for _ in range(15):
        await bench.task()
    before = datetime.now(UTC)  # the first push is noted a little after it was allowed
    await bench.client.resume_queue(name=QUEUE)
    await bench.idle()
    began = sorted(record.began for record in bench.emulator.records)
    assert began[14] - before >= ms(5 / 50 * 1000 - 2)


async def test_a_queue_pushes_no_more_at_once_than_it_may(bench: Bench) -> None:
    await bench.queue(rate_limits={"max_concurrent_dispatches": 2})
    bench.target.gate = anyio.Event()
    for _ in range(6):
        await bench.task()
    await bench.target.wait(2)
    bench.target.gate.set()
    await bench.idle()
    assert len(bench.target.received) == 6
    assert bench.target.most_under_way == 2


async def test_retry_after_puts_the_retry_off(bench: Bench) -> None:
    await bench.queue(retry_config={"min_backoff": ms(1), "max_backoff": ms(1)})
    bench.target.answers = ["500 Error\r\nRetry-After: 1"]
    await bench.task()
    await bench.idle()
    first, second = bench.emulator.records
    assert second.began - first.ended >= ms(998)


@pytest.mark.parametrize("status", [429, 503])
async def test_one_tasks_429_or_503_holds_up_the_whole_queue(bench: Bench, status: int) -> None:
    await bench.queue(retry_config={"min_backoff": ms(1), "max_backoff": ms(1)})
    bench.target.answers = [status]
    await bench.task("first")
    await bench.records(1)
    await bench.task("second")
    await bench.idle()
    first, *later = bench.emulator.records
    assert len(later) == 2
    assert all(record.began - first.ended >= ms(1000 / SLOW_RATE - 2) for record in later)


async def test_every_one_of_many_tasks_is_pushed_once(bench: Bench) -> None:
    await bench.queue()
    async with anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(bench.task, f"t{number}")
    await bench.idle()
    names = [request.headers["X-CloudTasks-TaskName"] for request in bench.target.received]
    assert sorted(names) == sorted(f"t{number}" for number in range(200))

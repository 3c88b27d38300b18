"""The emulator's queues, through the real async client."""

from datetime import timedelta
from typing import Any

import pytest
from google.api_core import exceptions
from google.cloud import tasks_v2
from google.protobuf.field_mask_pb2 import FieldMask

from tests.local.conftest import LOCATION, QUEUE, Bench, OpenBench

State = tasks_v2.Queue.State


async def test_a_queue_has_the_real_services_defaults(bench: Bench) -> None:
    queue = await bench.queue()
    assert queue.state == State.RUNNING
    assert queue.rate_limits == tasks_v2.RateLimits(
        max_dispatches_per_second=500, max_burst_size=100, max_concurrent_dispatches=1000
    )
    assert queue.retry_config == tasks_v2.RetryConfig(
        max_attempts=100,
        max_doublings=16,
        min_backoff=timedelta(milliseconds=100),
        max_backoff=timedelta(hours=1),
    )
    assert await bench.client.get_queue(name=QUEUE) == queue


async def test_burst_size_is_output_only(bench: Bench) -> None:
    queue = await bench.queue(rate_limits={"max_dispatches_per_second": 1, "max_burst_size": 77})
    assert queue.rate_limits.max_burst_size == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_limits": {"max_dispatches_per_second": -1}}, "RateLimits.maxDispatchesPerSecond cannot be negative."),
        (
            {"rate_limits": {"max_dispatches_per_second": 501}},
            "RateLimits.maxDispatchesPerSecond must be less than or equal to 500.",
        ),
        ({"rate_limits": {"max_concurrent_dispatches": -1}}, "RateLimits.maxConcurrentDispatches cannot be negative."),
        (
            {"rate_limits": {"max_concurrent_dispatches": 5001}},
            "RateLimits.maxConcurrentDispatches must be less than or equal to 5000.",
        ),
        ({"retry_config": {"max_attempts": -2}}, "RetryConfig.maxAttempts must be greater or equal to -1."),
        ({"retry_config": {"max_doublings": -1}}, "RetryConfig.maxDoublings cannot be negative."),
        ({"retry_config": {"min_backoff": timedelta(seconds=-1)}}, "RetryConfig.minBackoff cannot be negative."),
        ({"retry_config": {"max_backoff": timedelta(seconds=-1)}}, "RetryConfig.maxBackoff cannot be negative."),
        (
            {"retry_config": {"max_retry_duration": timedelta(seconds=-1)}},
            "RetryConfig.maxRetryDuration cannot be negative.",
        ),
        (
            {"retry_config": {"min_backoff": timedelta(seconds=2), "max_backoff": timedelta(seconds=1)}},
            "RetryConfig.minBackoff must be less than or equal to RetryConfig.maxBackoff.",
        ),
    ],
)
async def test_a_queue_beyond_the_limits_is_refused(bench: Bench, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(exceptions.InvalidArgument) as refused:
        await bench.queue(**settings)
    assert refused.value.message == message
    with pytest.raises(exceptions.NotFound):
        await bench.client.get_queue(name=QUEUE)


async def test_what_the_emulator_lacks_is_refused_rather_than_ignored(bench: Bench) -> None:
    with pytest.raises(exceptions.MethodNotImplemented, match=r"http_target"):
        await bench.queue(http_target={"http_method": "GET"})
    with pytest.raises(exceptions.MethodNotImplemented, match="filter"):
        await bench.client.list_queues(request={"parent": LOCATION, "filter": "state: PAUSED"})
    with pytest.raises(exceptions.MethodNotImplemented):
        await bench.client.get_iam_policy(request={"resource": QUEUE})


async def test_a_queue_name_must_be_well_formed_and_lie_in_its_parent(bench: Bench) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="Queue name must be formatted"):
        await bench.queue("evaluations")
    with pytest.raises(exceptions.InvalidArgument, match="must begin with"):
        await bench.queue("projects/other/locations/europe-west4/queues/evaluations")
    with pytest.raises(exceptions.InvalidArgument, match="Invalid resource field value"):
        await bench.client.create_queue(parent="nowhere", queue={"name": QUEUE})
    with pytest.raises(exceptions.InvalidArgument, match="Queue name must be formatted"):
        await bench.client.get_queue(name=f"{LOCATION}/queues/under_score")


async def test_a_missing_queue_is_not_found(bench: Bench) -> None:
    initialize = "wait at least a minute for the queue to initialize"
    for call in (bench.client.get_queue, bench.client.pause_queue, bench.client.resume_queue, bench.client.purge_queue):
        with pytest.raises(exceptions.NotFound, match=initialize):
            await call(name=QUEUE)
    with pytest.raises(exceptions.NotFound, match="Requested entity was not found"):
        await bench.client.delete_queue(name=QUEUE)
    with pytest.raises(exceptions.NotFound, match=initialize):
        await bench.task()


async def test_an_existing_queues_name_is_refused(bench: Bench) -> None:
    await bench.queue()
    with pytest.raises(exceptions.AlreadyExists, match="Queue already exists"):
        await bench.queue()


async def test_a_deleted_queues_name_stays_reserved(bench: Bench) -> None:
    await bench.queue()
    await bench.client.delete_queue(name=QUEUE)
    with pytest.raises(exceptions.FailedPrecondition, match="a queue with this name existed too recently"):
        await bench.queue()
    with pytest.raises(exceptions.FailedPrecondition):
        await bench.client.update_queue(queue={"name": QUEUE})
    with pytest.raises(exceptions.NotFound):
        await bench.client.get_queue(name=QUEUE)


async def test_how_long_a_queues_name_stays_reserved_can_be_set(open_bench: OpenBench) -> None:
    async with open_bench(queue_tombstone=timedelta()) as bench:
        await bench.queue()
        await bench.task("first")
        await bench.client.delete_queue(name=QUEUE)
        await bench.queue()
        assert [task async for task in await bench.client.list_tasks(parent=QUEUE)] == []
        with pytest.raises(exceptions.AlreadyExists):
            await bench.task("first")


async def test_queues_are_listed_page_by_page_and_by_location(bench: Bench) -> None:
    names = [f"{LOCATION}/queues/q{number}" for number in range(5)]
    for name in reversed(names):
        await bench.queue(name)
    await bench.client.create_queue(parent=f"{LOCATION}1", queue={"name": f"{LOCATION}1/queues/elsewhere"})
    pager = await bench.client.list_queues(request={"parent": LOCATION, "page_size": 2})
    pages = [[queue.name for queue in page.queues] async for page in pager.pages]
    assert pages == [names[:2], names[2:4], names[4:]]


async def test_pause_and_resume_set_the_state(bench: Bench) -> None:
    await bench.queue()
    assert (await bench.client.pause_queue(name=QUEUE)).state == State.PAUSED
    assert (await bench.client.get_queue(name=QUEUE)).state == State.PAUSED
    assert (await bench.client.resume_queue(name=QUEUE)).state == State.RUNNING


async def test_a_paused_queue_takes_tasks_and_pushes_them_once_resumed(bench: Bench) -> None:
    await bench.queue()
    await bench.client.pause_queue(name=QUEUE)
    name = await bench.task()
    assert (await bench.client.get_task(name=name)).dispatch_count == 0
    await bench.client.resume_queue(name=QUEUE)
    await bench.idle()
    assert len(bench.target.received) == 1


async def test_purge_deletes_every_task_and_notes_when(bench: Bench) -> None:
    await bench.queue()
    await bench.client.pause_queue(name=QUEUE)
    for number in range(3):
        await bench.task(f"task-{number}")
    queue = await bench.client.purge_queue(name=QUEUE)
    assert "purge_time" in queue
    assert [task async for task in await bench.client.list_tasks(parent=QUEUE)] == []


async def test_update_changes_only_what_the_mask_names(bench: Bench) -> None:
    await bench.queue(retry_config={"max_attempts": 7}, rate_limits={"max_concurrent_dispatches": 3})
    queue = await bench.client.update_queue(
        queue={
            "name": QUEUE,
            "state": State.PAUSED,
            "retry_config": {"max_attempts": 9, "max_doublings": 1},
            "rate_limits": {"max_dispatches_per_second": 100, "max_burst_size": 1, "max_concurrent_dispatches": 8},
        },
        update_mask=FieldMask(
            paths=["state", "retry_config.max_attempts", "rate_limits.max_dispatches_per_second", "name"]
        ),
    )
    assert queue == await bench.client.get_queue(name=QUEUE)
    assert queue.state == State.RUNNING
    assert (queue.retry_config.max_attempts, queue.retry_config.max_doublings) == (9, 16)
    assert queue.rate_limits == tasks_v2.RateLimits(
        max_dispatches_per_second=100, max_burst_size=20, max_concurrent_dispatches=3
    )


async def test_update_without_a_mask_changes_every_field(bench: Bench) -> None:
    await bench.queue(retry_config={"max_attempts": 7}, rate_limits={"max_concurrent_dispatches": 3})
    await bench.client.pause_queue(name=QUEUE)
    queue = await bench.client.update_queue(queue={"name": QUEUE, "retry_config": {"max_attempts": -1}})
    assert queue.state == State.PAUSED
    assert queue.retry_config.max_attempts == -1
    assert queue.rate_limits.max_concurrent_dispatches == 1000


async def test_update_creates_a_missing_queue(bench: Bench) -> None:
    queue = await bench.client.update_queue(queue={"name": QUEUE, "retry_config": {"max_attempts": 4}})
    assert (queue.state, queue.retry_config.max_attempts) == (State.RUNNING, 4)


async def test_a_refused_update_changes_nothing(bench: Bench) -> None:
    before = await bench.queue()
    with pytest.raises(exceptions.InvalidArgument):
        await bench.client.update_queue(queue={"name": QUEUE, "rate_limits": {"max_dispatches_per_second": 501}})
    with pytest.raises(exceptions.InvalidArgument, match="no field 'retries'"):
        await bench.client.update_queue(queue={"name": QUEUE}, update_mask=FieldMask(paths=["retries"]))
    assert await bench.client.get_queue(name=QUEUE) == before

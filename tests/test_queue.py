"""Cloud Tasks made from due executions: the real client against the emulator."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import uuid4

import grpc
import pytest
from google.api_core.exceptions import RetryError
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport
from sqlalchemy import text

from app.database.session import Database
from app.evaluations.submit import Submissions
from app.ledger import Enqueue, Ledger, Settlement
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.stack import create_queues
from app.queue import Queue, enqueue, enqueue_due, open_queue, task_id
from app.runner.messages import SampleRef
from app.settings import Settings
from app.spec import Spec

SPEC = Spec(task="t", model="m")


@pytest.fixture
async def emulated(settings: Settings) -> AsyncIterator[Settings]:
    async with CloudTasksEmulator() as emulator:
        emulated = settings.model_copy(
            update={
                "queue_endpoint": emulator.endpoint,
                "queue_service_account": "pusher@project.iam.gserviceaccount.com",
                "service_url": "http://127.0.0.1:9",
                "queue_patience": 2.0,
                "allowed_queues": ("openai",),
            }
        )
        await create_queues(emulated, min_backoff=5)
        yield emulated


@pytest.fixture
async def client(emulated: Settings) -> AsyncIterator[tasks_v2.CloudTasksAsyncClient]:
    assert emulated.queue_endpoint
    async with grpc.aio.insecure_channel(emulated.queue_endpoint) as channel:
        client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
        await client.pause_queue(name=emulated.queue)  # what is created stays to be looked at
        yield client


@pytest.fixture
async def queue(emulated: Settings) -> AsyncIterator[Queue]:
    async with open_queue(emulated) as queue:
        yield queue


async def listed(client: tasks_v2.CloudTasksAsyncClient, settings: Settings) -> list[tasks_v2.Task]:
    request = tasks_v2.ListTasksRequest(parent=settings.queue, response_view=tasks_v2.Task.View.FULL)
    return [task async for task in await client.list_tasks(request)]


async def test_a_cloud_task_carries_what_a_push_needs(
    queue: Queue, client: tasks_v2.CloudTasksAsyncClient, emulated: Settings
) -> None:
    await queue.create(Enqueue("e.1", 3))
    (task,) = await listed(client, emulated)
    assert task.name == f"{emulated.queue}/tasks/{task_id(Enqueue('e.1', 3))}"
    assert task.http_request.url == "http://127.0.0.1:9/tasks/execute"
    assert task.http_request.body == b'{"execution_id": "e.1"}'
    assert task.http_request.oidc_token.service_account_email == "pusher@project.iam.gserviceaccount.com"
    assert task.http_request.oidc_token.audience == "http://127.0.0.1:9"
    assert task.dispatch_deadline == timedelta(seconds=1800)


async def test_all_of_an_evaluation_waits_in_the_queue_that_its_spec_names(
    queue: Queue, client: tasks_v2.CloudTasksAsyncClient, emulated: Settings, ledger: Ledger
) -> None:
    own, named = emulated, emulated.model_copy(update={"queue": emulated.queue_called("openai")})
    await client.pause_queue(name=named.queue)
    submissions = Submissions(ledger, queue)
    evaluation = (await submissions.submit(SPEC.model_copy(update={"queue": "openai"}), "me")).evaluation_id
    for kind, settlement in (
        ("plan", Settlement("succeeded", runs=[[SampleRef(id=1, epoch=1)]])),
        ("1", Settlement("failed")),
    ):
        claim = await ledger.claim(f"{evaluation}.{kind}", uuid4())
        assert claim
        settled = await ledger.settle(claim.execution_id, claim.attempt, settlement)
        await enqueue_due(ledger, queue)
        if settled and settled.report:
            await enqueue(ledger, queue, [settled.report])
    assert await listed(client, own) == []
    pushed = [json.loads(task.http_request.body)["execution_id"] for task in await listed(client, named)]
    assert sorted(set(pushed)) == [f"{evaluation}.1", f"{evaluation}.plan", f"{evaluation}.report"]


def test_names_start_with_a_hash_and_are_the_same_each_time() -> None:
    first, second = task_id(Enqueue("e.1", 1)), task_id(Enqueue("e.2", 1))
    assert first == task_id(Enqueue("e.1", 1))
    assert first[:12] != second[:12]
    assert first.endswith("-e_1-1")


async def test_creating_the_same_one_again_is_as_good_as_once(
    queue: Queue, client: tasks_v2.CloudTasksAsyncClient, emulated: Settings
) -> None:
    for _ in range(3):
        await queue.create(Enqueue("e.1", 1))
    assert len(await listed(client, emulated)) == 1


async def test_what_fans_out_is_enqueued_in_bulk_and_left_alone_for_a_day(
    queue: Queue, client: tasks_v2.CloudTasksAsyncClient, emulated: Settings, ledger: Ledger, database: Database
) -> None:
    evaluation = (await ledger.submit(SPEC, "me")).evaluation_id
    claim = await ledger.claim(f"{evaluation}.plan", uuid4())
    assert claim
    runs = [[SampleRef(id=n, epoch=1)] for n in range(700)]  # more than a batch
    await ledger.settle(claim.execution_id, claim.attempt, Settlement("succeeded", runs=runs))

    assert await enqueue_due(ledger, queue) == 700
    assert await enqueue_due(ledger, queue) == 0
    assert len({t.name for t in await listed(client, emulated)}) == 700
    (row,) = await database.run(
        text(
            "SELECT min(sweep_at) > now() + interval '23 hours' AS late, min(enqueues) AS least, max(enqueues) AS most"
            " FROM task_executions WHERE kind = 'run'"
        )
    )
    assert tuple(row) == (True, 1, 1)


async def test_a_row_that_was_never_enqueued_is_found_by_the_sweeper(
    queue: Queue, client: tasks_v2.CloudTasksAsyncClient, emulated: Settings, ledger: Ledger, database: Database
) -> None:
    evaluation = (await ledger.submit(SPEC, "me")).evaluation_id
    assert await enqueue_due(ledger, queue) == 0  # for two minutes it is its submitter's
    await database.run(text("UPDATE task_executions SET sweep_at = now() - interval '1 second'"))
    assert await enqueue_due(ledger, queue) == 1
    (task,) = await listed(client, emulated)
    assert task.name.endswith(task_id(Enqueue(f"{evaluation}.plan", 2)))


async def test_a_purged_cloud_task_is_made_again_under_a_new_name(
    queue: Queue, client: tasks_v2.CloudTasksAsyncClient, emulated: Settings, ledger: Ledger, database: Database
) -> None:
    evaluation = (await ledger.submit(SPEC, "me")).evaluation_id
    await enqueue(ledger, queue, [Enqueue(f"{evaluation}.plan", 1)])
    await client.purge_queue(name=emulated.queue)
    await queue.create(Enqueue(f"{evaluation}.plan", 1))  # the name outlives the purge: no proof of a living task
    assert await listed(client, emulated) == []

    await ledger.all_due()
    assert await enqueue_due(ledger, queue) == 1
    assert len(await listed(client, emulated)) == 1


async def test_an_unreachable_queue_leaves_the_row_due_in_two_minutes(
    settings: Settings, ledger: Ledger, database: Database
) -> None:
    evaluation = (await ledger.submit(SPEC, "me")).evaluation_id
    nowhere = settings.model_copy(update={"queue_endpoint": "127.0.0.1:9", "queue_patience": 0.2})
    async with open_queue(nowhere) as queue:
        with pytest.raises(RetryError):
            await queue.create(Enqueue(f"{evaluation}.plan", 1))
        assert await enqueue(ledger, queue, [Enqueue(f"{evaluation}.plan", 1)]) == 0
        await ledger.all_due()
        assert await enqueue_due(ledger, queue) == 0
    (row,) = await database.run(
        text(
            "SELECT sweep_at BETWEEN now() + interval '1 min' AND now() + interval '2 min' AS soon FROM task_executions"
        )
    )
    assert row.soon

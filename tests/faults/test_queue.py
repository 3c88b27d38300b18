"""The relay's faults, as the real client sees them in front of the emulator."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport

from app.ledger import Enqueue
from app.local.cloud_tasks import CloudTasksEmulator
from app.queue import open_queue, task_id
from app.settings import load
from tests.faults.queue import Call, QueueRelay

LOCATION = "projects/proctor/locations/europe-west4"
QUEUE = f"{LOCATION}/queues/evaluations"
TASK: dict[str, Any] = {"name": f"{QUEUE}/tasks/a", "http_request": {"url": "http://127.0.0.1:9/"}}
ROUNDED = 0.01
"""Seconds to which gRPC rounds a deadline up on its way, if it is less than ten away."""
LOST = [
    (grpc.StatusCode.UNAVAILABLE, exceptions.ServiceUnavailable),
    (grpc.StatusCode.DEADLINE_EXCEEDED, exceptions.DeadlineExceeded),
]


@asynccontextmanager
async def client_of(endpoint: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        yield tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))


@pytest.fixture
async def direct() -> AsyncIterator[Any]:
    """A client past the relay, of an emulator whose queue is paused: what is created stays to be looked at."""
    async with CloudTasksEmulator() as emulator, client_of(emulator.endpoint) as client:
        client.endpoint = emulator.endpoint
        await client.create_queue(parent=LOCATION, queue={"name": QUEUE})
        await client.pause_queue(name=QUEUE)
        yield client


@pytest.fixture
async def relay(direct: Any) -> AsyncIterator[QueueRelay]:
    async with QueueRelay(direct.endpoint) as relay:
        yield relay


@pytest.fixture
async def client(relay: QueueRelay) -> AsyncIterator[Any]:
    async with client_of(relay.endpoint) as client:
        yield client


async def create(client: Any, **more: Any) -> Any:
    return await client.create_task(parent=QUEUE, task=TASK, **more)


async def created(direct: Any) -> list[str]:
    return [task.name.rpartition("/")[2] async for task in await direct.list_tasks(parent=QUEUE)]


async def test_every_call_passes_and_is_counted_by_its_method(relay: QueueRelay, client: Any, direct: Any) -> None:
    task = await create(client)
    assert task == await client.get_task(name=task.name) == await direct.get_task(name=task.name)
    assert [queue.name async for queue in await client.list_queues(parent=LOCATION)] == [QUEUE]
    queue = await client.update_queue(queue={"name": QUEUE, "retry_config": {"max_attempts": 7}})
    assert queue.retry_config.max_attempts == 7
    await client.delete_task(name=task.name)
    assert await created(direct) == []
    assert relay.calls == {"CreateTask": 1, "GetTask": 1, "ListQueues": 1, "UpdateQueue": 1, "DeleteTask": 1}


async def test_a_refusal_of_upstream_passes_word_for_word(client: Any, direct: Any) -> None:
    for call in ("get_task", "delete_task"):
        refusals = []
        for whose in (client, direct):
            with pytest.raises(exceptions.NotFound) as refused:
                await getattr(whose, call)(name=f"{QUEUE}/tasks/never")
            refusals.append(refused.value.message)
        assert refusals[0] == refusals[1] != ""
    with pytest.raises(exceptions.MethodNotImplemented):
        await client.get_iam_policy(request={"resource": QUEUE})


async def test_upstream_is_told_what_the_caller_says_beside_the_request() -> None:
    """The routing header is how the real service finds the queue's region."""
    told: list[dict[str, Any]] = []

    class Upstream(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs only
        def service(self, handler_call_details: Any) -> Any:
            told.append(dict(handler_call_details.invocation_metadata))
            return None

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Upstream(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with QueueRelay(f"127.0.0.1:{port}") as relay, client_of(relay.endpoint) as client:
        with pytest.raises(exceptions.MethodNotImplemented):
            await create(client)
    await server.stop(None)
    assert told[0]["x-goog-request-params"] == f"parent={QUEUE}"


async def test_a_refused_call_never_reaches_the_queue(relay: QueueRelay, client: Any, direct: Any) -> None:
    relay.refuse = True
    with pytest.raises(exceptions.ServiceUnavailable, match="refuse CreateTask"):
        await create(client)
    assert (await created(direct), relay.calls["CreateTask"]) == ([], 1)
    relay.refuse = False
    await create(client)
    assert await created(direct) == ["a"]


@pytest.mark.parametrize(("told", "error"), LOST)
async def test_a_lost_reply_leaves_the_call_done_and_the_caller_in_the_dark(
    relay: QueueRelay, client: Any, direct: Any, told: grpc.StatusCode, error: type[Exception]
) -> None:
    relay.lose = told
    with pytest.raises(error, match="lose the reply"):
        await create(client)
    assert await created(direct) == ["a"]
    with pytest.raises(error):  # a refusal is a reply too
        await create(client)
    relay.lose = None
    with pytest.raises(exceptions.AlreadyExists):
        await create(client)


async def test_a_delayed_call_whose_caller_gives_up_is_never_made(relay: QueueRelay, client: Any, direct: Any) -> None:
    relay.delay = 0.2
    with pytest.raises(exceptions.DeadlineExceeded):
        await create(client, timeout=0.1)
    await asyncio.sleep(0.3)  # it would have been made meanwhile
    assert await created(direct) == []
    began = asyncio.get_running_loop().time()
    await create(client)
    assert asyncio.get_running_loop().time() - began >= 0.19
    assert await created(direct) == ["a"]


async def test_a_hook_stands_before_and_after_what_upstream_does(relay: QueueRelay, client: Any, direct: Any) -> None:
    seen: list[tuple[str, int, list[str]]] = []
    answered = False

    async def look(call: Call) -> None:
        assert not answered
        seen.append((call.method, call.number, await created(direct)))

    relay.before = relay.after = look
    await create(client)
    answered = True
    assert seen == [("CreateTask", 1, []), ("CreateTask", 1, ["a"])]


async def test_a_hook_sees_the_request_and_how_long_its_caller_waits(relay: QueueRelay) -> None:
    """Upstream too: here that is a second relay."""
    calls: list[Call] = []
    async with QueueRelay(relay.endpoint) as outer, client_of(outer.endpoint) as client:
        outer.before = relay.before = calls.append
        await create(client, timeout=5)
    assert [tasks_v2.CreateTaskRequest.deserialize(call.request).task.name for call in calls] == [TASK["name"]] * 2
    ours, theirs = [call.patience for call in calls]
    assert ours
    assert theirs
    assert 0 < theirs <= ours + ROUNDED <= 5 + 2 * ROUNDED


async def test_another_service_is_not_passed_on(relay: QueueRelay) -> None:
    async with grpc.aio.insecure_channel(relay.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/google.cloud.run.v2.Services/GetService", None, None)(b"")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert not relay.calls


async def test_a_hook_may_switch_what_becomes_of_its_own_call(relay: QueueRelay, client: Any, direct: Any) -> None:
    """Told at the moment itself, so that a fault can meet one call among many."""

    def second(call: Call) -> None:
        relay.refuse = call.number == 2

    relay.before = second
    queue = {"parent": QUEUE}
    names = [f"{QUEUE}/tasks/{letter}" for letter in "abc"]
    outcomes = []
    for name in names:
        try:
            await client.create_task(queue | {"task": TASK | {"name": name}})
            outcomes.append(True)
        except exceptions.ServiceUnavailable:
            outcomes.append(False)
    assert outcomes == [True, False, True]
    assert await created(direct) == ["a", "c"]


async def test_a_hook_can_hold_a_call_that_its_caller_then_leaves(relay: QueueRelay, client: Any, direct: Any) -> None:
    reached = asyncio.Event()

    async def hold(_: Call) -> None:
        reached.set()
        await asyncio.Event().wait()

    relay.after = hold
    call = asyncio.create_task(create(client))
    await asyncio.wait_for(reached.wait(), 5)
    call.cancel()
    await asyncio.wait({call})
    assert await created(direct) == ["a"]


@pytest.mark.parametrize("told", [code for code, _ in LOST])
async def test_the_service_s_own_client_makes_one_cloud_task_of_a_lost_reply(
    relay: QueueRelay, direct: Any, told: grpc.StatusCode
) -> None:
    settings = load(
        database_url="postgresql://nobody@127.0.0.1/none", queue=QUEUE, queue_endpoint=relay.endpoint, queue_patience=5
    )
    relay.before = lambda call: setattr(relay, "lose", told if call.number < 3 else None)
    async with open_queue(settings) as queue:
        await queue.create(Enqueue("e.1", 1))
    assert await created(direct) == [task_id(Enqueue("e.1", 1))]
    assert relay.calls == {"CreateTask": 3}


async def test_the_end_of_the_relay_leaves_nothing_behind(direct: Any) -> None:
    tasks = asyncio.all_tasks()
    async with QueueRelay(direct.endpoint) as relay, client_of(relay.endpoint) as client:
        relay.delay = 60
        held = asyncio.create_task(create(client))
        async with asyncio.timeout(5):
            while not relay.calls:
                await asyncio.sleep(0.01)
        held.cancel()
        await asyncio.wait({held})
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - tasks:
            await asyncio.sleep(0.01)

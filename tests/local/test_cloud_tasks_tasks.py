"""The emulator's tasks as the API shows them, through the real clients."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio.to_thread
import grpc
import pytest
from google.api_core import exceptions
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcTransport

from app.local.queue_names import Refusal, Tombstones, page
from app.local.queue_rules import LARGEST_TASK
from tests.local.conftest import LOCATION, QUEUE, Bench, OpenBench

View = tasks_v2.Task.View


@pytest.fixture
async def held(bench: Bench) -> Bench:
    """A bench whose queue is paused, so that tasks stay as they were created."""
    await bench.queue()
    await bench.client.pause_queue(name=QUEUE)
    return bench


async def test_a_task_has_the_real_services_defaults(held: Bench) -> None:
    before = datetime.now(UTC)
    task = await held.client.create_task(parent=QUEUE, task={"http_request": {"url": held.target.url}})
    after = datetime.now(UTC)
    raw = tasks_v2.Task.pb(task)
    assert task.name.startswith(f"{QUEUE}/tasks/")
    assert task.http_request.http_method == tasks_v2.HttpMethod.POST
    assert task.http_request.headers == {"User-Agent": "Google-Cloud-Tasks"}
    assert raw.dispatch_deadline.ToTimedelta() == timedelta(minutes=10)
    assert before <= raw.schedule_time.ToDatetime(UTC) <= after
    assert raw.create_time.ToDatetime(UTC) == raw.schedule_time.ToDatetime(UTC).replace(microsecond=0)
    assert (task.dispatch_count, task.response_count, task.view) == (0, 0, View.BASIC)
    assert "first_attempt" not in task
    assert "last_attempt" not in task


async def test_the_basic_view_leaves_out_the_body_only(held: Bench) -> None:
    request = {"url": held.target.url, "body": b"{}", "headers": {"Content-Type": "application/json"}}
    for view, body in ((View.VIEW_UNSPECIFIED, b""), (View.BASIC, b""), (View.FULL, b"{}")):
        created = await held.client.create_task(
            request={"parent": QUEUE, "task": {"http_request": request}, "response_view": view}
        )
        got = await held.client.get_task(request={"name": created.name, "response_view": view})
        assert created == got
        assert got.http_request.body == body
        assert got.http_request.headers["Content-Type"] == "application/json"
        assert got.view == (view or View.BASIC)


async def test_a_living_tasks_name_is_refused(held: Bench) -> None:
    await held.task("a")
    with pytest.raises(exceptions.AlreadyExists, match="Requested entity already exists"):
        await held.task("a")


@pytest.mark.parametrize("end", ["acknowledged", "deleted", "purged"])
async def test_a_used_name_is_refused(bench: Bench, end: str) -> None:
    await bench.queue()
    if end != "acknowledged":
        await bench.client.pause_queue(name=QUEUE)
    name = await bench.task("a")
    if end == "deleted":
        await bench.client.delete_task(name=name)
    elif end == "purged":
        await bench.client.purge_queue(name=QUEUE)
    await bench.idle()
    with pytest.raises(exceptions.AlreadyExists, match="a task with this name existed too recently"):
        await bench.task("a")
    for call in (bench.client.get_task, bench.client.delete_task, bench.client.run_task):
        with pytest.raises(exceptions.NotFound, match="though a task with this name existed recently"):
            await call(name=name)


async def test_how_long_a_name_stays_used_can_be_set(open_bench: OpenBench) -> None:
    async with open_bench(tombstone=timedelta()) as bench:
        await bench.queue()
        for _ in range(2):
            name = await bench.task("a")
            await bench.idle()
        with pytest.raises(exceptions.NotFound, match="Requested entity was not found"):
            await bench.client.get_task(name=name)


def test_a_tombstone_lasts_its_time_from_the_last_burial() -> None:
    now = 0.0
    tombstones = Tombstones(timedelta(seconds=10), clock=lambda: now)
    tombstones.bury("a")
    now = 9.9
    assert "a" in tombstones
    tombstones.bury("b")
    now = 10.0
    assert "a" not in tombstones
    tombstones.bury("a")
    now = 19.9
    tombstones.bury("c")
    assert ["a" in tombstones, "b" in tombstones, "c" in tombstones] == [True, False, True]


async def test_a_missing_task_is_not_found(bench: Bench) -> None:
    await bench.queue()
    for call in (bench.client.get_task, bench.client.delete_task, bench.client.run_task):
        with pytest.raises(exceptions.NotFound, match="Requested entity was not found"):
            await call(name=f"{QUEUE}/tasks/never")
        with pytest.raises(exceptions.NotFound, match="Queue does not exist"):
            await call(name=f"{LOCATION}/queues/other/tasks/never")
        with pytest.raises(exceptions.InvalidArgument, match="Task name must be formatted"):
            await call(name="never")


@pytest.mark.parametrize("name", ["not a valid id", "a.b", "é", "x" * 501, ""])
async def test_a_malformed_task_id_is_refused(bench: Bench, name: str) -> None:
    await bench.queue()
    with pytest.raises(exceptions.InvalidArgument, match="can contain only letters"):
        await bench.client.create_task(
            parent=QUEUE, task={"name": f"{QUEUE}/tasks/{name}", "http_request": {"url": bench.target.url}}
        )


async def test_a_task_name_belongs_to_its_queue(bench: Bench) -> None:
    await bench.queue()
    task = {"name": f"{QUEUE}-other/tasks/a", "http_request": {"url": bench.target.url}}
    with pytest.raises(exceptions.InvalidArgument) as refused:
        await bench.client.create_task(parent=QUEUE, task=task)
    assert refused.value.message == (
        f"The queue name from request ('{QUEUE}') must be the same as the queue name in the named task"
        f" ('{QUEUE}-other')."
    )


SOON = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"url": ""}, "HttpRequest.url is required."),
        ({"url": "ftp://example.com/"}, "HttpTarget.url must start with 'http://' or 'https://'."),
        ({"url": "example.com/path"}, "HttpTarget.url must start with 'http://' or 'https://'."),
        ({"url": "http://e/" + "x" * 2083}, "HttpRequest.url must be at most 2083 characters."),
        ({"http_method": "GET", "body": b"x"}, "HttpRequest.body is not allowed with the method GET."),
        ({"headers": {"X-Large": "x" * 81920}}, "HttpRequest.headers must be less than 80KB."),
        ({"oidc_token": {"audience": "x"}}, "OidcToken.serviceAccountEmail is required."),
        ({"body": b"x" * LARGEST_TASK}, "Task size too large"),
    ],
)
async def test_a_request_beyond_the_limits_is_refused(
    bench: Bench, request_fields: dict[str, Any], message: str
) -> None:
    await bench.queue()
    with pytest.raises(exceptions.InvalidArgument) as refused:
        await bench.task(http_request=request_fields)
    assert refused.value.message == message


async def test_a_task_just_within_the_size_limit_is_pushed_whole(held: Bench) -> None:
    async def full(body: bytes) -> Any:
        task = {"http_request": {"url": held.target.url, "body": body}}
        return await held.client.create_task(request={"parent": QUEUE, "task": task, "response_view": View.FULL})

    overhead = len(tasks_v2.Task.serialize(await full(b"x" * 1_000_000))) - 1_000_000
    await full(b"x" * (LARGEST_TASK - overhead - 16))
    with pytest.raises(exceptions.InvalidArgument, match="Task size too large"):
        await full(b"x" * (LARGEST_TASK - overhead + 16))
    await held.client.resume_queue(name=QUEUE)
    await held.idle()
    assert len(held.target.received[-1].body) == LARGEST_TASK - overhead - 16


@pytest.mark.parametrize("seconds", [0, 14.9, 1800.1])
async def test_a_dispatch_deadline_lies_between_15_s_and_30_min(held: Bench, seconds: float) -> None:
    with pytest.raises(exceptions.InvalidArgument, match=r"must be between \[15s, 30m\]"):
        await held.task(dispatch_deadline=timedelta(seconds=seconds))
    await held.task(dispatch_deadline=timedelta(seconds=15))
    await held.task(dispatch_deadline=timedelta(minutes=30))


async def test_a_schedule_lies_at_most_30_days_ahead(held: Bench) -> None:
    now = datetime.now(UTC)
    await held.task(schedule_time=now + timedelta(days=30))
    with pytest.raises(exceptions.InvalidArgument, match="must be no more than 720h in the future"):
        await held.task(schedule_time=now + timedelta(days=30, minutes=5))


async def test_a_schedule_in_the_past_means_now(held: Bench) -> None:
    now = datetime.now(UTC)
    task = await held.client.get_task(name=await held.task(schedule_time=now - timedelta(days=1)))
    assert tasks_v2.Task.pb(task).schedule_time.ToDatetime(UTC) >= now


@pytest.mark.parametrize(
    "task",
    [
        {"app_engine_http_request": {"relative_uri": "/"}},
        {"http_request": {"url": "http://e/", "oauth_token": {"service_account_email": "a@b"}}},
    ],
)
async def test_targets_that_the_emulator_lacks_are_refused(bench: Bench, task: dict[str, Any]) -> None:
    await bench.queue()
    with pytest.raises(exceptions.MethodNotImplemented, match="The emulator has no"):
        await bench.client.create_task(parent=QUEUE, task=task)


async def test_output_only_fields_are_ignored(held: Bench) -> None:
    name = await held.task(dispatch_count=5, response_count=4, first_attempt={"dispatch_time": SOON}, create_time=SOON)
    task = await held.client.get_task(name=name)
    assert (task.dispatch_count, task.response_count, "first_attempt" in task) == (0, 0, False)
    assert tasks_v2.Task.pb(task).create_time.ToDatetime(UTC) > SOON + timedelta(days=1)


async def test_tasks_are_listed_page_by_page(held: Bench) -> None:
    names = [await held.task(f"t{number}", http_request={"body": b"{}"}) for number in range(5)]
    pager = await held.client.list_tasks(request={"parent": QUEUE, "page_size": 2, "response_view": View.FULL})
    pages = [list(page.tasks) async for page in pager.pages]
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [task.name for page in pages for task in page] == names
    assert all(task.http_request.body == b"{}" for page in pages for task in page)


async def test_a_page_token_that_was_not_given_out_is_refused(held: Bench) -> None:
    for bad in ({"page_token": "no token"}, {"page_size": -1}):
        with pytest.raises(exceptions.InvalidArgument):
            await held.client.list_tasks(request={"parent": QUEUE, **bad})


def test_paging_neither_skips_nor_repeats_while_names_come_and_go() -> None:
    first, token = page(["a", "c", "e", "g"], 2, "", 1000)
    second, end = page(["b", "e", "g"], 2, token, 1000)
    assert (first, second, end) == (["a", "c"], ["e", "g"], "")


def test_a_page_is_never_larger_than_the_largest() -> None:
    names = [f"{number:03}" for number in range(7)]
    assert [len(page(names, size, "", 5)[0]) for size in (0, 3, 5, 6, 100)] == [5, 3, 5, 5, 5]
    with pytest.raises(Refusal):
        page(names, 1, "%%%", 5)


@contextmanager
def sync_client(endpoint: str) -> Iterator[Any]:
    with closing(grpc.insecure_channel(endpoint)) as channel:
        yield tasks_v2.CloudTasksClient(transport=CloudTasksGrpcTransport(channel=channel))


async def test_the_sync_client_works_too(bench: Bench) -> None:
    def use() -> list[str]:
        with sync_client(bench.emulator.endpoint) as client:
            client.create_queue(parent=LOCATION, queue={"name": QUEUE})
            client.pause_queue(name=QUEUE)
            for number in range(3):
                task = {"name": f"{QUEUE}/tasks/t{number}", "http_request": {"url": bench.target.url}}
                client.create_task(parent=QUEUE, task=task)
            listed = [task.name for task in client.list_tasks(request={"parent": QUEUE, "page_size": 2})]
            client.resume_queue(name=QUEUE)
            return listed

    listed = await anyio.to_thread.run_sync(use)
    assert listed == [f"{QUEUE}/tasks/t{number}" for number in range(3)]
    await bench.idle()
    assert len(bench.target.received) == 3

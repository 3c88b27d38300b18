"""What the emulator sends to a task's target, and what it makes of the answers."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import httpx
import pytest
from google.api_core import exceptions
from google.cloud import tasks_v2
from google.rpc import code_pb2

from app.local.cloud_tasks import CloudTasksEmulator, serve
from app.local.oidc import Issuer
from app.local.push import Pusher
from tests.local.conftest import PATIENCE_SECONDS, QUEUE, Bench, OpenBench, Received, ms

QUICK = {"min_backoff": ms(1), "max_backoff": ms(1)}


def about_the_task(request: Received) -> dict[str, str]:
    return {
        name.removeprefix("X-CloudTasks-"): value
        for name, value in request.headers.items()
        if name.startswith("X-CloudTasks-") and not name.endswith("TaskETA")
    }


def eta(request: Received) -> datetime:
    return datetime.fromtimestamp(float(request.headers["X-CloudTasks-TaskETA"]), UTC)


async def test_a_push_is_the_request_that_the_creator_described(bench: Bench) -> None:
    await bench.queue()
    request = {
        "url": bench.target.url + "?a=b%20c",
        "http_method": "PUT",
        "headers": {"X-Mixed-Case": "kept", "content-type": "application/json", "Authorization": "Basic eA=="},
        "body": b'{"execution_id": "1"}',
    }
    await bench.task(http_request=request)
    await bench.idle()
    (received,) = bench.target.received
    assert (received.method, received.path) == ("PUT", "/tasks/execute?a=b%20c")
    assert received.body == b'{"execution_id": "1"}'
    kept = {"X-Mixed-Case": "kept", "content-type": "application/json", "Authorization": "Basic eA=="}
    assert kept.items() <= received.headers.items()


async def test_a_push_has_no_time_limit_but_its_task_s_deadline(issuer: Issuer) -> None:
    """httpx gives 5 s to whatever does not say otherwise; evaluations take minutes."""
    async with Pusher(issuer) as pusher:
        assert pusher._client.timeout == httpx.Timeout(None)


async def test_headers_that_are_the_services_own_cannot_be_set(bench: Bench) -> None:
    await bench.queue()
    theirs = {
        "X-CloudTasks-TaskRetryCount": "7",
        "x-cloudtasks-anything": "x",
        "X-Google-Whatever": "x",
        "X-AppEngine-QueueName": "x",
        "User-Agent": "curl",
        "host": "example.com",
        "Content-Length": "999",
        "Transfer-Encoding": "chunked",
    }
    await bench.task(http_request={"headers": theirs, "body": b"12345"})
    await bench.idle()
    (received,) = bench.target.received
    headers = {name.lower(): value for name, value in received.headers.items()}
    assert not {"x-cloudtasks-anything", "x-google-whatever", "x-appengine-queuename", "transfer-encoding"} & set(
        headers
    )
    assert headers["x-cloudtasks-taskretrycount"] == "0"
    assert headers["user-agent"] == "Google-Cloud-Tasks"
    assert headers["host"] in bench.target.url
    assert headers["content-length"] == "5"


async def test_headers_count_and_explain_retries_as_recorded_from_the_real_service(bench: Bench) -> None:
    """Through 503, 404, 429, 500, 302: the sequence that others recorded, with its counts."""
    await bench.queue(retry_config=QUICK)
    bench.target.answers = [503, 404, 429, 500, "302 Found\r\nLocation: /elsewhere"]
    await bench.task("a")
    await bench.idle()
    constant = {"QueueName": "evaluations", "TaskName": "a"}
    expected: list[dict[str, str]] = [constant | {"TaskRetryCount": "0", "TaskExecutionCount": "0"}]
    expected += [
        constant
        | {
            "TaskRetryCount": str(number),
            "TaskExecutionCount": executions,
            "TaskPreviousResponse": previous,
            "TaskRetryReason": "",
        }
        for number, (executions, previous) in enumerate(
            [("0", "503"), ("1", "404"), ("2", "429"), ("2", "500"), ("3", "302")], start=1
        )
    ]
    assert [about_the_task(request) for request in bench.target.received] == expected
    assert {request.path for request in bench.target.received} == {"/tasks/execute"}, "redirects are not followed"


async def test_the_eta_is_when_the_push_was_due(bench: Bench) -> None:
    await bench.queue()
    asked = datetime.now(UTC) + ms(100)
    created = {"schedule_time": asked, "http_request": {"url": bench.target.url}}
    task = tasks_v2.Task.pb(await bench.client.create_task(parent=QUEUE, task=created))
    due = task.schedule_time.ToDatetime(UTC)
    assert due >= asked, "later only if that has passed by the time it is created"
    await bench.idle()
    assert eta(bench.target.received[0]) == due
    assert bench.emulator.records[0].began >= due


async def test_retries_are_due_after_their_backoff_and_not_made_before(bench: Bench) -> None:
    await bench.queue(retry_config={"min_backoff": ms(40), "max_backoff": ms(150), "max_doublings": 1})
    bench.target.answers = [500, 404, 302, 409]
    await bench.task()
    await bench.idle()
    due = [eta(request) for request in bench.target.received[1:]]
    records = list(bench.emulator.records)
    expected = [record.ended + ms(wait) for record, wait in zip(records, [40, 80, 150, 150], strict=False)]
    assert due == expected
    assert [record.began >= when for record, when in zip(records[1:], due, strict=True)] == [True] * 4


@pytest.mark.parametrize("status", [200, 204, 299])
async def test_2xx_acknowledges(bench: Bench, status: int) -> None:
    await bench.queue()
    bench.target.answers = [status]
    name = await bench.task()
    await bench.idle()
    assert len(bench.target.received) == 1
    with pytest.raises(exceptions.NotFound):
        await bench.client.get_task(name=name)


@pytest.mark.parametrize("status", [300, 400, 401, 404, 409, 500])
async def test_every_other_status_is_retried(bench: Bench, status: int) -> None:
    await bench.queue(retry_config=QUICK)
    bench.target.answers = [status]
    await bench.task()
    await bench.idle()
    assert [record.status for record in bench.emulator.records] == [status, 200]


async def test_a_task_shows_its_first_and_last_attempt(bench: Bench) -> None:
    await bench.queue(retry_config={"min_backoff": timedelta(hours=1)})
    bench.target.answers = [404]
    before = datetime.now(UTC)
    name = await bench.task()
    await bench.records(1)
    task = tasks_v2.Task.pb(await bench.client.get_task(name=name))
    (record,) = bench.emulator.records
    assert (task.dispatch_count, task.response_count) == (1, 1)
    assert task.first_attempt.dispatch_time.ToDatetime(UTC) == record.began >= before
    assert not task.first_attempt.HasField("response_time")
    assert task.last_attempt.response_time.ToDatetime(UTC) == record.ended
    assert task.last_attempt.response_status.code == code_pb2.NOT_FOUND
    assert task.last_attempt.response_status.message == "NOT_FOUND(5): HTTP status code 404"
    assert task.schedule_time.ToDatetime(UTC) == record.ended + timedelta(hours=1)


async def test_a_push_under_way_shows_in_the_counts(bench: Bench) -> None:
    await bench.queue()
    bench.target.gate = anyio.Event()
    name = await bench.task()
    await bench.target.wait(1)
    task = await bench.client.get_task(name=name)
    assert (task.dispatch_count, task.response_count) == (1, 0)
    assert "response_time" not in task.last_attempt
    bench.target.gate.set()
    await bench.idle()


async def test_a_target_that_cannot_be_reached_is_retried(bench: Bench) -> None:
    await bench.queue(retry_config=QUICK | {"max_attempts": 3})
    with_nobody = await asyncio.start_server(bench.target.handle, "127.0.0.1", 0)
    port = with_nobody.sockets[0].getsockname()[1]
    with_nobody.close()
    await with_nobody.wait_closed()
    await bench.task(http_request={"url": f"http://127.0.0.1:{port}/"})
    await bench.idle()
    assert [record.status for record in bench.emulator.records] == [503, 503, 503]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/%zz",
        "https://127.0.0.1:1",
        "http://",
        "http://[::1",
        "http://xn--/",
        "http://127.0.0.1:99999/",
    ],
)
async def test_an_address_that_leads_nowhere_is_a_failure_not_a_crash(bench: Bench, url: str) -> None:
    await bench.queue(retry_config=QUICK | {"max_attempts": 1})
    await bench.task(http_request={"url": url})
    await bench.idle()
    assert len(bench.emulator.records) == 1


async def test_a_task_out_of_attempts_is_deleted_and_its_name_stays_used(bench: Bench) -> None:
    await bench.queue(retry_config=QUICK | {"max_attempts": 3})
    bench.target.answers = [500] * 10
    name = await bench.task("a")
    await bench.idle()
    assert len(bench.target.received) == 3
    with pytest.raises(exceptions.NotFound, match="existed recently"):
        await bench.client.get_task(name=name)
    with pytest.raises(exceptions.AlreadyExists):
        await bench.task("a")


async def test_retries_go_on_until_the_retry_duration_is_over_too(bench: Bench) -> None:
    await bench.queue(
        retry_config={"max_attempts": 1, "max_retry_duration": ms(200), "min_backoff": ms(60), "max_backoff": ms(60)}
    )
    bench.target.answers = [500] * 20
    await bench.task()
    await bench.idle()
    *earlier, last = [record.ended - bench.emulator.records[0].began for record in bench.emulator.records]
    assert last >= ms(200)
    assert all(ended < ms(200) for ended in earlier)


async def test_a_tasks_own_retry_config_overrides_its_queues(bench: Bench) -> None:
    await bench.queue(retry_config={"min_backoff": timedelta(hours=1), "max_attempts": 100})
    bench.target.answers = [500] * 10
    await bench.task(retry_config=QUICK | {"max_attempts": 2})
    await bench.idle()
    assert len(bench.target.received) == 2


async def test_a_task_is_not_pushed_before_its_schedule(bench: Bench) -> None:
    await bench.queue()
    await bench.task("later", schedule_time=datetime.now(UTC) + timedelta(hours=1))
    await bench.task("now")
    await bench.records(1)
    due = datetime.now(UTC) + ms(300)
    await bench.task("soon", schedule_time=due)
    await bench.records(2)
    assert [record.task.rpartition("/")[2] for record in bench.emulator.records] == ["now", "soon"]
    assert bench.emulator.records[1].began >= due


async def test_past_its_deadline_a_push_is_made_again_while_the_handler_still_runs(open_bench: OpenBench) -> None:
    async with open_bench(default_dispatch_deadline=ms(150)) as bench:
        await bench.queue(retry_config=QUICK)
        bench.target.gate = anyio.Event()
        name = await bench.task("a")
        await bench.target.wait(2)
        assert bench.target.under_way >= 2
        second = about_the_task(bench.target.received[1])
        assert (second["TaskPreviousResponse"], second["TaskRetryReason"]) == ("504", "")
        assert (int(second["TaskRetryCount"]) >= 1, second["TaskExecutionCount"]) == (True, "0")
        task = await bench.client.get_task(name=name)
        assert (task.dispatch_count >= 2, task.response_count) == (True, 0)
        bench.target.gate.set()
        await bench.idle()
        first = bench.emulator.records[0]
        assert (first.status, first.ended - first.began >= ms(148)) == (504, True)


async def test_tasks_outlive_the_deletion_of_many_others(bench: Bench) -> None:
    await bench.queue()
    await bench.client.pause_queue(name=QUEUE)
    async with anyio.create_task_group() as group:
        for number in range(150):
            group.start_soon(bench.task, f"t{number}")
    async with anyio.create_task_group() as group:
        for number in range(149):
            group.start_soon(_delete_task, bench.client, f"{QUEUE}/tasks/t{number}")
    await bench.task("t150")
    await bench.client.resume_queue(name=QUEUE)
    await bench.idle()
    assert {record.task.rpartition("/")[2] for record in bench.emulator.records} == {"t149", "t150"}


async def test_run_pushes_at_once_whatever_schedule_and_state_say(bench: Bench) -> None:
    await bench.queue()
    await bench.client.pause_queue(name=QUEUE)
    name = await bench.task(schedule_time=datetime.now(UTC) + timedelta(days=1))
    task = await bench.client.run_task(name=name)
    assert task.dispatch_count == 1
    await bench.idle()
    assert len(bench.target.received) == 1


async def test_a_failed_run_leaves_the_task_scheduled_for_a_retry(bench: Bench) -> None:
    await bench.queue(retry_config={"min_backoff": timedelta(hours=1)})
    await bench.client.pause_queue(name=QUEUE)
    name = await bench.task()
    bench.target.answers = [500]
    await bench.client.run_task(name=name)
    await bench.records(1)
    task = tasks_v2.Task.pb(await bench.client.get_task(name=name))
    assert task.schedule_time.ToDatetime(UTC) == bench.emulator.records[0].ended + timedelta(hours=1)


async def test_run_pushes_even_beside_a_push_under_way(bench: Bench) -> None:
    await bench.queue(rate_limits={"max_concurrent_dispatches": 1})
    bench.target.gate = anyio.Event()
    name = await bench.task()
    await bench.target.wait(1)
    await bench.client.run_task(name=name)
    await bench.target.wait(2)
    assert bench.target.under_way == 2
    bench.target.gate.set()
    await bench.idle()
    assert len(bench.target.received) == 2


async def _delete_task(client: Any, name: str) -> None:
    await client.delete_task(name=name)


async def _purge(client: Any, name: str) -> None:
    await client.purge_queue(name=QUEUE)


async def _delete_queue(client: Any, name: str) -> None:
    await client.delete_queue(name=QUEUE)


@pytest.mark.parametrize("remove", [_delete_task, _purge, _delete_queue])
async def test_a_task_removed_during_its_push_is_not_retried(bench: Bench, remove: Any) -> None:
    await bench.queue(retry_config=QUICK)
    bench.target.gate = anyio.Event()
    bench.target.answers = [500]
    name = await bench.task()
    await bench.target.wait(1)
    await remove(bench.client, name)
    assert len(bench.emulator.records) == 0, "the push goes on"
    bench.target.gate.set()
    await bench.idle()
    assert [record.status for record in bench.emulator.records] == [500]


async def test_a_queue_paused_during_a_push_retries_only_once_resumed(bench: Bench) -> None:
    await bench.queue(retry_config=QUICK)
    bench.target.gate = anyio.Event()
    bench.target.answers = [500]
    name = await bench.task()
    await bench.target.wait(1)
    await bench.client.pause_queue(name=QUEUE)
    bench.target.gate.set()
    await bench.records(1)
    await anyio.sleep(0.05)  # well past the back-off of 1 ms: a retry would be seen
    assert (await bench.client.get_task(name=name)).dispatch_count == 1
    await bench.client.resume_queue(name=QUEUE)
    await bench.idle()
    assert [record.status for record in bench.emulator.records] == [500, 200]


async def test_closing_the_emulator_drops_pushes_under_way(open_bench: OpenBench) -> None:
    async with open_bench() as bench:
        await bench.queue()
        bench.target.gate = anyio.Event()
        await bench.task()
        await bench.target.wait(1)
    assert len(bench.emulator.records) == 0


async def test_what_the_callers_block_raises_comes_out_unchanged(issuer: Issuer) -> None:
    with pytest.raises(KeyError):
        async with CloudTasksEmulator(issuer=issuer):
            raise KeyError


async def test_two_emulators_cannot_share_a_port(bench: Bench, issuer: Issuer) -> None:
    port = int(bench.emulator.endpoint.rpartition(":")[2])
    with pytest.raises(RuntimeError, match="bind"):
        async with CloudTasksEmulator(port=port, issuer=issuer):
            pass


async def test_serve_runs_until_it_is_cancelled(issuer: Issuer) -> None:
    ready = anyio.Event()
    with anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as group:
            group.start_soon(serve, CloudTasksEmulator(issuer=issuer), lambda _: ready.set())
            await ready.wait()
            group.cancel_scope.cancel()

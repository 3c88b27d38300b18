"""The emulator against what is recorded of the real Cloud Tasks: each fact, in its words, and the test that proves it.

Most proofs are where the emulator's own tests are; those that nothing else needed are below the table.
"""

import inspect
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import grpc.aio
import pytest
import uvicorn
from fastapi import FastAPI
from google.api_core import exceptions
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport

import app.local.cloud_tasks
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.queue_pacing import backoff
from tests.faults.queue import QueueRelay
from tests.local.conftest import PATIENCE_SECONDS, QUEUE, Bench, OpenBench, ms

ROOT = Path(__file__).parents[2]
PUSHES = "tests/local/test_cloud_tasks_pushes.py::"
PACING = "tests/local/test_cloud_tasks_pacing.py::"
TASKS = "tests/local/test_cloud_tasks_tasks.py::"
QUEUES = "tests/local/test_cloud_tasks_queues.py::"
OIDC = "tests/local/test_cloud_tasks_oidc.py::"
CREATION = "tests/test_queue.py::"
HERE = "tests/local/test_conformance.py::"

FACTS = {
    # what acknowledges
    "200 to 299 acknowledges": [f"{PUSHES}test_2xx_acknowledges[{status}]" for status in (200, 204, 299)],
    "everything else is retried, 4xx too": [
        f"{PUSHES}test_every_other_status_is_retried[{status}]" for status in (300, 400, 401, 404, 409, 500)
    ],
    "429 slows the queue": [f"{PACING}test_one_tasks_429_or_503_holds_up_the_whole_queue[429]"],
    "503 slows the queue": [f"{PACING}test_one_tasks_429_or_503_holds_up_the_whole_queue[503]"],
    "a high error rate slows the queue": [
        f"{PACING}test_a_high_rate_of_errors_slows_the_queue_down_and_a_low_one_does_not"
    ],
    # the dispatch deadline
    "dispatch_deadline is 15 s to 30 min": [
        f"{TASKS}test_a_dispatch_deadline_lies_between_15_s_and_30_min[{seconds}]" for seconds in (0, 14.9, 1800.1)
    ],
    "dispatch_deadline is 10 min by default": [f"{TASKS}test_a_task_has_the_real_services_defaults"],
    "past the deadline a request is retried while the handler may still run: a concurrent duplicate": [
        f"{PUSHES}test_past_its_deadline_a_push_is_made_again_while_the_handler_still_runs",
        f"{HERE}test_uvicorn_does_not_cancel_a_handler_whose_push_was_given_up",
    ],
    # the headers
    "headers: QueueName and TaskName (short ids), TaskRetryCount, TaskExecutionCount": [
        f"{PUSHES}test_headers_count_and_explain_retries_as_recorded_from_the_real_service"
    ],
    "headers: TaskETA": [f"{PUSHES}test_the_eta_is_when_the_push_was_due"],
    "headers, from the first retry on: TaskPreviousResponse, and TaskRetryReason present but empty": [
        f"{PUSHES}test_headers_count_and_explain_retries_as_recorded_from_the_real_service"
    ],
    "ExecutionCount is unchanged by 500 and 503, and 1 more by 404, 429 and 302": [
        f"{PUSHES}test_headers_count_and_explain_retries_as_recorded_from_the_real_service"
    ],
    "ExecutionCount is unchanged by time-outs": [
        f"{PUSHES}test_past_its_deadline_a_push_is_made_again_while_the_handler_still_runs"
    ],
    "a time-out gives PreviousResponse 504": [
        f"{PUSHES}test_past_its_deadline_a_push_is_made_again_while_the_handler_still_runs"
    ],
    # queues
    "defaults: 100 attempts, back-off 0.1 s to 3,600 s, 16 doublings, 500 a second, 1,000 concurrent": [
        f"{QUEUES}test_a_queue_has_the_real_services_defaults",
        f"{HERE}test_by_default_a_task_is_deleted_after_100_attempts",
        f"{HERE}test_by_default_the_back_off_doubles_from_a_tenth_of_a_second_to_an_hour",
    ],
    "back-off: doubling, then linear, then the maximum": [
        f"{PACING}test_backoff_doubles_then_grows_linearly_then_stays_at_the_maximum",
        f"{PUSHES}test_retries_are_due_after_their_backoff_and_not_made_before",
    ],
    "when attempts and duration are both spent the task is deleted": [
        f"{PACING}test_a_task_is_given_up_when_every_limit_is_spent[3-10-3-10-True]",
        f"{PUSHES}test_retries_go_on_until_the_retry_duration_is_over_too",
        f"{HERE}test_retries_go_on_until_the_attempts_are_spent_too",
    ],
    "there is no dead-letter queue": [f"{PUSHES}test_a_task_out_of_attempts_is_deleted_and_its_name_stays_used"],
    # tasks
    "1 MB a task": [f"{TASKS}test_a_task_just_within_the_size_limit_is_pushed_whole"],
    "a schedule is at most 30 days ahead": [f"{TASKS}test_a_schedule_lies_at_most_30_days_ahead"],
    "a used name is refused with ALREADY_EXISTS": [
        f"{TASKS}test_a_living_tasks_name_is_refused",
        f"{TASKS}test_a_used_name_is_refused[acknowledged]",
        f"{PUSHES}test_a_task_out_of_attempts_is_deleted_and_its_name_stays_used",
    ],
    "a used name is refused after purge and deletion too": [
        f"{TASKS}test_a_used_name_is_refused[purged]",
        f"{TASKS}test_a_used_name_is_refused[deleted]",
        f"{QUEUES}test_how_long_a_queues_name_stays_reserved_can_be_set",
    ],
    "a used name is refused for up to 24 h": [
        f"{TASKS}test_a_tombstone_lasts_its_time_from_the_last_burial",
        f"{HERE}test_by_default_a_name_stays_used_for_24_hours",
    ],
    "a task's name has letters, digits, hyphens and underscores, 500 at most": [
        f"{TASKS}test_a_malformed_task_id_is_refused",
        f"{HERE}test_a_task_id_may_have_500_characters_of_every_allowed_kind",
    ],
    "names slow the service when they rise: start one with a hash": [
        f"{CREATION}test_names_start_with_a_hash_and_are_the_same_each_time"
    ],
    # the client and its credentials
    "create_task has no default retry": [f"{HERE}test_the_client_creates_a_task_once_and_retries_only_what_it_reads"],
    "create_task has a 20 s timeout": [f"{HERE}test_the_client_waits_20_seconds_for_a_task_to_be_created"],
    "retry by name: ALREADY_EXISTS is success": [
        f"{CREATION}test_creating_the_same_one_again_is_as_good_as_once",
        "tests/faults/test_queue.py::test_the_service_s_own_client_makes_one_cloud_task_of_a_lost_reply"
        "[StatusCode.UNAVAILABLE]",
    ],
    "oidc_token with a service account and an audience": [
        f"{OIDC}test_google_auth_verifies_a_pushed_token",
        f"{CREATION}test_a_cloud_task_carries_what_a_push_needs",
    ],
}
"""A proof without a row in brackets is all rows of its test."""

NOT_EMULATED = {"a task is kept for 31 days": "31 days", "the creator needs iam.serviceAccounts.actAs": "IAM"}
"""Facts, and by which words the emulator says that it has nothing of the kind."""


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The ids of all tests that there are in the proofs' files."""
    files = sorted({proof.partition("::")[0] for proofs in FACTS.values() for proof in proofs})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    listing = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert listing.returncode == 0, listing.stdout + listing.stderr
    ids = listing.stdout.splitlines()
    return {*ids, *(id.partition("[")[0] for id in ids)}


@pytest.mark.parametrize("fact", FACTS)
def test_a_recorded_fact_has_its_proof(fact: str, collected: set[str]) -> None:
    assert FACTS[fact]
    assert [proof for proof in FACTS[fact] if proof not in collected] == []


@pytest.mark.parametrize("fact", NOT_EMULATED)
def test_what_is_not_emulated_is_said(fact: str) -> None:
    documentation = app.local.cloud_tasks.__doc__
    assert documentation
    assert NOT_EMULATED[fact] in documentation.partition("Not emulated")[2]


# The proofs that are nowhere else -------------------------------------------------------------------------------------


async def test_by_default_a_task_is_deleted_after_100_attempts(bench: Bench) -> None:
    await bench.queue(retry_config={"min_backoff": ms(1), "max_backoff": ms(1)})
    bench.target.answers = [500] * 200
    name = await bench.task("a")
    await bench.idle()
    assert len(bench.target.received) == 100
    with pytest.raises(exceptions.NotFound):
        await bench.client.get_task(name=name)


async def test_by_default_the_back_off_doubles_from_a_tenth_of_a_second_to_an_hour(bench: Bench) -> None:
    retry = tasks_v2.RetryConfig.pb((await bench.queue()).retry_config)
    least, most = (limit.ToTimedelta().total_seconds() for limit in (retry.min_backoff, retry.max_backoff))
    pauses = [backoff(failure, least, most, retry.max_doublings) for failure in range(1, 19)]
    assert pauses == pytest.approx([0.1 * 2**doublings for doublings in range(16)] + [3600, 3600])


async def test_retries_go_on_until_the_attempts_are_spent_too(bench: Bench) -> None:
    """The other way round: the duration is over long before."""
    retry = {"max_attempts": 4, "max_retry_duration": ms(10), "min_backoff": ms(30), "max_backoff": ms(30)}
    await bench.queue(retry_config=retry)
    bench.target.answers = [500] * 20
    name = await bench.task("a")
    await bench.idle()
    assert len(bench.target.received) == 4
    assert bench.emulator.records[1].began - bench.emulator.records[0].began >= ms(10)
    with pytest.raises(exceptions.NotFound):
        await bench.client.get_task(name=name)


async def test_a_task_id_may_have_500_characters_of_every_allowed_kind(bench: Bench) -> None:
    await bench.queue()
    short = "aZ09-_" + "x" * 494
    await bench.task(short)
    await bench.idle()
    assert bench.target.received[0].headers["X-CloudTasks-TaskName"] == short


def test_by_default_a_name_stays_used_for_24_hours() -> None:
    assert inspect.signature(CloudTasksEmulator).parameters["tombstone"].default == timedelta(hours=24)


async def test_uvicorn_does_not_cancel_a_handler_whose_push_was_given_up(open_bench: OpenBench) -> None:
    """So the duplicate meets the original at work, in the same process even."""
    arrived: list[int] = []
    ended: list[int] = []
    may_end = anyio.Event()
    app = FastAPI()

    @app.post("/")
    async def handle() -> None:
        arrived.append(len(arrived))
        mine = arrived[-1]
        await may_end.wait()
        ended.append(mine)

    async with open_bench(default_dispatch_deadline=ms(150)) as bench, _uvicorn(app) as url:
        await bench.queue(retry_config={"min_backoff": ms(1), "max_backoff": ms(1)})
        await bench.task(http_request={"url": url})
        with anyio.fail_after(PATIENCE_SECONDS):
            while len(arrived) < 2:
                await anyio.sleep(0.01)
        assert (ended, {record.status for record in bench.emulator.records}) == ([], {504})
        may_end.set()
        await bench.idle()
        with anyio.fail_after(PATIENCE_SECONDS):
            while len(ended) < len(arrived):
                await anyio.sleep(0.01)
    assert sorted(ended) == list(range(len(arrived)))


@asynccontextmanager
async def _uvicorn(app: FastAPI) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None))
    async with anyio.create_task_group() as group:
        group.start_soon(server._serve)
        with anyio.fail_after(PATIENCE_SECONDS):
            while not server.started:
                await anyio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        server.should_exit = True


async def test_the_client_creates_a_task_once_and_retries_only_what_it_reads(bench: Bench) -> None:
    await bench.queue()
    async with _relayed(bench) as (relay, client):
        relay.before = lambda call: setattr(relay, "refuse", call.number == 1)
        assert (await client.get_queue(name=QUEUE)).name == QUEUE
        with pytest.raises(exceptions.ServiceUnavailable):
            await client.create_task(parent=QUEUE, task={"http_request": {"url": bench.target.url}})
        assert relay.calls == {"GetQueue": 2, "CreateTask": 1}


async def test_the_client_waits_20_seconds_for_a_task_to_be_created(bench: Bench) -> None:
    await bench.queue()
    came: list[tuple[float, float]] = []
    async with _relayed(bench) as (relay, client):
        began = time.monotonic()
        relay.before = lambda call: came.append((call.patience or 0, time.monotonic() - began))
        await client.create_task(parent=QUEUE, task={"http_request": {"url": bench.target.url}})
    ((patience, elapsed),) = came
    assert 20 - elapsed - 0.1 <= patience <= 20.1, "but for what gRPC rounds"
    await bench.idle()


@asynccontextmanager
async def _relayed(bench: Bench) -> AsyncIterator[tuple[QueueRelay, Any]]:
    """The emulator by way of a relay, and a client that nobody has given a retry or a timeout."""
    async with QueueRelay(bench.emulator.endpoint) as relay, grpc.aio.insecure_channel(relay.endpoint) as channel:
        yield relay, tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))

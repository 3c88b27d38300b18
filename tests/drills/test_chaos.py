"""The chaos drill, for as short as it makes sense; and its parts that nobody else tests."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import httpx
import pytest

from tests.drills.chaos.drill import chaos
from tests.drills.chaos.faults import KINDS, OUTAGE, RESTARTS, plan
from tests.drills.chaos.front import Front
from tests.drills.chaos.workers import WRONG_CLOCK
from tests.report import as_json

SECONDS = 15
"""Of faults: some seven, and an outage longer than the lease."""


@pytest.mark.timeout(400)
async def test_nothing_is_lost_or_doubled_whatever_goes_wrong() -> None:
    seed = random.randrange(10**6)
    print(f"to see it again: python -m tests.drills.chaos --seconds {SECONDS} --seed {seed}")
    report = await chaos(SECONDS, seed)
    assert report.met, as_json(report)
    *_, total = report.rows
    assert int(total["times"] or 0) >= 3, "something did go wrong"


def test_the_seed_decides_what_goes_wrong_and_in_time_everything_does() -> None:
    assert plan(600, 7) == plan(600, 7) != plan(600, 8)
    for seed in range(20):
        planned = plan(600, seed)
        kinds = Counter(one.kind for one in planned)
        assert set(kinds) == set(KINDS)
        assert kinds[OUTAGE] == 1
        restarts = [one.at for one in planned if one.kind in RESTARTS]
        assert min(b - a for a, b in pairwise(restarts)) >= 12
        assert max(one.at for one in plan(15, seed)) < 15


class Instance:
    """Answers each request with its own name, as soon as it may."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ("", 0)
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.begun.set()
        await self.may_answer.wait()
        self.ended.set()
        writer.write(f"HTTP/1.1 409 Conflict\r\nContent-Length: {len(self.name)}\r\n\r\n{self.name}".encode())
        writer.close()


@asynccontextmanager
async def instance(name: str) -> AsyncIterator[Instance]:
    made = Instance(name)
    async with await asyncio.start_server(made.answer, "127.0.0.1", 0) as server:
        made.address = server.sockets[0].getsockname()
        yield made


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async with Front() as front:
        yield front


@pytest.fixture
async def client(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=front.url, timeout=20) as client:
        yield client


def push(client: httpx.AsyncClient, execution: str) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(client.post("/tasks/execute", json={"execution_id": execution}))


async def test_the_front_takes_turns_skips_the_dead_and_remembers_pushes(
    front: Front, client: httpx.AsyncClient
) -> None:
    began = time.time()
    async with instance("a") as a, instance("b") as b:
        front.workers = {"a": a.address, "b": b.address}
        assert [(await push(client, f"e.{n}")).text for n in range(4)] == ["a", "b", "a", "b"]
        assert (await client.get("/health/live")).text == "a"
    assert [(p.execution, p.worker, p.status) for p in front.pushes[:2]] == [("e.0", "a", 409), ("e.1", "b", 409)]
    assert all(began <= p.began <= p.ended for p in front.pushes)
    assert len(front.pushes) == 4
    async with instance("b") as b:
        front.workers["b"] = b.address
        assert [(await push(client, f"e.{n}")).text for n in range(3)] == ["b", "b", "b"]
    assert (await client.get("/health/live")).status_code == 503


async def test_an_instance_that_dies_answers_503_and_nobody_else_is_asked(
    front: Front, client: httpx.AsyncClient
) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        writer.close()

    async with await asyncio.start_server(die, "127.0.0.1", 0) as server, instance("other") as other:
        front.workers = {"dying": server.sockets[0].getsockname(), "other": other.address}
        assert (await push(client, "e.1")).status_code == 503
        assert not other.begun.is_set()


async def test_a_push_that_is_cut_goes_on_in_its_worker(front: Front, client: httpx.AsyncClient) -> None:
    async with instance("slow") as slow:
        slow.may_answer.clear()
        front.workers = {"slow": slow.address}
        pushed = push(client, "e.1")
        await slow.begun.wait()
        front.cut(front.under_way[0])
        with pytest.raises(httpx.HTTPError):
            await pushed
        assert not slow.ended.is_set()
        slow.may_answer.set()
        await asyncio.wait_for(slow.ended.wait(), 20)
    assert [(p.execution, p.status) for p in front.pushes] == [("e.1", None)]
    assert front.under_way == []


def test_a_wrong_clock_is_wrong_for_python_and_right_for_the_kernel() -> None:
    code = """
import json, os, time
from datetime import date, datetime, timezone
print(json.dumps([time.time(), time.time_ns() / 1e9, datetime.now(timezone.utc).timestamp(), datetime.now().timestamp(),
                  datetime.fromordinal(date.today().toordinal()).timestamp(), time.mktime(time.localtime()),
                  time.clock_gettime(time.CLOCK_REALTIME), eval("time.time()", {"time": time, "__name__": "grpc.aio"})]))
"""
    by = -10 * 24 * 3600.0
    environment = os.environ | {"PYTHONPATH": str(WRONG_CLOCK), "CLOCK_WRONG_BY": str(by)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
    times = [seen - time.time() for seen in json.loads(told)]
    assert times[:4] == pytest.approx([by] * 4, abs=30)
    assert times[4:6] == pytest.approx([by] * 2, abs=25 * 3600)
    assert times[6:] == pytest.approx([0, 0], abs=30)

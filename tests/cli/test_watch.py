"""Following an evaluation to its end, whatever happens to the service meanwhile."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from uuid import UUID, uuid4

import anyio
import pytest

from app.client import Client, Seen, Unreachable, follow
from app.ledger import Held
from tests.cli.conftest import DEADLINE, Proctor, Service
from tests.cli.evaluations import end, ended, planned, submitted
from tests.cli.relay import open_relay

pytestmark = pytest.mark.xdist_group("cli-watch")


class Watching:
    """A `proctor` that runs, read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def says(self, words: str) -> str:
        """The first line on stderr that has these words."""
        assert self.process.stderr is not None
        with anyio.fail_after(DEADLINE):
            while True:
                line = (await self.process.stderr.readline()).decode()
                assert line, f"it ended without saying {words!r}: {self.lines}"
                self.lines.append(line)
                if words in line:
                    return line


@asynccontextmanager
async def watching(proctor: Proctor, *arguments: str) -> AsyncIterator[Watching]:
    process = await proctor.start(*arguments)
    try:
        yield Watching(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_watch_says_what_changes_and_shows_the_end(service: Service, proctor: Proctor) -> None:
    evaluation = await planned(service.ledger, 1, 2)
    async with watching(proctor, "watch", str(evaluation)) as watch:
        await watch.says("0 of 2 done: 2 pending")
        run = await service.ledger.claim(f"{evaluation}.1", uuid4())
        assert run is not None
        await watch.says("0 of 2 done: 1 running, 1 pending")
        await service.ledger.cancel(evaluation)
        await watch.says("running, being cancelled; samples: 1 of 2 done: 1 cancelled, 1 running")


async def test_watch_ends_with_the_evaluation_and_0_if_it_succeeded(service: Service, proctor: Proctor) -> None:
    evaluation = await planned(service.ledger, 1, 2)
    async with watching(proctor, "watch", str(evaluation), "--json") as watch:
        await watch.says("2 pending")
        await end(service.ledger, evaluation)
        ran = await proctor.end(watch.process)
    assert ran.code == 0
    view = json.loads(ran.out)
    assert (view["id"], view["state"], view["samples"]["succeeded"]) == (str(evaluation), "succeeded", 2)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_watching_what_failed_or_was_cancelled_exits_1_and_shows_it(
    service: Service, proctor: Proctor, state: str
) -> None:
    evaluation = await ended(service.ledger, "failed" if state == "failed" else "cancelled")
    ran = await proctor("watch", str(evaluation))
    assert ran.code == 1
    assert f"{evaluation} {state}" in ran.out


async def test_submit_with_wait_ends_as_the_evaluation_does(service: Service, proctor: Proctor) -> None:
    tag = f"run={uuid4()}"
    arguments = ("submit", "proctor/programming", "--model", "mockllm/model", "--tag", tag, "--wait", "--json")
    async with watching(proctor, *arguments) as submit:
        id = (await submit.says("is submitted")).split()[1]
        await submit.says("not known yet")
        await service.ledger.cancel(UUID(id))
        await end(service.ledger, UUID(id), "cancelled", ())
        ran = await proctor.end(submit.process)
    assert (ran.code, json.loads(ran.out)["state"]) == (1, "cancelled")


async def test_ctrl_c_leaves_the_evaluation_running_and_says_so(service: Service, proctor: Proctor) -> None:
    evaluation = await submitted(service.ledger)
    async with watching(proctor, "watch", str(evaluation)) as watch:
        await watch.says("not known yet")
        watch.process.send_signal(signal.SIGINT)
        ran = await proctor.end(watch.process)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == (
        f"Evaluation {evaluation} goes on. To follow it: proctor watch {evaluation};"
        f" to end it: proctor cancel {evaluation}\n"
    )
    assert json.loads((await proctor("show", str(evaluation), "--json")).out)["cancel_requested"] is False


async def test_watch_outlasts_a_service_that_is_away_for_a_moment(
    service: Service, at: Callable[[str], Proctor]
) -> None:
    evaluation = await planned(service.ledger, 1, 2)
    async with open_relay(service.url) as relay:
        proctor = at(relay.url)
        async with watching(proctor, "watch", str(evaluation)) as watch:
            await watch.says("2 pending")
            await relay.down()
            await watch.says("The service is away")
            await end(service.ledger, evaluation)
            await relay.up()
            ran = await proctor.end(watch.process)
    assert ran.code == 0, ran.err
    assert f"{evaluation} succeeded" in ran.out


async def test_following_gives_up_when_the_service_stays_away(service: Service) -> None:
    evaluation = str(await planned(service.ledger, 1))
    async with open_relay(service.url) as relay:
        with Client(relay.url) as client:
            seen = iter(follow(client, evaluation, every=0, patience=0))
            first = await asyncio.to_thread(next, seen)
            await relay.down()
            with pytest.raises(Unreachable, match="No answer from"):
                await asyncio.to_thread(next, seen)
        await relay.up()
    assert first.view["samples"]["pending"] == 1


async def test_following_tells_what_runs_now(service: Service) -> None:
    evaluation = await planned(service.ledger, "first", "second")
    run = await service.ledger.claim(f"{evaluation}.2", uuid4())
    assert run is not None
    progress = {"step": "calling the model", "model_calls": 3, "tokens": 1234}
    await service.ledger.renew([Held(run.execution_id, run.attempt, progress)])

    def second_look() -> Seen:
        with Client(service.url) as client:
            seen = iter(follow(client, str(evaluation), every=0))
            next(seen)
            return next(seen)

    (running,) = (await asyncio.to_thread(second_look)).running
    assert (running.what, running.progress) == ("sample second", progress)


async def test_on_a_terminal_watch_draws_bars_and_leaves_only_the_end(service: Service, proctor: Proctor) -> None:
    evaluation = await planned(service.ledger, 1, 2)
    run = await service.ledger.claim(f"{evaluation}.1", uuid4())
    assert run is not None
    await service.ledger.renew([Held(run.execution_id, run.attempt, {"step": "[bold]calling"})])
    async with terminal() as (screen, name):
        process = await asyncio.create_subprocess_exec(
            *proctor.command("watch", str(evaluation)), stdout=name, stderr=name, env=proctor.environment
        )
        drawn = await screen.until(b"sample 1: [bold]calling")
        assert "━".encode() in drawn
        assert b"0/2" in drawn
        await service.ledger.cancel(evaluation)
        await screen.until(b"stopping")
        process.send_signal(signal.SIGINT)
        after = await screen.until(b"proctor cancel")
        assert await process.wait() == 130
    assert b"\x1b[?25h" in after, "the cursor is shown again"


class Screen:
    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def until(self, words: bytes) -> bytes:
        seen = b""
        with anyio.fail_after(DEADLINE):
            while words not in seen:
                seen += await self._reader.read(4096)
        return seen


@asynccontextmanager
async def terminal() -> AsyncIterator[tuple[Screen, int]]:
    """What a program writes to the terminal, and the terminal's descriptor."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", 0)
    )
    try:
        yield Screen(reader), theirs
    finally:
        transport.close()
        os.close(theirs)

"""The drill's client: evaluations of many kinds, some of which it cancels. It notes what it was promised."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from tests.drills.chaos.history import Submission

TASKS = Path(__file__).parents[1] / "tasks.py"
PAUSE = 0.3
"""Seconds between two tries."""


@dataclass(frozen=True)
class Wish:
    """An evaluation to be; `cancel_after`: seconds from its submission."""

    kind: str
    tag: str
    spec: dict[str, Any]
    samples: int
    ends: Any = "succeeded"
    errored: int = 0
    turns: int | None = None
    cancel_after: float | None = None


LONG_DRILL = 200.0
"""Seconds of faults from which on there are agents that take longer than one push may."""


def wish(number: int, chance: random.Random, flags: Path, seconds: float) -> Wish:
    """The evaluation of that number in a drill of so many seconds."""
    kinds = {
        _plain: 30,
        _many: 14,
        _agent: 28,
        _long_agent: 2 if seconds >= LONG_DRILL else 0,
        _fails_once: 7,
        _crashes_once: 3,
        _fails: 4,
        _fails_within_limits: 4,
        _cancelled: 6,
    }
    (make,) = chance.choices(list(kinds), list(kinds.values()))
    return make(f"e{number}", chance, flags)


def _task(name: str, tag: str, n: int, **arguments: Any) -> dict[str, Any]:
    return {"task": f"{TASKS}@{name}", "model": "mockllm/model", "task_args": {"tag": tag, "n": n, **arguments}}


def _plain(tag: str, chance: random.Random, flags: Path) -> Wish:
    n = chance.randint(1, 5)
    seconds = chance.choice([0, 0.2, 0.5, 1, 2])
    spec = _task("plain", tag, n, seconds=seconds) | {"samples_per_execution": chance.randint(1, 3)}
    return Wish("plain", tag, spec, n)


def _many(tag: str, chance: random.Random, flags: Path) -> Wish:
    n, epochs = chance.randint(10, 30), chance.choice([1, 1, 2])
    spec = _task("plain", tag, n, seconds=0.1) | {"samples_per_execution": chance.randint(8, 20), "epochs": epochs}
    return Wish("many samples", tag, spec, n * epochs)


def _agent(tag: str, chance: random.Random, flags: Path) -> Wish:
    return _conversing(
        "agent", f"{tag}-t{chance.randint(2, 6)}-l2", chance.randint(1, 2), chance.choice(["turn", "off"])
    )


def _long_agent(tag: str, chance: random.Random, flags: Path) -> Wish:
    return _conversing("long agent", f"{tag}-t{chance.randint(22, 26)}-l40", 1, "turn")


def _conversing(kind: str, tag: str, n: int, checkpoint: str) -> Wish:
    """`tag` tells the model provider its script, see `system.script_of`."""
    turns = int(tag.split("-")[1].removeprefix("t"))
    spec = _task("agent", tag, n) | {"model": "openai-api/scripted/agent", "checkpoint": checkpoint}
    return Wish(kind, tag, spec, n, turns=turns)


def _fails_once(tag: str, chance: random.Random, flags: Path) -> Wish:
    n = chance.randint(1, 3)
    return Wish("fails once", tag, _task("plain", tag, n, how="once", flags=str(flags)), n)


def _crashes_once(tag: str, chance: random.Random, flags: Path) -> Wish:
    n = chance.randint(1, 2)
    return Wish("crashes once", tag, _task("plain", tag, n, how="kill", flags=str(flags)), n)


def _fails(tag: str, chance: random.Random, flags: Path) -> Wish:
    n = chance.randint(1, 3)
    return Wish("fails", tag, _task("plain", tag, n, how="raise"), n, ends="failed", errored=1)


def _fails_within_limits(tag: str, chance: random.Random, flags: Path) -> Wish:
    n = chance.randint(2, 4)
    spec = _task("plain", tag, n, how="raise") | {"fail_on_error": False}
    return Wish("fails within limits", tag, spec, n, errored=1)


def _cancelled(tag: str, chance: random.Random, flags: Path) -> Wish:
    n = chance.randint(3, 8)
    wish = Wish("cancelled", tag, _task("plain", tag, n, seconds=1.5), n)
    return replace(wish, cancel_after=chance.uniform(0, 8))


@dataclass
class Client:
    """`flags`: a folder for the tasks'. What is sent is sent until it is answered."""

    http: httpx.AsyncClient
    flags: Path
    seed: int
    submissions: list[Submission] = field(default_factory=list)
    open: int = 0
    """Evaluations that have not been seen to end; kept up to date by whoever looks."""
    _cancelling: set[asyncio.Task[None]] = field(default_factory=set)

    async def warm_up(self, count: int, ended: Callable[[], Awaitable[object]]) -> None:
        """Returns when the workers have done something: only then do they start children as fast as they can."""
        for number in range(count):
            await self.submit(_plain(f"warm{number}", random.Random(number), self.flags))
        await ended()

    async def submit_until(self, enough: Callable[[], bool], most_open: int, pause: float, seconds: float) -> None:
        """One after the other, as long as not too many are open. `seconds`: about how long that will be."""
        number = 0
        while not enough():
            if self.open < most_open:
                number += 1
                self.open += 1
                await self.submit(wish(number, random.Random(f"{self.seed}/{number}"), self.flags, seconds))
            await asyncio.sleep(pause)

    async def submit(self, wish: Wish) -> Submission:
        headers = {"Idempotency-Key": wish.tag}
        view = await self._send("/evaluations", json=wish.spec, headers=headers)
        submission = Submission(
            evaluation=view["id"],
            kind=wish.kind,
            tag=wish.tag,
            samples=wish.samples,
            submitted=time.time(),
            ends=wish.ends,
            errored=wish.errored,
            turns=wish.turns,
            saved=wish.spec.get("checkpoint") == "turn",
        )
        self.submissions.append(submission)
        if wish.cancel_after is not None:
            task = asyncio.create_task(self._cancel(len(self.submissions) - 1, wish.cancel_after))
            self._cancelling.add(task)
        return submission

    async def finish(self) -> None:
        """Returns when every cancellation has been answered."""
        await asyncio.gather(*self._cancelling)

    async def _cancel(self, place: int, after: float) -> None:
        await asyncio.sleep(after)
        submission = self.submissions[place]
        self.submissions[place] = replace(submission, cancelled=time.time())
        await self._send(f"/evaluations/{submission.evaluation}/cancel")

    async def _send(self, path: str, **request: Any) -> dict[str, Any]:
        while True:
            try:
                response = await self.http.post(path, **request)
            except httpx.HTTPError:
                pass
            else:
                if response.is_success:
                    view: dict[str, Any] = response.json()
                    return view
                if response.status_code < 500:
                    raise RuntimeError(f"{path} was refused: {response.status_code} {response.text}")
            await asyncio.sleep(PAUSE)

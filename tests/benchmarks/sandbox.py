"""What isolation costs: a command and a file in Proctor's sandbox, beside Inspect's `local`, which isolates nothing."""

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from inspect_ai.util import SandboxEnvironment
from inspect_ai.util._sandbox.local import LocalSandboxEnvironment  # private: the peer to compare with

from app.runner.messages import Containment
from app.runner.sandbox import ProctorSandbox, contain
from tests.report import Report, Value

TIMES = 60
QUICK = 3

Step = Callable[[SandboxEnvironment], Awaitable[Any]]
STEPS: dict[str, Step] = {
    "a command": lambda sandbox: sandbox.exec(["true"]),
    "a file written": lambda sandbox: sandbox.write_file("file", "x" * 1000),
    "a file read": lambda sandbox: sandbox.read_file("file"),
}


async def measure(quick: bool) -> Report:
    times = QUICK if quick else TIMES
    contain(Containment())
    here = await _milliseconds(ProctorSandbox, times)
    peer = await _milliseconds(LocalSandboxEnvironment, times)
    return Report("sandbox", [_row(what, here[what], peer[what]) for what in here])


def _row(what: str, here: float, peer: float) -> dict[str, Value]:
    return {"what": what, "Proctor ms, p50": here, "local ms, p50": peer, "more, ms": here - peer, "ratio": here / peer}


async def _milliseconds(kind: type[SandboxEnvironment], times: int) -> dict[str, float]:
    """The median of each step, and of a sample's beginning and end."""
    took: dict[str, list[float]] = {what: [] for what in ("a sample's begin and end", *STEPS)}
    for _ in range(max(times // 6, 1)):
        began = time.perf_counter()
        environments = await kind.sample_init("benchmark", None, {})
        opened = time.perf_counter() - began
        for _ in range(6):
            for what, step in STEPS.items():
                began = time.perf_counter()
                await step(environments["default"])
                took[what].append(time.perf_counter() - began)
        began = time.perf_counter()
        await kind.sample_cleanup("benchmark", None, environments, False)
        took["a sample's begin and end"].append(opened + time.perf_counter() - began)
    return {what: statistics.median(seconds) * 1000 for what, seconds in took.items()}

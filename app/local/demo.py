"""A real evaluation, end to end, on this machine: what `make demo` shows."""

import asyncio
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from app import display
from app.addresses import local_path
from app.client import Client, follow
from app.local.stack import Stack, open_stack

DATA = Path(".proctor")
LATENCY = 0.4
"""Seconds that the scripted model takes for a turn, so that there is something to watch. Ours."""

SPEC: dict[str, Any] = {
    "task": "proctor/programming",
    "model": "scripted/agent",
    "model_args": {"latency": LATENCY},
    "tags": {"from": "demo"},
}


def run_demo() -> int:
    """The exit code: 0 if the evaluation succeeded, 130 after Ctrl-C."""
    return asyncio.run(_demo())


async def _demo() -> int:
    began = time.monotonic()
    console = display.console(stderr=True)
    console.print("Starting Postgres, the Cloud Tasks emulator and the service on this machine.")
    async with open_stack(DATA, log_level="error") as stack:
        console.print(f"The system started in {time.monotonic() - began:.1f} s: {stack.url}")
        began = time.monotonic()
        try:
            view = await _watched(stack)
        except asyncio.CancelledError:
            console.print("Stopped. `proctor local` goes on with it.")
            return 130
        console.print(f"The evaluation took {time.monotonic() - began:.1f} s.")
    if view["log"] and (log := local_path(view["log"])):
        says = f"Every transcript is in {log.parent}: {viewing(log.parent)}"
        console.print(says, soft_wrap=True, markup=False, highlight=False)
    console.print("To run your own: proctor local, then proctor submit TASK --model MODEL --wait")
    return 0 if view["state"] == "succeeded" else 1


def viewing(folder: Path) -> str:
    """The command, for a shell, that shows the logs in a folder: by its path, unless the shell finds Proctor's own."""
    own = Path(sys.executable).with_name("inspect")
    inspect = "inspect" if shutil.which("inspect") == str(own) else str(own)
    return shlex.join([inspect, "view", "--log-dir", str(folder)])


async def _watched(stack: Stack) -> dict[str, Any]:
    """The client is what users have, and it blocks: it runs in a thread of its own, and Ctrl-C is ours."""
    main = asyncio.current_task()
    assert main
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, main.cancel)
    return await asyncio.to_thread(_watch, stack.url)


def _watch(url: str) -> dict[str, Any]:
    with Client(url) as client:
        submitted = client.submit(SPEC)
        screen = display.console(stderr=True)
        screen.print(
            f"Evaluation {submitted['id']}: {SPEC['task']} by {SPEC['model']}, a scripted model that needs no key"
        )
        with display.Watch(screen) as watch:
            for seen in follow(client, submitted["id"], every=0.5, details=watch.details):
                watch.update(seen)
        page = client.samples(seen.view["id"])
        display.console().print(display.evaluation(seen.view, page["samples"], more=page["next"] is not None))
        return seen.view

"""Examples of what may happen to the ledger, as many as asked for, on one database and one event loop."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import asyncpg
import hypothesis
import structlog
import uvloop
from hypothesis import HealthCheck, Phase
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import run_state_machine_as_test

from app.database.engine import open_engine
from app.database.session import Database
from app.settings import load
from tests.conftest import own_database
from tests.ledger.machine import LedgerMachine
from tests.ledger.real import World

STEPS = 50
"""In one example: enough for an evaluation to end and to be retried."""
AT_ONCE = 10
"""Examples in one run of Hypothesis: those after the tenth it makes mostly from copies of those before, so that a longer run
sees less of what there is."""

_SETTINGS = hypothesis.settings(
    max_examples=AT_ONCE,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
_UNSHRUNK = hypothesis.settings(_SETTINGS, phases=[Phase.generate], print_blob=False)


@contextmanager
def open_world(postgres: str, folder: Path) -> Iterator[World]:
    """`postgres`: URL of a server with the template database; `folder`: for what Hypothesis writes."""
    set_hypothesis_home_dir(folder)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, structlog.testing.capture_logs():
        stack = AsyncExitStack()
        try:
            yield runner.run(_open(stack, runner, postgres, folder))
        finally:
            runner.run(stack.aclose())
            set_hypothesis_home_dir(None)


async def _open(stack: AsyncExitStack, runner: asyncio.Runner, postgres: str, folder: Path) -> World:
    url = await stack.enter_async_context(own_database(postgres))
    settings = load(database_url=url, scratch=folder, pool_pre_ping=False)
    engine = await stack.enter_async_context(open_engine(settings))
    connection = await asyncpg.connect(url)
    stack.push_async_callback(connection.close)
    run = runner.get_loop().run_until_complete  # the runner's own sees to SIGINT each time, which costs as much again
    return World(engine, Database(engine, settings), connection, run)


def explore(world: World, examples: int, seed: int, *, shrink: bool = True) -> None:
    """Raises what the first failing example raises, its steps in the notes; with `shrink`, as few steps as can be."""
    for n in range(0, examples, AT_ONCE):
        machine = type(LedgerMachine.__name__, (LedgerMachine,), {"world": world})
        run_state_machine_as_test(hypothesis.seed(seed + n)(machine), settings=_SETTINGS if shrink else _UNSHRUNK)

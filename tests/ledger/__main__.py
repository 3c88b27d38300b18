"""`python -m tests.ledger [--examples N] [--seed N] [--mistakes] [--json]`

Holds the ledger against its model in many examples of what may happen to it. `--mistakes`: plants mistakes in its statements
instead, and shows how many examples it takes to find each. Ends with 1 if a goal was not met.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from app.local.postgres import open_postgres
from tests.conftest import make_template
from tests.ledger.explore import explore, open_world
from tests.ledger.mistakes import MISTAKES, examples_to_find
from tests.ledger.pair import Differs
from tests.ledger.real import World
from tests.report import Goal, Report, Value, as_json, show


def model(world: World, examples: int, seed: int) -> Report:
    began = time.monotonic()
    differs = ""
    try:
        explore(world, examples, seed)
    except Differs as error:
        differs = "\n".join([str(error), *getattr(error, "__notes__", [])])
    seconds = time.monotonic() - began
    steps: list[dict[str, Value]] = [{"step": step, "times": times} for step, times in sorted(world.did.items())]
    return Report(
        f"model, seed {seed}, {seconds:.0f} s", steps, [Goal("difference", "none", differs or "none", not differs)]
    )


def mistakes(world: World, seed: int) -> Report:
    rows: list[dict[str, Value]] = []
    found = 0
    for name, mistake in MISTAKES.items():
        began = time.monotonic()
        examples = examples_to_find(world, mistake, seed)
        found += examples is not None
        rows.append({"mistake": name, "found after examples": examples, "seconds": time.monotonic() - began})
    return Report(f"mistakes, seed {seed}", rows, [Goal("found", f"all {len(rows)}", found, found == len(rows))])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ledger", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--mistakes", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ledger-") as name:
        folder = Path(name)
        with open_postgres(folder / "postgres", durable=False) as url:
            asyncio.run(make_template(url))
            with open_world(url, folder) as world:
                seed = arguments.seed
                report = mistakes(world, seed) if arguments.mistakes else model(world, arguments.examples, seed)
    if arguments.json:
        print(as_json(report))
    else:
        show(report)
    return 0 if report.met else 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.drills kills [--kills N] [--samples N] [--seed N] [--json]`

Kills the whole local system (`kill -9`: Postgres, queue, service, children) at random moments of an evaluation, starts it
again each time, and then holds the results against what they must be: every sample has one score, recorded once. An
execution that was lost three times without progress fails, as designed; the drill then asks for a retry, as a user would.
Ends with 1 if a goal was not met.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.local.test_stack import PATIENCE, descendants, gone, local
from tests.report import Goal, Report, Value, as_json, show
from tests.system.conftest import ended, samples, spec, submit

MOST_SECONDS = 15
"""Between a start and the kill, at most: some come before the first child runs, some after samples have ended."""


async def drill(kills: int, count: int, seed: int) -> Report:
    chance = random.Random(seed)
    evaluation = ""
    outlived = 0
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        for _ in range(kills):
            with local(Path(folder, "data")) as (process, url):
                async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                    evaluation = evaluation or await submit(client, spec(task_args={"n": count, "how": "wait:3"}))
                await asyncio.sleep(chance.uniform(0, MOST_SECONDS))
                below = descendants(process)
                process.kill()
                outlived += not gone(below)
        with local(Path(folder, "data")) as (_, url):
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                view, retries = await _to_its_end(client, evaluation, kills)
                rows = await samples(client, evaluation)
                names = ["plan", *range(1, count + 1), "report"]
                executions = [(await client.get(f"/executions/{evaluation}.{name}")).json() for name in names]
    lost = sum(a["outcome"] == "interrupted" for e in executions for a in e["attempts"])
    figures: dict[str, Value] = {
        "seed": seed,
        "kills": kills,
        "samples": count,
        "attempts lost": lost,
        "retries asked for": retries,
    }
    return Report("kills", [figures], [*_goals(view, rows, executions), _none("processes outlived a kill", outlived)])


async def _to_its_end(client: httpx.AsyncClient, evaluation: str, most: int) -> tuple[dict[str, Any], int]:
    """The evaluation as it ended, and how many retries (`most` at most) that took; only what was lost is tried again."""
    retries = 0
    while (view := await ended(client, evaluation))["state"] == "failed" and retries < most:
        if "was lost" not in view["error"]["message"]:
            break
        (await client.post(f"/evaluations/{evaluation}/retry")).raise_for_status()
        retries += 1
    return view, retries


def _goals(view: dict[str, Any], rows: list[dict[str, Any]], executions: list[dict[str, Any]]) -> list[Goal]:
    """Every result is there, and once; `executions` are the plan, one for each sample, and the report."""
    wanted = [(i, i % 2) for i in range(1, len(executions) - 1)]
    found = [(s["id"], s["scores"]["odd"]["value"]) for s in rows if (s["scores"] or {}).get("odd")]
    right = sum(found.count(score) == 1 for score in wanted)
    once = sum([a["outcome"] for a in e["attempts"]].count("succeeded") == 1 for e in executions)
    state = view["state"] if view["error"] is None else f"{view['state']}: {view['error']['message']}"
    return [
        Goal("the evaluation", "succeeded", state, view["state"] == "succeeded"),
        _all("samples with one score, the right one", right, len(wanted)),
        _none("results beyond those", len(rows) - right),
        _all("executions that succeeded once", once, len(executions)),
    ]


def _all(name: str, found: int, wanted: int) -> Goal:
    return Goal(name, f"all {wanted}", found, found == wanted)


def _none(name: str, found: int) -> Goal:
    return Goal(name, "none", found, found == 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = asyncio.run(drill(arguments.kills, arguments.samples, arguments.seed))
    if arguments.json:
        print(as_json(report))
    else:
        show(report)
    return 0 if report.met else 1


if __name__ == "__main__":
    sys.exit(main())

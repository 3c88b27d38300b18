"""`python -m tests.drills [--kills N] [--samples N] [--seed N]`

Kills the whole local system (`kill -9`: Postgres, queue, service, children) at random moments of an evaluation, starts it
again each time, and then holds the results against what they must be: every sample has one score, recorded once. An
execution that was lost three times without progress fails, as designed; the drill then asks for a retry, as a user would.
"""

import argparse
import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.local.test_stack import PATIENCE, descendants, gone, local
from tests.system.conftest import ended, samples, spec, submit

MOST_SECONDS = 15
"""Between a start and the kill, at most: some come before the first child runs, some after samples have ended."""


async def drill(kills: int, count: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    evaluation = ""
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        for _ in range(kills):
            with local(Path(folder, "data")) as (process, url):
                async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                    evaluation = evaluation or await submit(client, spec(task_args={"n": count, "how": "wait:3"}))
                await asyncio.sleep(chance.uniform(0, MOST_SECONDS))
                below = descendants(process)
                process.kill()
                assert gone(below), "a process outlived its parent"
        with local(Path(folder, "data")) as (_, url):
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                retries = 0
                while (view := await ended(client, evaluation))["state"] == "failed" and retries < kills:
                    assert "was lost" in view["error"]["message"], view["error"]
                    (await client.post(f"/evaluations/{evaluation}/retry")).raise_for_status()
                    retries += 1
                rows = await samples(client, evaluation)
                names = ["plan", *range(1, count + 1), "report"]
                executions = [(await client.get(f"/executions/{evaluation}.{name}")).json() for name in names]
    assert view["state"] == "succeeded", view["error"]
    assert [(s["id"], s["scores"]["odd"]["value"]) for s in rows] == [(i, i % 2) for i in range(1, count + 1)]
    assert all([a["outcome"] for a in e["attempts"]].count("succeeded") == 1 for e in executions)
    lost = sum(a["outcome"] == "interrupted" for e in executions for a in e["attempts"])
    return {"seed": seed, "kills": kills, "samples": count, "attempts lost": lost, "retries asked for": retries}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    figures = asyncio.run(drill(arguments.kills, arguments.samples, arguments.seed))
    print(", ".join(f"{name}: {value}" for name, value in figures.items()), "- every result there, and once")


if __name__ == "__main__":
    main()

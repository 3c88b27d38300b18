"""`python -m tests.drills.chaos [--seconds N] [--seed N] [--plant NAME] [--json]`

Two workers, the queue, the sweeper and Postgres behind AlloyDB's stand-in, as processes; evaluations of many kinds; and for
so many seconds everything that can go wrong, drawn from the seed. Then it waits until every evaluation has ended, and holds
the whole history against the rules. Ends with 1 if a goal was not met, and keeps the history then.
"""

import argparse
import asyncio
import random
import sys

from tests.drills.chaos.drill import chaos
from tests.drills.chaos.plants import PLANTS
from tests.report import as_json, show


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.drills.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="how long faults come")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--plant", choices=PLANTS, help="a bug to run with, to see that it is found")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = asyncio.run(chaos(arguments.seconds, arguments.seed, plant=arguments.plant))
    if arguments.json:
        print(as_json(report))
    else:
        show(report)
    return 0 if report.met else 1


if __name__ == "__main__":
    sys.exit(main())

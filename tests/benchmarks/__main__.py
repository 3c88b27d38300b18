"""`python -m tests.benchmarks [NAME …] [--quick] [--json]`"""

import argparse
import asyncio
import json

from tests.benchmarks import at_once

BENCHMARKS = {"at_once": at_once.measure}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, not what it costs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    figures = {name: asyncio.run(BENCHMARKS[name](arguments.quick)) for name in arguments.names or BENCHMARKS}
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, lines in figures.items():
        print(name)
        for what, value in lines.items():
            print(f"  {what:58} {value:>10,.2f}")


if __name__ == "__main__":
    main()

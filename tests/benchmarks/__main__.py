"""`python -m tests.benchmarks [NAME …] [--quick] [--json] [--out FOLDER]`

Ends with 1 if a goal was not met. JSON: one object if one benchmark is named, a list of them otherwise.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog

from tests.benchmarks import at_once, budget, chart, idle_drop, merge, pool, sandbox
from tests.report import Report, as_json, show

BENCHMARKS: dict[str, Callable[[bool], Coroutine[Any, Any, Report]]] = {
    "at_once": at_once.measure,
    "idle_drop": idle_drop.measure,
    "pool": pool.measure,
    "budget": budget.measure,
    "sandbox": sandbox.measure,
    "merge": merge.measure,
}
"""Each takes `quick`: show that it runs, not what it costs."""


CHARTS: dict[str, Callable[[Report], str]] = {"idle_drop": chart.draw}
"""SVG."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, not what it costs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="also write NAME.json there, and NAME.svg if there is one"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    reports = []
    for name in arguments.names or BENCHMARKS:
        reports.append(asyncio.run(BENCHMARKS[name](arguments.quick)))
        if not arguments.json:
            show(reports[-1])
        if arguments.out:
            _write(reports[-1], arguments.out)
    if arguments.json:
        print(as_json(reports[0] if len(arguments.names) == 1 else reports))
    return 0 if all(report.met for report in reports) else 1


def _write(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{report.name}.json").write_text(as_json(report) + "\n")
    if report.name in CHARTS:
        (folder / f"{report.name}.svg").write_text(CHARTS[report.name](report))


if __name__ == "__main__":
    sys.exit(main())

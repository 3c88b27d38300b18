"""Reads samples out of Inspect's logs, in a process of its own: Inspect leaves event loops open in whoever calls it.

`python -m tests.drills.chaos.logs` is that process: files on stdin, one a line; for each a line of JSON on stdout.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.drills.chaos.history import Logged

_LONGEST = 2**24


class Logs:
    """A reader at work."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def read(self, root: Path, paths: Iterable[str]) -> list[Logged]:
        """What these logs below `root` hold; one that cannot be read holds nothing."""
        found = []
        for path in paths:
            found += [Logged(log=path, **sample) for sample in await self._ask(root / path)]
        return found

    async def _ask(self, file: Path) -> list[dict[str, Any]]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{file}\n".encode())
        await self._process.stdin.drain()
        answer: list[dict[str, Any]] = json.loads(await self._process.stdout.readline())
        return answer


@asynccontextmanager
async def open_logs() -> AsyncIterator[Logs]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.drills.chaos.logs"),
        cwd=Path(__file__).parents[3],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST,
    )
    try:
        yield Logs(process)
    finally:
        process.kill()
        await process.communicate()


def main() -> None:
    for line in sys.stdin:
        file = line.rstrip("\n")
        try:
            samples = _samples(file)
        except Exception as error:
            print(f"{file} cannot be read: {error!r}", file=sys.stderr)
            samples = []
        print(json.dumps(samples), flush=True)


def _samples(file: str) -> list[dict[str, Any]]:
    from inspect_ai.log import read_eval_log, read_eval_log_sample_summaries

    metadata = read_eval_log(file, header_only=True).eval.metadata or {}
    return [
        {
            "sample": str(sample.id),
            "epoch": sample.epoch,
            "scores": {name: score.value for name, score in (sample.scores or {}).items()},
            "errored": sample.error is not None,
            "execution": metadata.get("execution_id"),
            "attempt": metadata.get("attempt"),
        }
        for sample in read_eval_log_sample_summaries(file)
        if sample.completed
    ]


if __name__ == "__main__":
    main()

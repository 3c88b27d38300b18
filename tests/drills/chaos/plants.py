"""Bugs to be planted in the real code, to see that the checker finds them.

`python -m tests.drills.chaos.plants NAME serve` is a worker that has one.
"""

import asyncio
import itertools
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import Text, bindparam, text

import app.evaluations.submit
import app.ledger_statements as sql
import app.queue
import app.web.tasks
from app.artifacts import Artifacts
from app.execution import Answer, Executor, Push

SetAttribute = Callable[[Any, str, Any], None]
"""`setattr`, or one that can be undone."""


def no_fence(put: SetAttribute) -> None:
    """A stale attempt records and settles, and is never told that it is stale."""
    _rewrite(put, "RECORD", "AND attempt = :attempt AND state", "AND state")
    _rewrite(put, "SETTLE", "WHEN t.attempt = :attempt AND t.state", "WHEN t.state")
    _rewrite(put, "RENEW", "AND e.attempt = m.attempt WHERE", "WHERE")


def early_2xx(put: SetAttribute) -> None:
    """A push is acknowledged when its work has begun."""
    execute = Executor.execute
    under_way = set[asyncio.Task[Answer]]()

    async def begin(self: Executor, push: Push) -> Answer:
        under_way.add(task := asyncio.create_task(execute(self, push)))
        task.add_done_callback(under_way.discard)
        return Answer("terminal", push.execution_id, "It has begun.")

    put(Executor, "execute", begin)


def no_outbox(put: SetAttribute) -> None:
    """What was to be enqueued and was not (here each fourth plan, as if its worker had died just then), or was lost by the
    queue, nobody remembers."""
    enqueue, submitted = app.queue.enqueue, itertools.count(1)

    async def find_nothing(*_: Any) -> int:
        return 0

    async def mostly(*arguments: Any) -> int:
        return await enqueue(*arguments) if next(submitted) % 4 else 0

    put(app.web.tasks, "enqueue_due", find_nothing)
    put(app.evaluations.submit, "enqueue", mostly)


def double_report(put: SetAttribute) -> None:
    """A report that was delivered again reports again."""
    ended_too = "WHEN t.state = 'pending' OR (t.kind = 'report' AND t.state = 'succeeded') THEN 'claimed'"
    _rewrite(put, "CLAIM", "WHEN t.state = 'pending' THEN 'claimed'", ended_too)


def stale_artifact(put: SetAttribute) -> None:
    """All attempts write to the first one's folder, and what counts may be anybody's."""
    url = Artifacts.url

    def of_the_first(self: Artifacts, *parts: str | int) -> str:
        return url(self, *parts[:2], *((1, *parts[3:]) if len(parts) > 2 else ()))

    put(Artifacts, "url", of_the_first)


PLANTS: dict[str, Callable[[SetAttribute], None]] = {
    "no-fence": no_fence,
    "early-2xx": early_2xx,
    "no-outbox": no_outbox,
    "double-report": double_report,
    "stale-artifact": stale_artifact,
}


def _rewrite(put: SetAttribute, name: str, old: str, new: str) -> None:
    """The statement with other words."""
    statement = getattr(sql, name).text
    assert old in statement, f"{name} does not say {old!r} any more"
    changed = text(statement.replace(old, new))
    put(sql, name, changed.bindparams(*(bindparam(p, type_=sql._TYPES.get(p, Text())) for p in changed._bindparams)))


def main() -> None:
    _, name, *arguments = sys.argv
    PLANTS[name](setattr)
    from app.cli import main as proctor

    sys.argv = ["proctor", *arguments]
    proctor()


if __name__ == "__main__":
    main()

"""What becomes of pooled connections, counted where the pool tells of it."""

import asyncio
from typing import Any

from opentelemetry.metrics import Meter
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from app.database.failures import state_of, this_server_is_gone
from app.metrics import PoolFigures, Replaced

_OPENED = "proctor.opened"


def watch(engine: AsyncEngine, meters: Meter, recycle: float) -> None:
    """`recycle`: seconds of age past which the pool replaces a connection."""
    figures = PoolFigures(meters, lambda: _in_use(engine))

    def on_connect(_: Any, record: Any) -> None:
        """The pool tells of no replacement for age; but a record that opens another connection, and was not told to be
        invalid, had one that was too old, or older than one that broke. By the pool's own clock, which counts from before
        a login, and was last read when it replaced the connection."""
        opened = record.record_info.get(_OPENED)
        if opened is not None:
            figures.replaced("recycle" if record.last_connect_time - opened > recycle else "doubted")
        record.record_info[_OPENED] = record.last_connect_time

    def on_invalidate(_: Any, record: Any, error: BaseException | None) -> None:
        if record.record_info.pop(_OPENED, None) is not None:
            figures.replaced(_cause(error))

    event.listen(engine.sync_engine, "connect", on_connect)
    event.listen(engine.sync_engine, "invalidate", on_invalidate)


def _in_use(engine: AsyncEngine) -> int:
    pool = engine.sync_engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


def _cause(error: BaseException | None) -> Replaced:
    if error is None or isinstance(error, TimeoutError | asyncio.CancelledError):
        return "timeout"  # its session cut it: too slow, or not wanted any more
    if isinstance(error, InvalidatePoolError):
        return "ping"
    return "server gone" if this_server_is_gone(state_of(error)) else "broken"

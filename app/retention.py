"""What evaluations that are over need not keep any more: a sweep deletes it, a little at a time.

Results stay for good, and so does the history of attempts: it is small, and says by which versions and at what cost the
results came about. What goes by age, counted from the evaluation's end, is in the artifacts: transcripts with all logs, and
before that the checkpoints that a lost worker left behind.

The ledger says whose turn it is, in one brief statement; files are deleted outside any session, and only when all are gone
the row says so. Whatever dies in between is done again by a later sweep.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from app.artifacts import Artifacts
from app.errors import ProctorError
from app.ledger import Kept, Ledger
from app.ledger_statements import EXPIRED_AT_ONCE
from app.saved import Saved

SECONDS = 5.0
"""For one sweep to delete in. Ours: a sweep is made each minute, and what it does not get to is the next one's."""

FILES = 400
"""Deleted at a time, between two looks at the clock. Ours: a second's worth in a bucket, at some 50 ms each, with…"""

AT_ONCE = 16
"""…so many at once."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Swept:
    """Evaluations of which nothing of that is left."""

    transcripts: int
    checkpoints: int


@dataclass(frozen=True)
class Retention:
    """`keep_…`: days; None: for ever."""

    ledger: Ledger
    artifacts: Artifacts
    saved: Saved
    keep_transcripts: float | None
    keep_checkpoints: float | None

    async def sweep(self, seconds: float = SECONDS) -> Swept:
        """Many at once do no harm: each evaluation is one sweep's."""
        until = time.monotonic() + seconds
        transcripts = await self._sweep("transcripts", self.keep_transcripts, until)
        return Swept(transcripts, await self._sweep("checkpoints", self.keep_checkpoints, until))

    async def _sweep(self, what: Kept, days: float | None, until: float) -> int:
        """How many are rid of it."""
        total = 0
        while days is not None and time.monotonic() < until:
            batch = await self.ledger.expire(what, days=days)
            for expired in batch:
                evaluation = str(expired.evaluation_id)
                try:
                    done = time.monotonic() < until and await self._delete(what, evaluation, until)
                except ProctorError:
                    raise
                except Exception as error:  # each store has its own, not all of them OSErrors
                    # after a minute's tries: enough for this sweep; and others go first until this one's lease is over
                    log.warning(f"{what} could not be deleted", evaluation=evaluation, reason=str(error))
                    until = 0
                else:
                    await self.ledger.expired(what, expired, done=done)
                    total += done
            if len(batch) < EXPIRED_AT_ONCE:
                break
        return total

    async def _delete(self, what: Kept, evaluation: str, until: float) -> bool:
        """Whether all is gone. Some always is, however long it took to list it."""
        if what == "transcripts":
            folders = self.artifacts.url(evaluation), self.artifacts.transcripts.url(evaluation)
            groups: Sequence[list[str]] = [[f"{f}/{name}" for name in await self.artifacts.names(f)] for f in folders]
        else:
            groups = await self.saved.left_behind(evaluation)
        steps = [group[n : n + FILES] for group in groups for n in range(0, len(group), FILES)]
        for left, some in zip(reversed(range(len(steps))), steps, strict=True):
            parts = [some[n::AT_ONCE] for n in range(min(AT_ONCE, len(some)))]
            # all are heard out before the first error is told: no thread goes on deleting when nobody minds it
            for answer in await asyncio.gather(*map(self.artifacts.delete, parts), return_exceptions=True):
                if answer is not None:
                    raise answer
            if left and time.monotonic() >= until:
                return False
        return True

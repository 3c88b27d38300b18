"""Mistakes to plant in the ledger's statements, to see that the comparison with its model finds them."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError

from app import ledger_statements as sql
from app.errors import DataRefused
from tests.ledger.explore import explore
from tests.ledger.pair import Differs
from tests.ledger.real import World

MOST = 500
"""Examples to look for one mistake in. It takes 30 at most."""

Mistake = tuple[str, str, str]
"""The statement, what it says, and what it says by mistake."""

_NEWEST = "t.attempt = :attempt AND t.state = 'running'"
_LEFT = "t.lease_expires_at <= clock_timestamp()"
_SOON = "sweep_at = clock_timestamp() + make_interval(secs => :sweep)"

MISTAKES: dict[str, Mistake] = {
    "a lost reply to a claim strands it": ("CLAIM", "t.claim_id = :claim_id", "false"),
    "a lease never runs out": ("CLAIM", _LEFT, "false"),
    "a lease that lasts is taken over": ("CLAIM", _LEFT, "true"),
    "a claim does not raise the attempt": ("CLAIM", "d.attempt + 1", "greatest(d.attempt, 1)"),
    "a take-over does not count as a crash": ("CLAIM", "d.crashes + (d.verdict = 'taken over')::int", "d.crashes"),
    "an attempt that was taken over stays open": ("CLAIM", "WHERE d.verdict = 'taken over' AND", "WHERE false AND"),
    "anybody records": ("RECORD", "AND attempt = :attempt AND state = 'running'", ""),
    "a stale attempt records": ("RECORD", "attempt = :attempt AND state = 'running'", "state = 'running'"),
    "an attempt that has ended records": ("RECORD", " AND state = 'running'", ""),
    "a sample is no progress": ("RECORD", "AND t.crashes > 0", "AND false"),
    "the same error again is progress": ("RECORD", "r.xmax = 0 OR r.error IS NULL", "true"),
    "a score is replaced": ("RECORD", "r.error IS NOT NULL AND ", ""),
    "an error is never replaced": ("SETTLE", "r.error IS NOT NULL AND ", "false AND "),
    "a settle that is sent twice counts twice": ("SETTLE", _NEWEST, "t.attempt = :attempt"),
    "a stale attempt settles": ("SETTLE", _NEWEST, "t.state = 'running'"),
    "the claim of an attempt that has ended is known for ever": ("SETTLE", "claim_id = NULL, ", ""),
    "a lost child does not count as a crash": ("SETTLE", "(:crashed)::int", "0"),
    "a failure too many is allowed": ("SETTLE", "t.failures + 1 <", "t.failures <"),
    "an interruption is charged": ("SETTLE", "(:outcome = 'failed')::int", "(:outcome <> 'succeeded')::int"),
    "a cancelled plan fans out": ("SETTLE", "WHERE c.fan_out", ""),
    "no settle brings the report": ("SETTLE", "AND c.remaining = 0", "AND c.remaining < 0"),
    "the report of a cancelled evaluation succeeds": ("SETTLE", "WHEN v.cancel_requested_at IS NULL", "WHEN true"),
    "a report again has the old number": ("SETTLE", "enqueues = e.enqueues + 1", "enqueues = e.enqueues"),
    "a stale attempt renews": ("RENEW", " AND e.attempt = m.attempt WHERE", " WHERE"),
    "a lease that ran out cannot be renewed": ("RENEW", "e.state = 'running'", "e.lease_expires_at > now()"),
    "a renewal without progress forgets it": ("RENEW", "coalesce(h.progress, e.progress)", "h.progress"),
    "a cancellation forgets what remains": ("CANCEL", "v.remaining - n.n", "v.remaining"),
    "a cancellation ends what runs": ("CANCEL", "state = 'pending' AND kind", "state <> 'succeeded' AND kind"),
    "no cancellation brings the report": ("CANCEL", "f.remaining = 0 AND f.n > 0", "false"),
    "each cancellation brings the report": ("CANCEL", "f.remaining = 0 AND f.n > 0", "f.remaining = 0"),
    "a retry forgets what remains": ("REOPEN", "remaining = :remaining", "remaining = 1"),
    "a retry keeps the wish to cancel": ("REOPEN", "cancel_requested_at = NULL, ", ""),
    "a retry keeps the failures": ("REARM", "failures = 0, ", ""),
    "a retry forgets what was cancelled": ("REARM", "('failed', 'cancelled')", "('failed')"),
    "what is taken stays due": ("TAKE_DUE", _SOON, "sweep_at = e.sweep_at"),
    "what is taken keeps its number": ("TAKE_DUE", "e.enqueues + 1", "e.enqueues"),
    "an old Cloud Task counts for the new one": ("ENQUEUED", "AND e.enqueues = n.number", ""),
    "a Cloud Task counts for what runs": ("ENQUEUED", "e.state = 'pending'", "e.sweep_at IS NOT NULL"),
    "what runs is not due after a purge": ("ALL_DUE", "IN ('pending', 'running')", "IN ('pending')"),
}


@contextmanager
def planted(mistake: Mistake) -> Iterator[None]:
    name, right, wrong = mistake
    statement = getattr(sql, name)
    if right not in statement.text:
        raise LookupError(f"{name} no longer says {right!r}: plant the mistake in what it says now.")
    setattr(sql, name, sql._statement("planted", statement.text.replace(right, wrong)))
    try:
        yield
    finally:
        setattr(sql, name, statement)


def examples_to_find(world: World, mistake: Mistake, seed: int) -> int | None:
    """How many it took; None: it was not found."""
    before = world.did["example"]
    try:
        with planted(mistake):
            explore(world, MOST, seed, shrink=False)
    except (Differs, DBAPIError, DataRefused):  # the tables' CHECKs find some
        return world.did["example"] - before
    return None

"""The queues as DESIGN wants them: they keep delivering, the ledger decides when to give up."""

from app.cloud.place import QUEUE

MAX_ATTEMPTS = -1
"""Unlimited."""

MAX_RETRY_DURATION = 0
"""Seconds; 0: unlimited."""

MIN_BACKOFF, MAX_BACKOFF = 5, 60
"""Seconds."""

MAX_DOUBLINGS = 4

DISPATCHES_PER_SECOND = 500
"""Source: the most that Cloud Tasks allows. How many run at once is what bounds the load."""


def settings_of(concurrent_dispatches: int) -> list[str]:
    """Flags of `gcloud tasks queues create` and `update`."""
    return [
        f"--max-attempts={MAX_ATTEMPTS}",
        f"--max-retry-duration={MAX_RETRY_DURATION}s",
        f"--min-backoff={MIN_BACKOFF}s",
        f"--max-backoff={MAX_BACKOFF}s",
        f"--max-doublings={MAX_DOUBLINGS}",
        f"--max-dispatches-per-second={DISPATCHES_PER_SECOND}",
        f"--max-concurrent-dispatches={concurrent_dispatches}",
    ]


def shares(names: tuple[str, ...], concurrent_dispatches: int) -> dict[str, int]:
    """How many each of several queues may dispatch at once, so that together they fit. The first gets what is left over."""
    share = max(1, concurrent_dispatches // len(names))
    return {names[0]: concurrent_dispatches - share * (len(names) - 1)} | dict.fromkeys(names[1:], share)


ONE = (QUEUE,)

"""A plan of any number of samples, as messages that one at a time are short to write and to read."""

from collections.abc import Iterable, Iterator
from itertools import chain

from app.runner.messages import Listed, Message, Planned

SAMPLES = 1_000
"""Of one message. Ours: with ids of 1,000 bytes, all of which JSON escapes, 6 MB."""


def in_parts(message: Message, size: int = SAMPLES) -> Iterator[Message]:
    """The plan itself comes last, with the rest of the samples; any other message is one part."""
    if isinstance(message, Planned):
        yield from _plan_in_parts(message, size)
    else:
        yield message


def _plan_in_parts(plan: Planned, size: int) -> Iterator[Message]:
    last = max(len(plan.samples), len(plan.digests)) - 1
    full = max(last, 0) // size * size
    for i in range(0, full, size):
        yield Listed(samples=plan.samples[i : i + size], digests=plan.digests[i : i + size])
    yield plan.model_copy(update={"samples": plan.samples[full:], "digests": plan.digests[full:]})


def whole(parts: Iterable[Listed], plan: Planned) -> Planned:
    """What `in_parts` took apart."""
    everything: list[Listed | Planned] = [*parts, plan]
    samples = tuple(chain.from_iterable(part.samples for part in everything))
    digests = tuple(chain.from_iterable(part.digests for part in everything))
    return plan.model_copy(update={"samples": samples, "digests": digests})

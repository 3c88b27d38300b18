"""When evaluations come, and how long they last: the same for every row of the benchmark, by seed.

Each worker gets batches: twelve to fifteen evaluations within a second, then a pause in which its connections fall idle.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

SHORTEST, LONGEST = 3.0, 18.0
"""Seconds of one evaluation: 5 to 30 minutes, scaled 100 : 1."""
PAUSE = 6.0
"""Seconds between two batches of a worker on average, exponential: as long as the network lets a connection idle."""
FEWEST, AT_ONCE = 12, 15
"""Evaluations of one worker at the same time; at most containerConcurrency."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """`at`: seconds after the batch began; `lasts`: seconds."""

    number: int
    at: float
    lasts: float


@dataclass(frozen=True, slots=True)
class Batch:
    """`pause`: seconds after the end of the one before."""

    pause: float
    arrivals: tuple[Arrival, ...]


def plan(seed: int, evaluations: int, workers: int) -> list[list[Batch]]:
    """For each worker its batches; `evaluations` in all, numbered from 1. The n-th worker's first batches are the same
    whatever the numbers asked for."""
    batches: list[list[Batch]] = [[] for _ in range(workers)]
    streams = [_stream(random.Random(f"{seed} {worker}")) for worker in range(workers)]
    given = 0
    while given < evaluations:
        for mine, stream in zip(batches, streams, strict=True):
            pause, drawn = next(stream)
            drawn = drawn[: evaluations - given]
            if drawn:
                arrivals = tuple(Arrival(given + n, at, lasts) for n, (at, lasts) in enumerate(drawn, 1))
                mine.append(Batch(pause, arrivals))
                given += len(drawn)
    return batches


def renumbered(batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
    """The evaluations of some of the workers, counted from 1."""
    numbers = count(1)
    return [
        [replace(batch, arrivals=tuple(replace(a, number=next(numbers)) for a in batch.arrivals)) for batch in mine]
        for mine in batches
    ]


def _stream(chance: random.Random) -> Iterator[tuple[float, list[tuple[float, float]]]]:
    while True:
        size = chance.randint(FEWEST, AT_ONCE)
        yield chance.expovariate(1 / PAUSE), [(chance.random(), chance.uniform(SHORTEST, LONGEST)) for _ in range(size)]

"""The ledger does what its model foretells, whatever happens in whatever order; and the comparison can fail.

Each run makes examples of its own. Many more, and all mistakes: ``python -m tests.ledger``.
"""

import random
from collections.abc import Iterator

import pytest

from tests.ledger.explore import explore, open_world
from tests.ledger.mistakes import MISTAKES, examples_to_find, planted
from tests.ledger.real import World

EXAMPLES = 40
HAPPENS = (
    *("claim: claimed", "claim: taken over", "claim: yours", "claim: held", "claim: over"),
    *("record: held", "record: stale", "renew: held", "renew: lost", "renew: to be cancelled"),
    *("settle: recorded", "settle: already", "settle: stale", "cancel: running", "retry: armed"),
    *("sweep: some", "enqueued: noted", "everything: delivered", "look: same", "lost: answer", "lost: connection"),
)
QUICKLY_FOUND = (
    "a claim does not raise the attempt",
    "a take-over does not count as a crash",
    "anybody records",
    "a score is replaced",
    "a settle that is sent twice counts twice",
    "a retry forgets what remains",
)


@pytest.fixture(scope="module")
def world(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(postgres, tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def seed() -> int:
    """Shown if the test fails: the same examples again with ``python -m tests.ledger --seed N``."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


@pytest.mark.timeout(600)  # a failure is made shorter for up to 300 s
def test_the_ledger_does_what_its_model_foretells(world: World, seed: int) -> None:
    explore(world, EXAMPLES, seed)
    assert [what for what in HAPPENS if not world.did[what]] == [], "it tries less than it should"


@pytest.mark.parametrize("mistake", QUICKLY_FOUND)
def test_a_mistake_in_a_statement_is_found(world: World, seed: int, mistake: str) -> None:
    assert examples_to_find(world, MISTAKES[mistake], seed)


def test_each_mistake_can_be_planted() -> None:
    """The others are looked for by ``python -m tests.ledger --mistakes``."""
    for mistake in MISTAKES.values():
        with planted(mistake):
            pass

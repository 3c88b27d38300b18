"""The ledger does what its model foretells, whatever happens in whatever order; and the comparison can fail.

Each run makes examples of its own. Many more: ``python -m tests.ledger``.
"""

import random
from collections.abc import Iterator

import pytest

from tests.ledger.explore import explore, open_world
from tests.ledger.mistakes import MISTAKES, examples_to_find
from tests.ledger.real import World

EXAMPLES = 40


@pytest.fixture(scope="module")
def world(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(postgres, tmp_path_factory.mktemp("machine")) as world:
        yield world


@pytest.fixture
def seed() -> int:
    """Of its own each time, and shown if the test fails: the same with ``python -m tests.ledger --seed N``."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


def test_the_ledger_does_what_its_model_foretells(world: World, seed: int) -> None:
    explore(world, EXAMPLES, seed)
    print(dict(sorted(world.did.items())))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(world: World, seed: int, mistake: str) -> None:
    assert examples_to_find(world, MISTAKES[mistake], seed) is not None

import pytest
from inspect_ai.model import ModelCost, ModelUsage, compute_model_cost

from app.prices import Price, Tier
from app.runner.costs import _cost, _listed

USAGE = ModelUsage(
    input_tokens=100_000, input_tokens_cache_read=90_000, input_tokens_cache_write=10_000, output_tokens=1_000
)


def test_a_call_costs_what_plain_inspect_says_at_the_same_rates() -> None:
    cost = ModelCost(input=3, output=15, input_cache_read=0.3, input_cache_write=3.75)
    price = Price(input=3, output=15, cache_read=0.3, cache_write=3.75)
    for ttl in (None, "1h"):
        assert _cost(_listed(price), USAGE, ttl) == _cost(cost, USAGE, ttl) == compute_model_cost(cost, USAGE, ttl)


def test_a_call_with_a_long_input_costs_the_tiers_rates_and_cached_tokens_count_as_input() -> None:
    price = Price(input=1, output=1, tiers=(Tier(over=199_999, input=2, output=3),))
    assert _cost(_listed(price), USAGE) == pytest.approx(0.2 * 2 + 0.001 * 3)
    shorter = USAGE.model_copy(update={"input_tokens": 99_999})
    assert _cost(_listed(price), shorter) == pytest.approx(0.199_999 * 1 + 0.001 * 1)


@pytest.mark.parametrize(
    ("thought", "dollars"), [(400, 0.6 * 2 + 0.4 * 5), (None, 1.0 * 2), (1_500, 1.0 * 2 + 1.5 * 5)]
)
def test_thoughts_are_part_of_the_output_unless_there_are_more_of_them(thought: int | None, dollars: float) -> None:
    usage = ModelUsage(output_tokens=1_000, reasoning_tokens=thought)
    assert _cost(_listed(Price(input=1, output=2, reasoning=5)), usage) == pytest.approx(dollars / 1_000)

import json
from pathlib import Path

import pytest

from app.errors import InvalidRequest, SettingsError
from app.evaluations.billing import Billing
from app.prices import Price, Prices, Rates, Tier
from app.settings import load
from app.spec import Spec

OWN = {"openai/gpt-5": {"input": 1, "output": 2}, "openai-api/local/*": {"input": 0, "output": 0}}


def _load(value: str) -> Prices:
    return Prices(load(database_url="postgresql://u:p@h/n", model_prices=value).model_prices)


@pytest.mark.parametrize(
    "model",
    [
        "openai/gpt-4o",
        "openai/azure/gpt-4o",
        "azureai/gpt-4o",
        "anthropic/claude-3-5-haiku-latest",
        "anthropic/bedrock/anthropic.claude-sonnet-4-5-20250929-v1:0",
        "anthropic/vertex/claude-sonnet-4-5@20250929",
        "bedrock/us.anthropic.claude-sonnet-4-5-20250929-v1:0",
        "google/gemini-2.5-pro",
        "google/vertex/gemini-2.5-pro",
        "openrouter/openai/gpt-4o",
        "openrouter/openai/gpt-4o:nitro",
        "openai-api/deepseek/deepseek-chat",
        "grok/grok-4",
        "groq/llama-3.3-70b-versatile",
    ],
)
def test_a_providers_models_have_prices_however_they_are_reached(model: str) -> None:
    price = Prices().of(model)
    assert price is not None
    assert 0 < price.input < price.output


@pytest.mark.parametrize("model", ["openai/none-such", "openai-api/local/m", "ollama/m", "mockllm/model", "x", ""])
def test_an_unknown_model_has_none(model: str) -> None:
    assert Prices().of(model) is None


def test_own_prices_go_before_others(tmp_path: Path) -> None:
    file = tmp_path / "own prices.json"
    file.write_text(json.dumps(OWN))
    for prices in (_load(json.dumps(OWN)), _load(str(file))):
        assert prices.of("openai/gpt-5") == Price(input=1, output=2)
        assert prices.of("openai-api/local/m") == Price(input=0, output=0)
        assert prices.of("openai/gpt-4o") == Prices().of("openai/gpt-4o")
        assert prices.source().startswith("own (")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "nvalid JSON"),
        ("no-such-file", "No such file"),
        ('{"a/b": {"input": 1}}', "a/b → output: Field required"),
        ('{"a/b": {"input": -1, "output": 1}}', "a/b → input: Input should be greater than or equal to 0"),
        ('{"a/b": {"input": 1e999, "output": 1}}', "a/b → input: Input should be a finite number"),
        ('{"a/b": {"input": 1, "output": 1, "cached": 1}}', "a/b → cached: Extra inputs"),
        ('{"a/b": 1}', "a/b: Input should be"),
    ],
)
def test_own_prices_that_are_none_are_refused_in_one_line(value: str, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        _load(value)
    assert says in str(refused.value)
    assert "PROCTOR_MODEL_PRICES" in str(refused.value)


def test_a_call_is_billed_whole_at_the_highest_tier_that_its_input_passes() -> None:
    tiers = (Tier(over=100, input=2, output=2), Tier(over=200, input=3, output=3))
    price = Price(input=1, output=1, tiers=tiers)
    assert [price.rates(tokens).input for tokens in (100, 101, 200, 201)] == [1, 2, 2, 3]
    assert Prices().of("google/gemini-2.5-pro").rates(10**6) != Rates(input=1.25, output=10)  # type: ignore[union-attr]


async def test_a_limit_on_costs_without_prices_is_refused_for_each_model_and_says_what_to_do() -> None:
    spec = Spec(task="a/b", model="openai/gpt-4o", model_roles={"grader": "ollama/m"}, cost_limit=1)
    with pytest.raises(InvalidRequest, match=r"'ollama/m'.*PROCTOR_MODEL_PRICES"):
        await Billing().check(spec)
    await Billing().check(spec.model_copy(update={"cost_limit": None}))
    await Billing(Prices({"ollama/*": Price(input=0, output=0)})).check(spec)


async def test_a_model_without_a_price_is_told_of_and_one_that_nobody_bills_is_not() -> None:
    (note,) = await Billing().notes(Spec(task="a/b", model="ollama/m"))
    assert "'ollama/m'" in note
    assert await Billing().notes(Spec(task="a/b", model="mockllm/model", model_roles={"grader": "openai/gpt-4o"})) == []

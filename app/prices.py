"""What models cost, without asking anybody: the operator's own prices, else those that the package `genai-prices` brings.

Nothing here imports Inspect: the service tells at submit which models have no price, and children bill by the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]

FREE = ("mockllm/", "scripted/", "none/")
"""Models that nobody bills."""

_PROVIDERS = {
    "anthropic": "anthropic",
    "azureai": "azure",
    "bedrock": "aws",
    "cloudflare": "cloudflare",
    "deepseek": "deepseek",
    "fireworks": "fireworks",
    "google": "google",
    "grok": "x-ai",
    "groq": "groq",
    "meta": "meta",
    "mistral": "mistral",
    "moonshot": "moonshotai",
    "openai": "openai",
    "openrouter": "openrouter",
    "perplexity": "perplexity",
    "together": "together",
}
"""Inspect's names of providers, and the package's."""

_CLOUDS = {"azure": "azure", "bedrock": "aws", "vertex": "google"}
"""By whom a model is served, where Inspect has it between provider and name: `anthropic/bedrock/NAME`."""

_ANY_SERVICE = ("openai-api", "openai-api-completions")
"""`openai-api/SERVICE/NAME`: the service is a provider if the package knows one of that name."""


class Rates(BaseModel):
    """US dollars for a million tokens. Default of both cached kinds: as input; of `reasoning`: as output, which it is part
    of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Dollars
    output: Dollars
    cache_read: Dollars | None = None
    cache_write: Dollars | None = None
    reasoning: Dollars | None = None


class Tier(Rates):
    """Rates of a whole call whose input has more than `over` tokens, cached ones among them."""

    over: int = Field(gt=0)


class Price(Rates):
    tiers: tuple[Tier, ...] = ()

    def rates(self, input_tokens: int) -> Rates:
        """Those of a call with so much input."""
        reached = [tier for tier in self.tiers if input_tokens > tier.over]
        return max(reached, key=lambda tier: tier.over, default=self)


OwnPrices = dict[str, Price]
"""By a model's name in Inspect's form, or a pattern of such."""
_OWN = TypeAdapter(OwnPrices)


@dataclass(frozen=True)
class Prices:
    """`free`: whether models that nobody bills have a price, of nothing."""

    own: Mapping[str, Price] = field(default_factory=dict)
    free: bool = False

    def of(self, model: str) -> Price | None:
        """The price now; None: it is not known."""
        if model in self.own:
            return self.own[model]
        for pattern, price in self.own.items():
            if fnmatchcase(model, pattern):
                return price
        if model.startswith(FREE):
            return Price(input=0, output=0) if self.free else None
        return _known(model, datetime.now(UTC))

    def missing(self, models: Iterable[str]) -> list[str]:
        """Those without a price."""
        return [model for model in dict.fromkeys(models) if self.of(model) is None]

    def source(self) -> str:
        """Where prices come from, and of when they are."""
        if not self.own:
            return f"genai-prices {version('genai-prices')} of {_newest():%Y-%m-%d}"
        own = _OWN.dump_json(dict(sorted(self.own.items())))
        return f"own ({sha256(own).hexdigest()[:8]}), else {Prices().source()}"


def own_prices(value: Any) -> Any:
    """The setting: JSON, or a file of it. Raises ValueError in one line."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text and not text.startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(f"must be JSON or a file with it; {value!r}: {reason}") from error
    try:
        return _OWN.validate_json(text or "{}", strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = " → ".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}. {_FORM}" if where else f"{first['msg']}. {_FORM}") from error


_FORM = (
    'It is like {"openai/gpt-5": {"input": 1.25, "output": 10, "cache_read": 0.125}}, in US dollars per million tokens.'
)


def _known(model: str, at: datetime) -> Price | None:
    from genai_prices.data_snapshot import get_snapshot  # half a second, which the service's start need not wait for

    provider, name = _reference(model)
    if not provider or not name:
        return None
    try:
        _, found = get_snapshot().find_provider_model(name, None, provider, None)
    except LookupError:
        return None
    return _price(vars(found.get_prices(at)))


def _reference(model: str) -> tuple[str | None, str]:
    """The package's provider and the model's name there."""
    provider, _, name = model.partition("/")
    service, slash, rest = name.partition("/")
    if provider in _ANY_SERVICE:
        return _services().get(service.lower().replace("_", "-")), rest
    if slash and service in _CLOUDS and provider in _PROVIDERS:
        return _CLOUDS[service], rest
    if provider == "openrouter":
        name, _, variant = name.partition(":")
        return (None, "") if variant == "free" else ("openrouter", name)
    return _PROVIDERS.get(provider), name


@cache
def _services() -> dict[str, str]:
    from genai_prices.data_snapshot import get_snapshot

    named = {provider.id: provider.id for provider in get_snapshot().providers}
    return named | _PROVIDERS


def _price(listed: Mapping[str, Any]) -> Price | None:
    """None: it is not billed by tokens."""
    starts = sorted({tier.start for price in listed.values() for tier in getattr(price, "tiers", ())})
    base = _rates(listed, 0)
    if base is None:
        return None
    tiers = [(start, _rates(listed, start + 1)) for start in starts if start > 0]
    return Price(**base, tiers=tuple(Tier(over=start, **rates) for start, rates in tiers if rates))


_KEYS = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cache_read": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "reasoning": "output_reasoning_mtok",
}


def _rates(listed: Mapping[str, Any], input_tokens: int) -> dict[str, float] | None:
    rates = {
        ours: _rate(listed[theirs], input_tokens) for ours, theirs in _KEYS.items() if listed.get(theirs) is not None
    }
    return rates if rates.keys() >= {"input", "output"} else None


def _rate(price: Any, input_tokens: int) -> float:
    if isinstance(price, Decimal):
        return float(price)
    reached = [tier.price for tier in price.tiers if input_tokens > tier.start]
    return float(reached[-1] if reached else price.base)


@cache
def _newest() -> date:
    """The package does not say when it was made: the newest of its dated prices that holds by now."""
    from genai_prices.data_snapshot import get_snapshot

    today = datetime.now(UTC).date()
    conditions = [
        conditional.constraint
        for provider in get_snapshot().providers
        for model in provider.models
        if isinstance(model.prices, list)
        for conditional in model.prices
    ]
    starts: list[date] = [start for one in conditions if (start := getattr(one, "start_date", None))]
    return max(start for start in starts if start <= today)

"""Tells Inspect what models cost, so that its limits count costs and its logs carry them."""

import inspect_ai.model._model as pricing  # private: the one place that multiplies tokens by rates
from inspect_ai import Task
from inspect_ai.hooks import BeforeModelGenerate, Hooks, hooks
from inspect_ai.model import Model, ModelCost, ModelInfo, ModelUsage, compute_model_cost, get_model_info, set_model_info

from app.prices import Price, Prices, Rates
from app.runner.messages import Job
from app.runner.resolve import Subject


class _Listed(ModelCost):
    """With what Inspect's own form has no place for."""

    price: Price


def price_models(job: Job, subject: Subject) -> None:
    """Once in a process, before anything runs. Models that a task makes later are priced as they are first called."""
    limited = job.spec.cost_limit is not None or subject.task.cost_limit is not None
    prices = Prices(job.prices, free=limited)  # Inspect demands a price for every model then
    vars(pricing)["compute_model_cost"] = _cost
    for model in (subject.model, *subject.roles.values(), *_models_of(subject.task)):
        _set_price(prices, str(model), model)

    @hooks(name="proctor_prices", description="Tells Inspect what models cost.")
    class _Prices(Hooks):
        async def on_before_model_generate(self, data: BeforeModelGenerate) -> None:
            _set_price(prices, data.model_name, data.model_name)


def _models_of(task: Task) -> list[Model]:
    """Those that a task brings itself."""
    roles = [role if isinstance(role, list) else [role] for role in (task.model_roles or {}).values()]
    given = [task.model, *(model for role in roles for model in role)]
    return [model for model in given if isinstance(model, Model)]


def _set_price(prices: Prices, name: str, model: Model | str) -> None:
    """Prices may change with the hour: set again if they have."""
    price = prices.of(name)
    info = get_model_info(model)
    if price is None or (info is not None and _priced(info.cost) == price):
        return
    set_model_info(name, (info or ModelInfo()).model_copy(update={"cost": _listed(price)}))


def _priced(cost: ModelCost | None) -> Price | None:
    return cost.price if isinstance(cost, _Listed) else None


def _listed(price: Price) -> _Listed:
    return _Listed(**_flat(price).model_dump(), price=price)


def _flat(rates: Rates) -> ModelCost:
    """What is cached costs as any input where the provider has no rate for it."""
    return ModelCost(
        input=rates.input,
        output=rates.output,
        input_cache_read=rates.input if rates.cache_read is None else rates.cache_read,
        input_cache_write=rates.input if rates.cache_write is None else rates.cache_write,
    )


def _cost(cost_data: ModelCost, usage: ModelUsage, cache_ttl: str | None = None) -> float:
    """Inspect's own sum; at the rates of the call's size, and with a rate of its own for reasoning, where there are such."""
    if not isinstance(cost_data, _Listed):
        return compute_model_cost(cost_data, usage, cache_ttl)
    cached = (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
    rates = cost_data.price.rates(usage.input_tokens + cached)
    thought = usage.reasoning_tokens or 0
    if rates.reasoning is None or not thought:
        return compute_model_cost(_flat(rates), usage, cache_ttl)
    # Inspect counts reasoning in the output; some providers tell it apart, as is seen where there is more of it
    said = usage.output_tokens - thought if thought <= usage.output_tokens else usage.output_tokens
    spoken = usage.model_copy(update={"output_tokens": said})
    return compute_model_cost(_flat(rates), spoken, cache_ttl) + thought * rates.reasoning / 1_000_000

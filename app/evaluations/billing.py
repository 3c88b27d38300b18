"""What is known at submit of what an evaluation will cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from anyio import to_thread

from app.errors import InvalidRequest
from app.prices import Prices
from app.spec import Spec

REMEDY = "Give it in PROCTOR_MODEL_PRICES"


@dataclass(frozen=True)
class Billing:
    prices: Prices = field(default_factory=Prices)

    async def check(self, spec: Spec) -> None:
        """Raises `InvalidRequest`: a limit on costs that nobody can count would be none."""
        if spec.cost_limit is None or not (missing := await self._missing(spec)):
            return
        problem = {
            "field": "cost_limit",
            "message": f"no price is known for {_and(missing)}, so costs could not be limited. {REMEDY}, or leave it out.",
        }
        raise InvalidRequest(f"{problem['field']}: {problem['message']}", [problem])

    async def notes(self, spec: Spec) -> list[str]:
        """What the caller should know."""
        if not (missing := await self._missing(spec)):
            return []
        return [f"No price is known for {_and(missing)}: its costs will not be counted. {REMEDY} to have them."]

    async def _missing(self, spec: Spec) -> list[str]:
        """In a thread: the first time prices are read from the disk."""
        return await to_thread.run_sync(
            replace(self.prices, free=True).missing, [spec.model, *spec.model_roles.values()]
        )


def _and(models: Sequence[str]) -> str:
    return " and ".join(repr(model) for model in models)

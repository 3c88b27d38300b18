"""By which versions results were made, and whether all of one evaluation were made alike. No I/O here.

A deploy in the midst of an evaluation is allowed, and so is a retry after months: what it mixes is told, not hidden.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TASK_VERSION = "task version"
IMAGE = "container image"
"""Names beside those of packages, which have no space."""

NOT_RECORDED = "not recorded"


class Mixture(BaseModel):
    """One thing that was not the same for all of an evaluation's samples."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="A package, `python`, `task version` or `container image`.")
    samples: dict[str, int] = Field(description="How many samples each version of it made.")
    flagged: bool = Field(
        description="It may change what results mean. Another image alone, with the same packages in it, need not."
    )


def mixed(made: Iterable[tuple[Mapping[str, Any] | None, int]]) -> list[Mixture]:
    """What differs, what is flagged first. `made`: versions, with the number of samples made by them."""
    groups = [(versions or {}, samples) for versions, samples in made]
    names = dict.fromkeys(name for versions, _ in groups for name in versions)
    counted = [(name, _counted(name, groups)) for name in names]
    found = [
        Mixture(name=name, samples=samples, flagged=name != IMAGE) for name, samples in counted if len(samples) > 1
    ]
    return sorted(found, key=lambda mixture: (not mixture.flagged, mixture.name))


def _counted(name: str, groups: Iterable[tuple[Mapping[str, Any], int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for versions, samples in groups:
        version = str(versions.get(name, NOT_RECORDED))
        counts[version] = counts.get(version, 0) + samples
    return dict(sorted(counts.items()))

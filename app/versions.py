"""By which versions results were made, and whether all of one evaluation were made alike. No I/O here.

A deploy in the midst of an evaluation is allowed, and so is a retry after months: what it mixes is told, not hidden.
"""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

TASK_VERSION = "task version"
IMAGE = "container image"
PRICES = "model prices"
"""Names beside those of packages, which have no space."""

_HARMLESS = (IMAGE, PRICES)

NOT_RECORDED = "not recorded"

Versions = dict[str, str]

Made = tuple[Sequence[Mapping[str, str]], int]
"""By which versions samples were made, and how many samples: by more than one where an attempt went on from what another
had begun."""


class Mixture(BaseModel):
    """One thing that was not the same for all of an evaluation's samples."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="A package, `python`, `task version`, `container image` or `model prices`.")
    samples: dict[str, int] = Field(
        description="How many samples each version of it made. One that was resumed by another version counts for both."
    )
    flagged: bool = Field(
        description="It may change what results mean. Another image alone, with the same packages in it, need not;"
        " other prices do not."
    )


def made(own: Mapping[str, str] | None, earlier: Sequence[Mapping[str, str]] | None, samples: int) -> Made:
    """Of what is recorded of an attempt."""
    return (own or {}, *(earlier or ())), samples


def mixed(made: Iterable[Made]) -> list[Mixture]:
    """What differs, what is flagged first."""
    groups = list(made)
    names = dict.fromkeys(name for by, _ in groups for versions in by for name in versions)
    counted = [(name, _counted(name, groups)) for name in names]
    found = [
        Mixture(name=name, samples=samples, flagged=name not in _HARMLESS)
        for name, samples in counted
        if len(samples) > 1
    ]
    return sorted(found, key=lambda mixture: (not mixture.flagged, mixture.name))


def _counted(name: str, groups: Iterable[Made]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for by, samples in groups:
        for version in {str(versions.get(name, NOT_RECORDED)) for versions in by}:
            counts[version] = counts.get(version, 0) + samples
    return dict(sorted(counts.items()))

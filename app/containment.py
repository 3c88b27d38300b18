"""How this worker holds agents' code: what the settings allow, and the launcher that has passed its probe here."""

import asyncio
import time
from typing import Self

import structlog

from app.addresses import local_path
from app.runner.cgroup import Cgroup, hand_down, in_sum, machine_memory
from app.runner.launchers import choose
from app.runner.messages import Containment
from app.runner.turns import FOLDER
from app.scratch import make_private
from app.settings import Settings

PROBE_AGAIN = 60
"""Seconds after which a worker without a launcher looks again: what failed may have been the moment. Ours."""

SAMPLES_SHARE = 0.75
"""Of the memory, for samples that nothing bounds wholly. The service, its children and the page cache have the rest. Ours."""

log = structlog.get_logger(__name__)


class Contained:
    """A context manager; inside it the probe runs (0.1 s) where attempts will, in the scratch folder, and whoever needs its
    result waits for it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        artifacts = local_path(settings.artifacts)
        hidden = [str(settings.scratch), *([str(artifacts)] if artifacts else [])]
        self._wanted = Containment(
            launcher=None,
            limits=settings.sandbox_limits,
            allowed=settings.allowed_sandboxes,
            hidden=tuple(hidden),
            child_memory=settings.child_memory,
        )
        self._probing: asyncio.Task[Containment]
        self._probed = 0.0

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(make_private, self._settings.scratch)
        await asyncio.to_thread(hand_down)
        self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._probing.cancel()
        await asyncio.wait({self._probing})

    @property
    def known(self) -> Containment | None:
        """None while the probe runs."""
        return self._probing.result() if self._probing.done() else None

    async def here(self) -> Containment:
        found = await asyncio.shield(self._probing)
        if found.launcher is None and time.monotonic() - self._probed > PROBE_AGAIN:
            self._begin()
            found = await asyncio.shield(self._probing)
        return found

    def _begin(self) -> None:
        self._probed = time.monotonic()
        self._probing = asyncio.create_task(self._probe(), name="probe")

    async def _probe(self) -> Containment:
        chosen = await choose(self._settings.sandbox_launchers, self._wanted, within=self._settings.scratch)
        found = await asyncio.to_thread(bounded, chosen, self._settings)
        if found.launcher:
            mode = {"launcher": found.launcher, "memory": found.bounds, "at_once": found.at_once}
            log.info("sandbox launcher passed its probe", **mode)
        else:
            log.warning("no sandbox launcher passed its probe", reason=found.refusal)
        return found


def bounded(found: Containment, settings: Settings) -> Containment:
    """With what bounds a sample's memory here. Where no control group holds all of it, there are no more samples at once than
    there is memory for."""
    if found.launcher is None:
        return found
    if found.launcher == "bubblewrap" and (group := Cgroup.make(settings.sandbox_limits)):
        group.remove()
        return found.model_copy(update={"bounds": "control group"})
    at_once = max(1, int(machine_memory() * SAMPLES_SHARE) // in_sum(settings.sandbox_limits))
    return found.model_copy(update={"bounds": "watchdog", "at_once": at_once, "turns": str(settings.scratch / FOLDER)})


def in_words(found: Containment) -> str:
    """What bounds a sample's memory here, for people."""
    if found.bounds == "control group":
        return "a control group bounds each sample's memory"
    return (
        "no control group can be made: a watchdog bounds what it sees of each sample's memory, so"
        f" {found.at_once} samples at once use a sandbox"
    )

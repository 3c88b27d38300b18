"""How this worker holds agents' code: what the settings allow, and the launcher that has passed its probe here."""

import asyncio
import time
from typing import Self

import structlog

from app.addresses import local_path
from app.runner.launchers import choose
from app.runner.messages import Containment
from app.scratch import make_private
from app.settings import Settings

PROBE_AGAIN = 60
"""Seconds after which a worker without a launcher looks again: what failed may have been the moment. Ours."""

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
        self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._probing.cancel()
        await asyncio.wait({self._probing})

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
        found = await choose(self._settings.sandbox_launchers, self._wanted, within=self._settings.scratch)
        if found.launcher:
            log.info("sandbox launcher passed its probe", launcher=found.launcher)
        else:
            log.warning("no sandbox launcher passed its probe", reason=found.refusal)
        return found

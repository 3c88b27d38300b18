"""Logs, transcripts and checkpoints, on fsspec: ``file://`` or ``gs://``.

The fence is in the path: ``<root>/<evaluation>/<execution>/<attempt>/…``, so that two attempts never write the same
object, and what counts is what the ledger points at.

An evaluation's folder is a plain Inspect log directory: of all that lies there, Inspect's functions take its merged log for a
log, and nothing else. The logs of its attempts, each with the samples that the attempt ran, lie apart for that reason, in
the same order: ``<root>/transcripts/<evaluation>/<execution>/<attempt>/…``.
"""

import asyncio
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from app.database.session import refuse_held_session
from app.store import Store

TRANSCRIPTS = "transcripts"


class Artifacts(Store):
    """The calls are made in threads: fsspec is synchronous. What the store refuses for longer than its
    patience is raised as `StoreUnavailable`, an OSError."""

    @cached_property
    def transcripts(self) -> "Artifacts":
        """The logs of attempts at `run`."""
        return Artifacts(self.url(TRANSCRIPTS))

    async def ship(self, file: Path, url: str) -> None:
        """Copies a local file to `url`; a later copy replaces an earlier one, at once and whole."""
        refuse_held_session(f"upload {file.name}")
        await asyncio.to_thread(self._put, file, url)

    async def write(self, url: str, data: bytes) -> None:
        refuse_held_session(f"upload {url}")
        await asyncio.to_thread(self._write, url, data)

    async def probe(self, folder: str) -> None:
        """Whether the store keeps what is written to the folder, now: for all that is known it only gives what it has."""
        url = f"{folder}/probe"
        await self.write(url, b"?")
        await self.delete([url])

    async def read(self, url: str) -> bytes:
        """Raises FileNotFoundError."""
        refuse_held_session(f"download {url}")
        return await asyncio.to_thread(self._read, url)

    async def fetch(self, url: str, file: Path) -> None:
        refuse_held_session(f"download {url}")
        await asyncio.to_thread(self._get, url, file)

    async def names(self, folder: str) -> list[str]:
        """Of all files below the folder, relative to it; none if there is no such folder."""
        refuse_held_session(f"list {folder}")
        return await asyncio.to_thread(self._find, folder)

    async def delete(self, urls: Iterable[str]) -> None:
        """What is gone already does not matter. Folders go with their last file."""
        refuse_held_session("delete artifacts")
        await asyncio.to_thread(self._delete, list(urls))

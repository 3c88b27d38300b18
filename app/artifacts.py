"""Logs and transcripts, on fsspec: ``file://`` or ``gs://``.

The fence is in the path: ``<root>/<evaluation>/<execution>/<attempt>/…``, so that two attempts never write the same
object, and what counts is what the ledger points at. An evaluation's folder is a plain Inspect log directory.
"""

import asyncio
from pathlib import Path
from typing import Any

import fsspec
from tenacity import (
    retry,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from app.database.session import refuse_held_session

SHIP_PATIENCE = 60
"""Seconds for which a file's upload is tried again. Ours."""


class Artifacts:
    """`root` is a URL. The calls are made in threads: fsspec is synchronous."""

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
        scheme = root.partition("://")[0]
        self._filesystem: Any = fsspec.filesystem(scheme, **({"auto_mkdir": True} if scheme == "file" else {}))

    def url(self, evaluation_id: str, execution_id: str, attempt: int, name: str = "") -> str:
        """Where that attempt's file `name` is, or its folder."""
        return "/".join(part for part in (self._root, evaluation_id, execution_id, str(attempt), name) if part)

    async def ship(self, file: Path, url: str) -> None:
        """Copies a local file to `url`; a later copy replaces an earlier one."""
        refuse_held_session(f"upload {file.name}")
        await asyncio.to_thread(self._put, file, url)

    @retry(
        retry=retry_if_exception_type(OSError) & retry_if_not_exception_type(FileNotFoundError),
        stop=stop_after_delay(SHIP_PATIENCE),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        reraise=True,
    )
    def _put(self, file: Path, url: str) -> None:
        self._filesystem.put_file(str(file), url)

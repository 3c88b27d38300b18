"""Logs, transcripts and checkpoints, on fsspec: ``file://`` or ``gs://``.

The fence is in the path: ``<root>/<evaluation>/<execution>/<attempt>/…``, so that two attempts never write the same
object, and what counts is what the ledger points at. An evaluation's folder is a plain Inspect log directory.
"""

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from tenacity import (
    retry,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from app.addresses import address, filesystem, local_path
from app.database.session import refuse_held_session

PATIENCE = 60
"""Seconds for which one file, or one listing, is tried again. Ours: as long as a failover of the database."""

HALF = ".half"

_STORES = ("aiohttp", "gcsfs", "google")
"""Packages whose errors are what a bucket, or the way to it, has to say."""

P = ParamSpec("P")
T = TypeVar("T")


def _again(call: Callable[P, T]) -> Callable[P, T]:
    """Tries again for `PATIENCE`. A bucket's errors are not all OSErrors as a disk's are; here they become such."""

    @retry(
        retry=retry_if_exception_type(OSError) & retry_if_not_exception_type(FileNotFoundError),
        stop=stop_after_delay(PATIENCE),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        reraise=True,
    )
    @functools.wraps(call)
    def patient(*args: P.args, **named: P.kwargs) -> T:
        try:
            return call(*args, **named)
        except OSError:
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in _STORES:
                raise OSError(f"{type(error).__name__}: {error}") from error
            raise

    return patient


class Artifacts:
    """`root` is a URL. The calls are made in threads: fsspec is synchronous. What the store refuses for longer than
    `PATIENCE` is raised as an OSError."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._local = local_path(root) is not None
        # other workers write there too: a remembered listing would hide what they did
        self._filesystem: Any = filesystem(root, use_listings_cache=False)

    def url(self, *parts: str | int) -> str:
        """Of a file or a folder: evaluation, execution, attempt, name, as far as given."""
        return address(self._root, *parts)

    async def ship(self, file: Path, url: str) -> None:
        """Copies a local file to `url`; a later copy replaces an earlier one, at once and whole."""
        refuse_held_session(f"upload {file.name}")
        await asyncio.to_thread(self._put, file, url)

    async def write(self, url: str, data: bytes) -> None:
        refuse_held_session(f"upload {url}")
        await asyncio.to_thread(self._write, url, data)

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

    @_again
    def _put(self, file: Path, url: str) -> None:
        with self._whole(url) as target:
            self._filesystem.put_file(str(file), target)

    @_again
    def _write(self, url: str, data: bytes) -> None:
        with self._whole(url) as target:
            self._filesystem.pipe_file(target, data)

    @contextmanager
    def _whole(self, url: str) -> Iterator[str]:
        """Where to write so that no reader and no crash finds half a file at `url`. Buckets see to that themselves."""
        if not self._local:
            yield url
            return
        half = Path(self._path(f"{url}.{uuid4().hex}{HALF}"))
        half.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield str(half)
            half.replace(self._path(url))
        finally:
            half.unlink(missing_ok=True)

    @_again
    def _read(self, url: str) -> bytes:
        data: bytes = self._filesystem.cat_file(url)
        return data

    @_again
    def _get(self, url: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._filesystem.get_file(url, str(file))

    @_again
    def _find(self, folder: str) -> list[str]:
        above = self._path(folder) + "/"
        try:
            found = [path.removeprefix(above) for path in self._filesystem.find(folder)]
        except FileNotFoundError:
            return []
        return [name for name in found if not name.endswith(HALF)]

    @_again
    def _delete(self, urls: list[str]) -> None:
        for url in urls:
            with suppress(FileNotFoundError):
                self._filesystem.rm_file(url)
            if self._local:
                self._remove_empty(Path(self._path(url)).parent)

    def _remove_empty(self, folder: Path) -> None:
        root = Path(self._path(self._root))
        with suppress(OSError):  # it has other files; or somebody else was quicker
            while root in folder.parents:
                folder.rmdir()
                folder = folder.parent

    def _path(self, url: str) -> str:
        path: str = self._filesystem._strip_protocol(url)
        return path

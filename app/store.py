"""Files in a store, on fsspec: ``file://`` or ``gs://``. Synchronous, and without the rest of the service: a child uses it
too.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar
from uuid import uuid4

from tenacity import (
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from app.addresses import address, filesystem, local_path

PATIENCE = 60.0
"""Seconds for which one file, or one listing, is tried again, unless its store is told otherwise. Ours: as long as a failover
of the database."""

HALF = ".half"

_STORES = ("aiohttp", "gcsfs", "google")
"""Packages whose errors are what a bucket, or the way to it, has to say."""

P = ParamSpec("P")
T = TypeVar("T")


class StoreUnavailable(OSError):
    """The store did not do it for as long as its caller had patience."""


def _again(call: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Tries again for the store's patience. A bucket's errors are not all OSErrors as a disk's are; here they become such."""

    @functools.wraps(call)
    def once(store: Any, /, *args: P.args, **named: P.kwargs) -> T:
        try:
            return call(store, *args, **named)
        except OSError:
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in _STORES:
                raise OSError(f"{type(error).__name__}: {error}") from error
            raise

    @functools.wraps(call)
    def patient(store: Any, /, *args: P.args, **named: P.kwargs) -> T:
        retrying = Retrying(
            retry=retry_if_exception_type(OSError) & retry_if_not_exception_type(FileNotFoundError),
            stop=stop_after_delay(store.patience),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            reraise=True,
        )
        try:
            return retrying(once, store, *args, **named)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreUnavailable(f"{type(error).__name__}: {error}") from error

    return patient


class Store:
    """`root` is an address. What the store refuses for longer than `patience` (seconds) is raised as `StoreUnavailable`."""

    def __init__(self, root: str, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._root = root
        self._local = local_path(root) is not None
        # other workers write there too: a remembered listing would hide what they did
        self._filesystem: Any = filesystem(root, use_listings_cache=False)

    def url(self, *parts: str | int) -> str:
        """Of a file or a folder: evaluation, execution, attempt, name, as far as given."""
        return address(self._root, *parts)

    @_again
    def _put(self, file: Path, url: str) -> None:
        with self._whole(url) as target:
            before = file.stat().st_size
            self._filesystem.put_file(str(file), target)
            self._check(target, before, file.stat().st_size)

    @_again
    def _write(self, url: str, data: bytes) -> None:
        with self._whole(url) as target:
            self._filesystem.pipe_file(target, data)
            self._check(target, len(data))

    def _check(self, target: str, *sizes: int) -> None:
        """A store may say yes and keep nothing, or a part. `sizes`: of what it was given, which may have grown meanwhile."""
        try:
            kept = self._filesystem.size(target)
        except FileNotFoundError as error:
            raise OSError(f"The store took {target}, and has kept nothing of it.") from error
        if kept not in sizes:
            raise OSError(f"The store took {target}, and has kept {kept} of its {sizes[0]} bytes.")

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
    def _stream(self, url: str, write: Callable[[IO[bytes]], None]) -> None:
        """For a file that nobody holds whole. `write` is called anew if the store fails meanwhile."""
        with self._whole(url) as target:
            file: Any = self._filesystem.open(target, "wb")
            try:
                write(file)
                size = file.tell()
                file.close()
            except BaseException:
                self._discard(file, target)
                raise
            if (kept := self._filesystem.size(target)) != size:
                raise OSError(f"{url} has {kept} bytes in the store, not the {size} that were sent")

    def _discard(self, file: Any, target: str) -> None:
        """Left to itself, a half-written file would be committed as it is closed."""
        if self._local:
            with suppress(OSError):
                file.close()
            return
        with suppress(Exception):
            file.discard()
            file.closed = True
        with suppress(Exception):
            self._filesystem.rm_file(target)

    @_again
    def _size(self, url: str) -> int:
        """Bytes. Raises FileNotFoundError."""
        return int(self._filesystem.size(url))

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

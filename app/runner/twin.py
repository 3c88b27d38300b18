"""A second process that loads the task once more, to see whether it means the same samples by the same ids.

It is forked before the task is first loaded, so it has what every other child of the service begins with, and it loads only
when it is asked, after the first: what the task fetches and keeps on the disk is not fetched by two at once.
"""

import os
import signal
import time
import warnings
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from select import select

from inspect_ai.dataset import Dataset

from app.runner.digest import digest, text_digest
from app.runner.forkserver import die_with_parent, reseed

Pairs = dict[int, int]
"""By the digest of an id, the digest of the sample that has it."""

_PATIENCE = 30.0
"""Seconds that the second loading may take, or ten times the first: what takes longer, such as a lock that the first
holds, says nothing of the samples. Each run looks at its own in any case."""

_FORKED = "This process .* is multi-threaded"
"""Python's warning, since 3.12. Our other thread writes messages, and the twin sends none."""


class Twin:
    def __init__(self, ask: int, answer: int) -> None:
        self._ask = ask
        self._answer = answer
        self._asked = 0.0

    def ask(self, ids: Sequence[int | str]) -> None:
        """To load the task, and to tell of the samples with these ids. Returns at once."""
        self._asked = time.monotonic()
        with suppress(BrokenPipeError):  # it could not load the task before
            _write(self._ask, array("q", [len(ids), *map(id_digest, ids)]).tobytes())

    def answer(self, first_seconds: float) -> Pairs | None:
        """None: it could not load the task, or took too long. `first_seconds`: how long loading took the first time."""
        until = self._asked + max(_PATIENCE, 10 * first_seconds)
        with suppress(EOFError, TimeoutError):
            (count,) = _read(self._answer, 1, until)
            values = _read(self._answer, 2 * count, until)
            return dict(zip(values[::2], values[1::2], strict=True))
        return None


@contextmanager
def twin(load: Callable[[], Dataset]) -> Iterator[Twin]:
    """`load` makes the dataset, with an id for each sample."""
    (asked, ask), (answer, answered) = os.pipe(), os.pipe()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _FORKED, DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(parent, signal.SIGKILL)
            os.close(ask)
            os.close(answer)
            _serve(load, asked, answered)
        finally:
            os._exit(0)
    os.close(asked)
    os.close(answered)
    try:
        yield Twin(ask, answer)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ask)
        os.close(answer)


def id_digest(id: int | str) -> int:
    """Inspect's logs tell samples apart by the text of their ids."""
    return text_digest(str(id))


def _serve(load: Callable[[], Dataset], asked: int, answered: int) -> None:
    """Each time in a process of its own: what one loading leaves behind, another would not have met."""
    while True:
        (count,) = _read(asked, 1)
        wanted = set(_read(asked, count))
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            failed = 1
            try:
                die_with_parent(server, signal.SIGKILL)
                reseed()
                _tell(load(), wanted, answered)
                failed = 0
            finally:
                os._exit(failed)
        if os.waitpid(pid, 0)[1]:
            return  # its last word is the end of the pipe


def _tell(dataset: Dataset, wanted: Collection[int], answered: int) -> None:
    keyed = [(id_digest(sample.id), sample) for sample in dataset if sample.id is not None]
    pairs = [value for key, sample in keyed if key in wanted for value in (key, digest(sample))]
    _write(answered, array("q", [len(pairs) // 2, *pairs]).tobytes())


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, numbers: int, until: float | None = None) -> "array[int]":
    """Raises EOFError, and TimeoutError past `until` (monotonic seconds)."""
    data = bytearray()
    while len(data) < numbers * 8:
        if until is not None and not select([descriptor], [], [], max(until - time.monotonic(), 0))[0]:
            raise TimeoutError
        part = os.read(descriptor, min(numbers * 8 - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return array("q", bytes(data))

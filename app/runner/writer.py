"""The child's end of the pipe: messages go out in order, from a thread of their own."""

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from app.runner.line import line
from app.runner.listing import in_parts
from app.runner.messages import Message, Progress, WriterFailed

PROGRESS_INTERVAL = 0.25
"""Seconds between two progress messages; what happens in between is told by the next one."""

_REASON_LENGTH = 1_000


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)


class Writer:
    """Sends messages without ever blocking the caller.

    A slow reader slows the thread, not the evaluation's event loop; only progress is coalesced, nothing else is lost.
    If the reader has gone, the service no longer wants this work: the whole process group ends at once. So it does if the
    thread fails: whatever else was computed and paid for could not be told.
    """

    def __init__(self, descriptor: int, end: Callable[[], object] = _end_group) -> None:
        """`end`: ends everything that the writer tells of."""
        self._descriptor = descriptor
        self._end = end
        self._ready = threading.Condition()
        self._queue: deque[Message] = deque()
        self._progress: Progress | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        with self._ready:
            if isinstance(message, Progress):
                self._progress = message
            else:
                self._queue.extend([self._progress, message] if self._progress else [message])
                self._progress = None
            self._ready.notify()

    def close(self) -> None:
        """Returns when everything has been read or lies in the pipe."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join()
        os.close(self._descriptor)

    def _work(self) -> None:
        try:
            self._deliver()
        except BaseException as error:
            try:
                self._tell_why(error)
            finally:
                self._end()

    def _tell_why(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            return  # the reader has gone
        traceback.print_exception(error)
        if not isinstance(error, MemoryError):  # the next attempt would meet it too: a crash, of which there are few
            self._write(line(WriterFailed(reason=f"{type(error).__name__}: {error}"[:_REASON_LENGTH])))

    def _deliver(self) -> None:
        progress_due = 0.0
        while True:
            with self._ready:
                while not (self._queue or self._closing):
                    wait = progress_due - time.monotonic() if self._progress else None
                    if wait is not None and wait <= 0:
                        break
                    self._ready.wait(wait)
                batch, self._queue = self._queue, deque()
                if self._progress:
                    batch.append(self._progress)
                    self._progress = None
                if not batch:
                    return
            progress_due = time.monotonic() + PROGRESS_INTERVAL
            for message in batch:
                for part in in_parts(message):
                    self._write(line(part))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

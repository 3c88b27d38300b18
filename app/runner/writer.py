"""The child's end of the pipe: messages go out in order, from a thread of their own."""

import os
import signal
import threading
import time
from collections import deque

from app.runner.messages import MESSAGE, Message, Progress

PROGRESS_INTERVAL = 0.25
"""Seconds between two progress messages; what happens in between is told by the next one."""


class Writer:
    """Sends messages without ever blocking the caller.

    A slow reader slows the thread, not the evaluation's event loop; only progress is coalesced, nothing else is lost.
    If the reader has gone, the service no longer wants this work: the whole process group ends at once.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
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
            self._write(b"".join(MESSAGE.dump_json(message) + b"\n" for message in batch))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.killpg(0, signal.SIGKILL)

"""What Cloud Run has in front of its instances: passes each request to one that is up, and remembers every push."""

import asyncio
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Self

from tests.drills.chaos.history import Push

_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.\d (\d{3})")
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
_CONNECTION = re.compile(rb"^connection:[^\r]*\r\n", re.IGNORECASE | re.MULTILINE)


@dataclass(eq=False)
class Delivery:
    """A push under way."""

    execution: str
    worker: str
    task: asyncio.Task[None]
    began: float = field(default_factory=time.time)


class Front:
    """An async context manager that listens at `url`. Whether an instance lives is found out by asking it, as late as that.

    No request is sent twice: if its instance dies, the answer is 503.
    """

    def __init__(self) -> None:
        self.url = ""
        self.workers: dict[str, tuple[str, int]] = {}
        """Address by name. Requests take turns."""
        self.pushes: list[Push] = []
        self.under_way: list[Delivery] = []
        self._turns = count()
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in tuple(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def cut(self, delivery: Delivery) -> None:
        """Both its sides are closed; the worker's handler goes on."""
        delivery.task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                writer.write(await self._pass(await _read(reader), task))
                await writer.drain()
                writer.close()
        finally:
            self._serving.discard(task)
            if not writer.is_closing():
                writer.transport.abort()

    async def _pass(self, request: bytes, task: asyncio.Task[None]) -> bytes:
        execution = _execution(request)
        name, streams = await self._connect()
        if execution is None:
            return await _ask(streams, request) or _UNAVAILABLE
        delivery = Delivery(execution, name, task)
        self.under_way.append(delivery)
        answer = b""
        try:
            answer = await _ask(streams, request)
        finally:
            self.under_way.remove(delivery)
            status = _STATUS.match(answer)
            said = int(status[1]) if status else None
            self.pushes.append(Push(execution, name, delivery.began, time.time(), said))
        return answer or _UNAVAILABLE

    async def _connect(self) -> "tuple[str, _Streams | None]":
        turn = next(self._turns)
        names = list(self.workers)
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            with suppress(OSError):
                return name, await asyncio.open_connection(*self.workers[name])
        return "", None


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _ask(streams: _Streams | None, request: bytes) -> bytes:
    """The whole answer; nothing if there is none, or not all of it."""
    if streams is None:
        return b""
    reader, writer = streams
    try:
        writer.write(request)
        answer = await reader.read(-1)
    except OSError:
        return b""
    finally:
        writer.transport.abort()
    head, _, body = answer.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return answer if length and len(body) == int(length[1]) else b""


async def _read(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    body = await reader.readexactly(int(length[1])) if length else b""
    return _CONNECTION.sub(b"", head)[:-2] + b"Connection: close\r\n\r\n" + body


def _execution(request: bytes) -> str | None:
    """Whom it pushes, if it is a push."""
    head, _, body = request.partition(b"\r\n\r\n")
    return str(json.loads(body)["execution_id"]) if head.startswith(b"POST /tasks/execute ") else None

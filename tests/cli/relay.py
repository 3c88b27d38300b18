"""A network in front of the service that can be cut, or lose an answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Relay:
    """Forwards connections to the service at `url` from an address of its own, which it keeps while it is down."""

    def __init__(self, service: str) -> None:
        self.lost_answers: list[bytes] = []
        self.port = 0
        self._target = urlsplit(service)
        self._lose = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Connections break, and new ones are refused."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.close()
        await self._server.wait_closed()

    def lose_answers(self, number: int) -> None:
        """The service gets the next so many requests, and its answers do not arrive."""
        self._lose = number

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        ours = {writer, there_writer}
        self._writers |= ours
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._request(reader, there_writer))
                group.create_task(self._answer(there_reader, writer))
        finally:
            self._writers -= ours

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self._lose:
                    self._lose -= 1
                    self.lost_answers.append(data)
                    break
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def open_relay(service: str) -> AsyncIterator[Relay]:
    relay = Relay(service)
    await relay.up()
    try:
        yield relay
    finally:
        await relay.down()

"""A proxy in front of a real Postgres that cuts, silences, delays and refuses on demand, also at a chosen statement."""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

from tests.faults.connection import Connection, Cut, CutPoint, Moment, Pattern, Side, drop_arriving, reset_on_close

_END = 10
"""Seconds; the proxy's connections end at once, unless something is wrong."""
_RECORDED = 100_000  # statements; a drill makes a few thousand


class Proxy:
    """A Postgres at an address of its own, `upstream` by way of faults. Everything may be switched while it runs.

    With `tls` clients speak TLS from the first byte (no SSLRequest), as AlloyDB's connector does.
    """

    def __init__(
        self, upstream: tuple[str, int], *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.upstream = upstream
        """New connections go here."""
        self.address = (host, port)
        self.connections: list[Connection] = []
        """Open and not cut."""
        self.accepted = 0
        self.round_trips = 0
        """After login, over all connections: how often a client spoke after its server had. A farewell does not count."""
        self.executed: deque[str] = deque(maxlen=_RECORDED)
        """The SQL of what clients asked to execute, in order, BEGIN and COMMIT included."""
        self.recording = True
        self.cut_points: list[CutPoint] = []
        self.latency = 0.0
        """Seconds, in each direction; the clock of the event loop tells milliseconds apart."""
        self.idle_cut: Cut = "fin"
        self.refuse = False
        """New connections are reset at once."""
        self.unanswered = False
        """New connections are accepted by TCP, and that is all."""
        self._idle_after: float | None = None
        self._tls = tls
        self._held: set[socket.socket] = set()
        self.sides: set[Side] = set()
        self._closed = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket()
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(self.address)
            self._listener.listen(1024)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise
        self.address = self._listener.getsockname()
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._accepting.cancel()
        for task in self._serving if self._tls else ():
            task.cancel()  # a handshake waits for its client; all else ends in a moment, and uvloop loses what is cancelled
        await asyncio.gather(self._accepting, *self._serving, return_exceptions=True)
        self._listener.close()
        for side in list(self.sides):
            side.abort()
        async with asyncio.timeout(_END):
            while self.sides:
                self._closed.clear()
                await self._closed.wait()
        for sock in list(self._held):
            self._release(sock)

    def through(self, database_url: str) -> str:
        """The same URL by way of this proxy. Nobody asks for TLS first: asyncpg never retrieves an error of its own if it is
        cancelled while it does."""
        parts = urlsplit(database_url)
        user, at, _ = parts.netloc.rpartition("@")
        host, port = self.address
        query = "&".join(filter(None, (parts.query, "sslmode=disable")))
        return parts._replace(netloc=f"{user}{at}{host}:{port}", query=query).geturl()

    @property
    def idle_after(self) -> float | None:
        """Seconds; a connection over which nothing has passed for so long is cut by `idle_cut`. None: never."""
        return self._idle_after

    @idle_after.setter
    def idle_after(self, seconds: float | None) -> None:
        self._idle_after = seconds
        for connection in self.connections:
            connection.watch()

    def cut(self, how: Cut) -> int:
        """Every connection open now; returns how many."""
        connections = list(self.connections)
        for connection in connections:
            connection.cut(how)
        return len(connections)

    def cut_at(
        self,
        pattern: Pattern,
        moment: Moment,
        how: Cut,
        times: int = 1,
        *,
        then: Callable[[], None] | None = None,
    ) -> CutPoint:
        point = CutPoint(self, pattern, moment, how, times, then)
        self.cut_points.append(point)
        return point

    async def demote(self) -> int:
        """As after a failover: the server behind every connection open now refuses writes (25006), and answers pings.

        Returns how many. One that is in the middle of something follows as soon as it is idle. RESET ALL undoes it.
        """
        connections = list(self.connections)
        answers = [answer for connection in connections if (answer := connection.demote())]
        await asyncio.gather(*answers)
        return len(connections)

    # For connections --------------------------------------------------------------------------------------------------

    def record(self, sql: str) -> None:
        if self.recording:
            self.executed.append(sql)

    def closed(self, side: Side) -> None:
        self.sides.discard(side)
        self._closed.set()

    def forget(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)

    def hold(self, sock: socket.socket, how: Cut) -> None:
        """Keeps a client's socket open until the proxy ends, without ever answering."""
        self._held.add(sock)
        sock.setblocking(False)
        if how == "drop":
            drop_arriving(sock)
        else:
            self._loop.add_reader(sock, self._discard, sock)

    def _discard(self, sock: socket.socket) -> None:
        """What arrives is read, or TCP would stop acknowledging once its buffer is full."""
        with suppress(BlockingIOError):
            try:
                ended = not sock.recv(65536)
            except ConnectionError:
                ended = True
            if ended:
                self._loop.remove_reader(sock)

    def _release(self, sock: socket.socket) -> None:
        self._held.discard(sock)
        self._loop.remove_reader(sock)
        reset_on_close(sock)
        sock.close()

    async def _accept(self) -> None:
        while True:
            sock, _ = await self._loop.sock_accept(self._listener)
            self.accepted += 1
            if self.refuse:
                reset_on_close(sock)
                sock.close()
            elif self.unanswered:
                self.hold(sock, "silence")
            else:
                task = asyncio.create_task(self._serve(sock))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """The server first: a client without one is reset."""
        connection = Connection(self, sock)
        try:
            await self._loop.create_connection(lambda: connection.server, *self.upstream)
        except OSError:
            reset_on_close(sock)
            sock.close()
            return
        except asyncio.CancelledError:
            sock.close()
            raise
        try:
            await self._loop.connect_accepted_socket(lambda: connection.client, sock, ssl=self._tls)
        except OSError:
            connection.server.abort()

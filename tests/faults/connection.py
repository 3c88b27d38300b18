"""One connection through the proxy: what passes, and how it ends."""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from tests.faults.protocol import TERMINATE, Client, Greeting, Server, query

if TYPE_CHECKING:
    from tests.faults.proxy import Proxy

Cut = Literal["fin", "rst", "silence", "drop"]
"""How a connection ends, seen from the client.

fin, rst: closed that way, without a farewell of TLS; closed towards the server too.
silence: nothing comes back any more, but TCP acknowledges, as with a middlebox that black-holes. The server is not told.
drop: the kernel drops every packet of the client: nothing is even acknowledged. The server is not told.
The sockets of silent and dropped connections stay open until the proxy ends.
"""
Moment = Literal["before", "within", "after"]
Pattern = str | Callable[[str], bool]
"""A part of the SQL, or what is true for it."""

_SO_ATTACH_FILTER = 26


class CutPoint:
    """Cuts the connection at the next `times` executions of a statement whose SQL contains `pattern`, or for which that
    is true: it is asked once for every statement that comes, so it may count them. `then` is called just before the cut:
    until it returns nothing passes, on any connection of the proxy's.

    before: the request never reaches the server. within: it is passed on and the client cut at once; the server is not
    told and finishes. after: it is carried out (and committed, if nothing else is awaited), its reply never delivered.
    A time is used up when the statement arrives; it has not happened if the client leaves before its moment.
    """

    def __init__(
        self, proxy: "Proxy", pattern: Pattern, moment: Moment, how: Cut, times: int, then: Callable[[], None] | None
    ) -> None:
        self.pattern, self.moment, self.how = pattern, moment, how
        self.happened = 0
        self._then = then
        self._left = times
        self._proxy = proxy
        self._first = asyncio.Event()

    async def wait(self) -> None:
        """Until it has happened once."""
        await self._first.wait()

    def remove(self) -> None:
        if self in self._proxy.cut_points:
            self._proxy.cut_points.remove(self)

    def fits(self, sql: str) -> bool:
        return self.pattern in sql if isinstance(self.pattern, str) else self.pattern(sql)

    def take(self) -> None:
        """One of its times is used up."""
        self._left -= 1
        if self._left <= 0:
            self.remove()

    def cut(self, connection: "Connection") -> None:
        if self._then is not None:
            self._then()
        connection.cut(self.how, tell_server=self.moment != "within")
        self.happened += 1
        self._first.set()


class Side(asyncio.Protocol):
    """One end of a connection: the client's, or the server's."""

    transport: asyncio.Transport

    def __init__(
        self, proxy: "Proxy", *, made: Callable[[], None], received: Callable[[bytes], None], lost: Callable[[], None]
    ) -> None:
        self.data_received = received  # type: ignore[method-assign,assignment]  # one call less for every chunk
        self._proxy, self._made, self._lost = proxy, made, lost
        self.other: Side | None = None
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.is_open = True
        self._proxy.sides.add(self)
        self._made()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._proxy.closed(self)
        self._lost()

    def pause_writing(self) -> None:
        if self.other and self.other.is_open:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.is_open:
            self.other.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self.is_open:
            self.transport.write(data)

    def close(self) -> None:
        if self.is_open:
            self.transport.close()

    def abort(self) -> None:
        if self.is_open:
            self.transport.abort()


class Delay:
    """One direction: everything arrives `latency` seconds later, in order; transfers overlap."""

    def __init__(self, proxy: "Proxy", deliver: Callable[[bytes], None], end: Callable[[], None]) -> None:
        self._proxy, self._deliver, self._end = proxy, deliver, end
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def send(self, data: bytes) -> None:
        """Empty data is the end."""
        if not self._proxy.latency and not self._queue:
            self._arrive(data)
            return
        due = self._loop.time() + self._proxy.latency
        if self._queue:
            due = max(due, self._queue[-1][0])
        self._queue.append((due, data))
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._run)

    def forget(self) -> None:
        """What is under way does not arrive."""
        self._queue.clear()
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._queue and self._queue[0][0] <= now:
            self._arrive(self._queue.popleft()[1])
        if self._queue:
            self._timer = self._loop.call_at(self._queue[0][0], self._run)

    def _arrive(self, data: bytes) -> None:
        if data:
            self._deliver(data)
        else:
            self._end()


@dataclass
class _Pending:
    """A cut point that has been reached, and the request it waits for."""

    point: CutPoint
    request: int


class Connection:
    """A client's connection, and the server's that belongs to it."""

    def __init__(self, proxy: "Proxy", sock: socket.socket) -> None:
        self._proxy, self._socket = proxy, sock
        self._loop = asyncio.get_running_loop()
        self.client = Side(proxy, made=self._client_made, received=self._from_client, lost=self._client_lost)
        self.server = Side(proxy, made=lambda: None, received=self._from_server, lost=self._server_lost)
        self.client.other, self.server.other = self.server, self.client
        self._to_server = Delay(proxy, self.server.write, self.server.close)
        self._to_client = Delay(proxy, self._deliver, self.client.close)
        self._greeting = Greeting()
        self._said = Client()
        self._answers = Server()
        self._answered = 0  # of the client's requests
        self._logged_in = False
        self._server_spoke = False  # last
        self._state = b""
        self._is_cut = False
        self._pending: _Pending | None = None
        self._finishing: int | None = None  # the client is cut; the server is left alone until it has answered so many
        self._last = self._loop.time()
        self._idle: asyncio.TimerHandle | None = None
        self._demotion: asyncio.Future[None] | None = None
        self._demoting = False
        self._held: list[bytes] = []  # what the client says meanwhile

    # What passes ------------------------------------------------------------------------------------------------------

    def _from_client(self, data: bytes) -> None:
        self._last = self._loop.time()
        if self._is_cut:
            return
        if self._demoting:
            self._held.append(data)
        elif self._greeting.over:
            self._hear(data)
        else:
            declined, data = self._greeting.feed(data)
            if declined:
                self._to_client.send(b"N" * declined)
            if data:
                self._to_server.send(data)

    def _hear(self, data: bytes) -> None:
        if self._server_spoke and data != TERMINATE:
            self._server_spoke = False
            self._proxy.round_trips += 1
        whole = 0  # up to here, requests are complete
        for sql, ends_request, end in self._said.feed(data):
            if sql is not None:
                self._execute(sql)
                if self._is_pending("before"):
                    return self._cut_pending(data[:whole])
            if ends_request:
                whole = end
                if self._is_pending("within"):
                    return self._cut_pending(data[:whole])
        return self._to_server.send(data)

    def _execute(self, sql: str) -> None:
        self._proxy.record(sql)
        if self._proxy.cut_points and self._pending is None:
            point = next((point for point in self._proxy.cut_points if point.fits(sql)), None)
            if point:
                point.take()
                # a simple query has been counted already; an extended one ends with the Sync to come
                self._pending = _Pending(point, self._said.requests + self._said.mid_request)

    def _is_pending(self, moment: Moment) -> bool:
        return self._pending is not None and self._pending.point.moment == moment

    def _cut_pending(self, passed: bytes = b"") -> None:
        """`passed`: what still goes to the server."""
        assert self._pending is not None
        if passed:
            self._to_server.send(passed)
        self._pending.point.cut(self)

    def _from_server(self, data: bytes) -> None:
        self._last = self._loop.time()
        start = passed = 0  # this part is the client's
        for state, end in self._answers.feed(data):
            self._state = state
            if self._demoting:
                start = passed = end
                self._demoted()
                continue
            self._answered += self._logged_in
            self._logged_in = True
            if self._withheld(self._answered):
                self._pass(data[start:passed])
                return self._cut_pending()
            passed = end
        partial = self._demoting or self._withheld(self._answered + 1)
        self._pass(data[start:passed] if partial else data[start:])
        self._demote_if_idle()
        if self._finishing is not None and self._answered >= self._finishing:
            self.server.close()
        return None

    def _withheld(self, answer: int) -> bool:
        """Whether the answer to the so-many-th request is one that shall never be delivered."""
        pending = self._pending
        return pending is not None and pending.point.moment == "after" and pending.request == answer

    def _pass(self, data: bytes) -> None:
        if data and not self._is_cut:
            self._to_client.send(data)

    def _deliver(self, data: bytes) -> None:
        self._server_spoke = self._logged_in
        self.client.write(data)

    # How it ends ------------------------------------------------------------------------------------------------------

    def _client_made(self) -> None:
        if not self.server.is_open:
            self.client.abort()
            return
        self._proxy.connections.append(self)
        self._last = self._loop.time()
        self.watch()

    def cut(self, how: Cut, *, tell_server: bool = True) -> None:
        """`tell_server` false: it may finish what it is at before its connection is closed."""
        if self._is_cut or not self.client.is_open:
            return
        self._is_cut = True
        self._proxy.forget(self)
        self._stop_watching()
        self._to_client.forget()
        if how == "fin":
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        elif how == "rst":
            reset_on_close(self._socket)
        else:
            self._proxy.hold(self._socket.dup(), how)
        self.client.abort()
        self.client.resume_writing()  # the server is not held up by a client that reads no more
        if how in ("fin", "rst"):
            self._end_server(tell_server)

    def _end_server(self, tell: bool) -> None:
        if not tell and self._answered < self._said.requests:
            self._finishing = self._said.requests
        else:
            self._to_server.forget()
            self.server.abort()

    def _client_lost(self) -> None:
        self._proxy.forget(self)
        self._stop_watching()
        self._to_client.forget()
        if not self._is_cut:
            self._to_server.send(b"")

    def _server_lost(self) -> None:
        if self._demotion and not self._demotion.done():
            self._demotion.set_result(None)
        self._to_server.forget()
        if not self._is_cut:
            self._to_client.send(b"")

    # Idleness ---------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Cuts it once nothing has passed for the proxy's `idle_after`. The hot path only notes the time."""
        self._stop_watching()
        if self._proxy.idle_after is not None and not self._is_cut:
            self._idle = self._loop.call_at(self._last + self._proxy.idle_after, self._check_idle)

    def _check_idle(self) -> None:
        idle_after = self._proxy.idle_after
        if idle_after is not None and self._loop.time() - self._last >= idle_after:
            self.cut(self._proxy.idle_cut)
        else:
            self.watch()

    def _stop_watching(self) -> None:
        if self._idle:
            self._idle.cancel()
            self._idle = None

    # Failover ---------------------------------------------------------------------------------------------------------

    def demote(self) -> "asyncio.Future[None] | None":
        """The server's answer, if it could be asked at once; otherwise it is when the connection is idle next."""
        self._demotion = self._loop.create_future()
        self._demote_if_idle()
        return self._demotion if self._demoting else None

    def _demote_if_idle(self) -> None:
        quiet = self._logged_in and self._answered == self._said.requests and not self._said.mid_request
        if self._demotion and not self._demotion.done() and quiet and self._state == b"I":
            self._demoting = True
            self.server.write(query("SET default_transaction_read_only = on"))

    def _demoted(self) -> None:
        self._demoting = False
        if self._demotion and not self._demotion.done():
            self._demotion.set_result(None)
        held, self._held = self._held, []
        for data in held:
            self._hear(data)


def reset_on_close(sock: socket.socket) -> None:
    """Closing it sends RST instead of FIN."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drop_arriving(sock: socket.socket) -> None:
    """The kernel drops whatever arrives for this socket from now on, but for SYN and RST: a client's kernel may use the
    port again for a new connection, which must not meet the old one's silence."""
    load_flags, if_syn_or_rst, keep, drop = (0x30, 0, 0, 13), (0x45, 0, 1, 0x06), (6, 0, 0, 0xFFFF), (6, 0, 0, 0)
    instructions = b"".join(struct.pack("HBBI", *one) for one in (load_flags, if_syn_or_rst, keep, drop))
    program = create_string_buffer(instructions)
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 4, addressof(program)))

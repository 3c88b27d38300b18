"""The Postgres protocol, as far as a proxy must read it: where messages end, what is executed, when the server is done.

Only headers are read of what does not matter, so that whole chunks can be passed on as they came.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

TERMINATE = b"X\x00\x00\x00\x04"
_HEADER = struct.Struct("!BI")
_LENGTH = struct.Struct("!I")
_STARTUP_CODE = struct.Struct("!II")

_REFUSED_REQUESTS = (80877103, 80877104)  # SSLRequest, GSSENCRequest
_PARSE, _BIND, _QUERY, _CLOSE = b"PBQC"
_ENDS_REQUEST = b"QSF"  # Query, Sync, FunctionCall: each is answered by one ReadyForQuery
_READY = b"Z"


class Message(NamedTuple):
    kind: int
    body: bytes
    end: int
    """Where in the chunk the message ends."""


class Frames:
    """Cuts one direction of a stream into messages, in whatever pieces it arrives; tells of those of some `kinds` only."""

    def __init__(self, kinds: bytes) -> None:
        self._kinds = kinds
        self._header = b""  # the beginning of one, if it came in two chunks
        self._left: int | None = None  # bytes of the message that are still to come; None: a header is next
        self._kind = 0
        self._body: bytearray | None = None

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """The messages that end in this chunk, in order."""
        at, size = 0, len(chunk)
        while at < size:
            if self._left is None:
                at = self._begin(chunk, at)
                if self._left is None:
                    return
            taken = min(self._left, size - at)
            if self._body is not None:
                self._body += chunk[at : at + taken]
            at += taken
            self._left -= taken
            if self._left == 0:
                self._left = None
                if self._body is not None:
                    yield Message(self._kind, bytes(self._body), at)

    def _begin(self, chunk: bytes, at: int) -> int:
        header = self._header + chunk[at : at + _HEADER.size - len(self._header)]
        at += len(header) - len(self._header)
        if len(header) < _HEADER.size:
            self._header = header
            return at
        self._header = b""
        self._kind, length = _HEADER.unpack(header)
        self._left = length - _LENGTH.size
        self._body = bytearray() if self._kind in self._kinds else None
        return at


class Greeting:
    """What a client says before messages have a type: requests for encryption, which are declined, then its start-up
    packet or a CancelRequest."""

    def __init__(self) -> None:
        self.over = False
        self._seen = b""

    def feed(self, chunk: bytes) -> tuple[int, bytes]:
        """How many requests for encryption were made, and what is for the server (from the start-up packet on)."""
        declined = 0
        self._seen += chunk
        while len(self._seen) >= _STARTUP_CODE.size:
            length, code = _STARTUP_CODE.unpack_from(self._seen)
            if len(self._seen) < length:
                break
            if code not in _REFUSED_REQUESTS:
                self.over = True
                packet, self._seen = self._seen, b""
                return declined, packet
            declined += 1
            self._seen = self._seen[length:]
        return declined, b""


class Heard(NamedTuple):
    """One message of the client that matters."""

    sql: str | None
    """What it executes, if it does."""
    ends_request: bool
    end: int


class Client:
    """What the client says after its start-up packet."""

    def __init__(self) -> None:
        self.requests = 0
        """How many the server has to answer with ReadyForQuery, so far."""
        self.mid_request = False
        """Something was said that no Sync has followed yet."""
        self._frames = Frames(b"PBCQSFDEH")
        self._statements: dict[bytes, str] = {}

    def feed(self, chunk: bytes) -> Iterator[Heard]:
        for kind, body, end in self._frames.feed(chunk):
            ends_request = kind in _ENDS_REQUEST
            self.mid_request = not ends_request
            self.requests += ends_request
            yield Heard(self._executed(kind, body), ends_request, end)

    def _executed(self, kind: int, body: bytes) -> str | None:
        if kind == _BIND:
            return self._statements.get(body.split(b"\0", 2)[1])
        if kind == _QUERY:
            return body[:-1].decode(errors="replace")
        if kind == _PARSE:
            name, sql, _ = body.split(b"\0", 2)
            self._statements[name] = sql.decode(errors="replace")
        elif kind == _CLOSE and body[:1] == b"S":
            self._statements.pop(body[1:-1], None)
        return None


class Server:
    """What the server says: only when it is ready matters."""

    def __init__(self) -> None:
        self._frames = Frames(_READY)

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, int]]:
        """For each ReadyForQuery: the state (``I`` idle, ``T`` in a transaction, ``E`` in a failed one), and its end."""
        for _, body, end in self._frames.feed(chunk):
            yield body, end


def query(sql: str) -> bytes:
    """A simple query as a message."""
    body = sql.encode() + b"\0"
    return b"Q" + _LENGTH.pack(len(body) + _LENGTH.size) + body

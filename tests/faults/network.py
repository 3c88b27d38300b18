"""A network between a client and Postgres whose packets the kernel can lose, both ways and without a word.

    client ── veth ═══════ veth │ listener ── asyncio ── Postgres on loopback
           this namespace       │ a network namespace of its own

The listener's socket is made in the namespace but served by this process: a socket stays in the namespace it was made
in, whoever reads it. So nothing but file descriptors of this process holds the namespace, and it goes with them.

To drop, the permanent neighbour entry at each end gets a MAC address that nobody has. Whoever sends sees a packet that
left; whoever is at the other end discards it as somebody else's. No error, no RST, no ICMP, and no kernel module.
Postgres itself notices nothing: its side of each connection stays open on loopback.
"""

import asyncio
import ctypes
import functools
import os
import secrets
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address

from sqlalchemy import make_url

CLONE_NEWNET = 0x40000000
BENCHMARK_RANGE = IPv4Address("198.18.0.0")
"""198.18.0.0/15 is set aside for tests of networks (RFC 2544): nobody's real address, and never routed outside."""

SUBNETS = 2**15
"""Subnets of four addresses (/30) in that range."""

HERE, THERE, NOBODY = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:ff"
INSIDE = "inside"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: on, for 0 seconds."""

PIECE = 2**16
GRACE = 20
"""Seconds for one call of `ip`, which takes some milliseconds."""


class NetworkNotAllowed(Exception):
    """The machine refuses; the message is one line."""


class Network:
    """Connect to `address` (host, port) instead of to the server."""

    def __init__(self, link: "_Link", address: tuple[str, int]) -> None:
        self.address = address
        self._link = link

    def through(self, database_url: str) -> str:
        """The same database, reached over this network."""
        host, port = self.address
        return make_url(database_url).set(host=host, port=port).render_as_string(hide_password=False)

    async def drop(self) -> None:
        """From now on packets are lost both ways; connections stay what they are."""
        await asyncio.to_thread(self._link.send_to, here=NOBODY, there=NOBODY)

    async def restore(self) -> None:
        """Packets arrive again, those of connections that were open before too, with their next retransmission."""
        await asyncio.to_thread(self._link.send_to, here=HERE, there=THERE)


@asynccontextmanager
async def open_network(upstream: tuple[str, int]) -> AsyncIterator[Network]:
    """A network whose far end forwards to `upstream`; raises `NetworkNotAllowed` where `why_not` says so."""
    with _open_link() as link, _Relay(link.listener, upstream) as relay:
        serving = asyncio.create_task(relay.serve())
        try:
            yield Network(link, link.listener.getsockname())
        finally:
            serving.cancel()
            await asyncio.wait([serving])
            if not serving.cancelled():
                serving.result()


@functools.cache
def why_not() -> str | None:
    """Why this machine does not allow such a network, in one line; found out by making one."""
    if os.geteuid() != 0:
        return "a network of our own needs root"
    for program in ("ip", "nsenter"):
        if shutil.which(program) is None:
            return f"a network of our own needs the program {program}"
    try:
        with _open_link():
            return None
    except NetworkNotAllowed as refused:
        return str(refused)


@dataclass(frozen=True)
class _Link:
    """Two ends of a cable, one of them in the namespace, where `listener` waits."""

    name: str
    here: IPv4Address
    there: IPv4Address
    namespace: str
    listener: socket.socket

    def connect(self) -> None:
        peer = f"peer name {INSIDE} address {THERE} netns {self.namespace}"
        _ip(f"link add {self.name} address {HERE} type veth {peer}")
        _ip(f"address add {self.here}/30 dev {self.name}", f"link set {self.name} up")
        _ip(f"address add {self.there}/30 dev {INSIDE}", f"link set {INSIDE} up", namespace=self.namespace)
        self.send_to(here=HERE, there=THERE)
        self.listener.bind((str(self.there), 0))
        self.listener.listen(128)

    def send_to(self, *, here: str, there: str) -> None:
        """The MAC addresses that packets go to: for this end of the cable, and for the other."""
        _ip(f"neighbour replace {self.there} lladdr {there} dev {self.name} nud permanent")
        _ip(f"neighbour replace {self.here} lladdr {here} dev {INSIDE} nud permanent", namespace=self.namespace)

    def remove(self) -> None:
        """Both ends at once: the kernel would do it too, some time after the namespace's last file is closed."""
        if any(name == self.name for _, name in socket.if_nameindex()):
            _ip(f"link delete {self.name}")


@contextmanager
def _open_link() -> Iterator[_Link]:
    with ExitStack() as stack:
        namespace, listener = _new_namespace()
        stack.callback(os.close, namespace)
        stack.enter_context(listener)
        first = BENCHMARK_RANGE + 4 * secrets.randbelow(SUBNETS)
        name = f"px{os.getpid()}-{secrets.token_hex(2)}"  # 14 of the 15 characters that an interface's name may have
        link = _Link(name, first + 1, first + 2, f"/proc/{os.getpid()}/fd/{namespace}", listener)
        stack.callback(link.remove)
        link.connect()
        yield link


def _new_namespace() -> tuple[int, socket.socket]:
    """A new network namespace, as an open file, and a socket in it. `unshare` is for one thread, which ends with it."""

    def make() -> tuple[int, socket.socket]:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):  # os.unshare is newer than Python 3.11
            raise NetworkNotAllowed(f"no new network namespace: {os.strerror(ctypes.get_errno())}")
        listener = socket.socket()
        listener.setblocking(False)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), listener

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _ip(*commands: str, namespace: str | None = None) -> None:
    enter = ["nsenter", f"--net={namespace}", "--"] if namespace else []
    done = subprocess.run(
        [*enter, "ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=GRACE,
    )
    if done.returncode:
        raise NetworkNotAllowed(
            f"ip {' '.join(commands[0].split()[:2])}: {(done.stderr.splitlines() or ['failed'])[0]}"
        )


class _Relay:
    """Forwards each connection that reaches the listener to `upstream`.

    Clients' sockets are kept until the end, and to close one resets it (a client is told of the server's end by a FIN all
    the same). Otherwise it may live on in the kernel, and the namespace with it, for minutes after this process has
    ended: while packets are dropped its FIN is not acknowledged.
    """

    def __init__(self, listener: socket.socket, upstream: tuple[str, int]) -> None:
        self._listener = listener
        self._upstream = upstream
        self._clients: set[socket.socket] = set()

    def __enter__(self) -> "_Relay":
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.copy():
            self._reset(client)

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                self._clients.add(client)
                group.create_task(self._forward(client))

    async def _forward(self, client: socket.socket) -> None:
        try:
            with socket.socket() as server:
                server.setblocking(False)
                await asyncio.get_running_loop().sock_connect(server, self._upstream)
                async with asyncio.TaskGroup() as both:
                    both.create_task(_pump(client, server))
                    both.create_task(_pump(server, client))
        except* OSError:
            self._reset(client)

    def _reset(self, client: socket.socket) -> None:
        self._clients.discard(client)
        client.close()


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Until the end of what `source` sends; then `target` is told that nothing more comes."""
    loop = asyncio.get_running_loop()
    while piece := await loop.sock_recv(source, PIECE):
        await loop.sock_sendall(target, piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)

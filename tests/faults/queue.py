"""A relay in front of Cloud Tasks, or of its emulator, that refuses, loses replies and delays on demand."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import grpc
import grpc.aio

SERVICE = "google.cloud.tasks.v2.CloudTasks"
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # or a second relay would silently share the port
    ("grpc.server.max_pending_requests", 100_000),  # of calls; gRPC's own 1,000 cancels some of a large burst
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
]
_OF_THE_TRANSPORT = ("grpc-", ":", "user-agent", "content-type", "te")
"""Beginnings of the names of metadata that each connection has of its own."""


@dataclass(frozen=True, slots=True)
class Call:
    """`method`: its short name, as "CreateTask"; `number`: from 1, of this method; `patience`: seconds that the caller
    waits at most, None: for ever."""

    method: str
    number: int
    request: bytes
    patience: float | None


Hook: TypeAlias = Callable[[Call], Awaitable[None] | None]


class QueueRelay:
    """Cloud Tasks at an `endpoint` of its own, `upstream` by way of faults. Requests, replies and refusals pass as the
    bytes they are, so that it knows nothing of the methods. Everything may be switched while it runs, also by a hook,
    for what comes after it in the same call."""

    def __init__(self, upstream: str) -> None:
        """`upstream`: host:port of a server without TLS."""
        self.endpoint = ""
        self.calls: Counter[str] = Counter()
        """By method; those refused included."""
        self.before: Hook | None = None
        """Called, and awaited if that is meant, when a call has come: nothing has been forwarded."""
        self.after: Hook | None = None
        """The same when upstream has answered, or refused: the caller knows nothing of it yet."""
        self.refuse = False
        """Calls are answered UNAVAILABLE instead of being forwarded."""
        self.lose: grpc.StatusCode | None = None
        """Calls are forwarded, and whatever upstream replies, the caller is told this instead."""
        self.delay = 0.0
        """Seconds before a call is forwarded. One whose caller has given up meanwhile is not."""
        self._upstream = upstream

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._upstream)
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_Methods(self._relay),))
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        await self._channel.close(None)

    async def _relay(self, method: str, request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        self.calls[method] += 1
        call = Call(method, self.calls[method], request, context.time_remaining())
        await _ask(self.before, call)
        if self.refuse:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"The relay is switched to refuse {method}.")
        if self.delay:
            await asyncio.sleep(self.delay)
        answer = await self._forward(method, request, context)
        await _ask(self.after, call)
        if self.lose:
            await context.abort(self.lose, f"The relay is switched to lose the reply to {method}.")
        if isinstance(answer, grpc.aio.AioRpcError):
            said: Any = answer.trailing_metadata()
            await context.abort(answer.code(), answer.details() or "", tuple(said))
        return answer

    async def _forward(
        self, method: str, request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]"
    ) -> "bytes | grpc.aio.AioRpcError":
        forward: Callable[..., Awaitable[bytes]] = self._channel.unary_unary(f"/{SERVICE}/{method}", None, None)
        metadata = [pair for pair in context.invocation_metadata() or () if not pair[0].startswith(_OF_THE_TRANSPORT)]
        try:
            return await forward(request, timeout=context.time_remaining(), metadata=metadata)
        except grpc.aio.AioRpcError as refusal:
            return refusal


class _Methods(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs only
    """Every method of the service, whatever its name."""

    def __init__(self, relay: Callable[[str, bytes, Any], Awaitable[bytes]]) -> None:
        self._relay = relay

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        if service != SERVICE:
            return None
        return grpc.unary_unary_rpc_method_handler(partial(self._relay, method))


async def _ask(hook: Hook | None, call: Call) -> None:
    if hook is not None:
        awaitable = hook(call)
        if awaitable is not None:
            await awaitable

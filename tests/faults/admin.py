"""AlloyDB's Admin API (the real gRPC service, over TLS) and Google's token endpoint, on loopback."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self

import google.cloud.alloydb_v1beta as alloydb
import grpc

from tests.faults.certificates import Authority

_SERVICE = "google.cloud.alloydb.v1beta.AlloyDBAdmin"


class Admin:
    """What the connector asks before it connects. Everything may be switched while it runs."""

    def __init__(self, authority: Authority, *, private: str, public: str, psc: str) -> None:
        self.addresses = {"PRIVATE": private, "PUBLIC": public, "PSC": psc}
        """Handed out by kind. An empty one: the instance has none of that kind."""
        self.client_authority = authority
        """Signs the certificates of clients."""
        self.certificate_lifetime = timedelta(hours=1)
        self.down: grpc.StatusCode | None = None
        """Every call is answered with this error."""
        self.hangs = False
        """No call is answered."""
        self.calls: list[str] = []
        """The names of the methods called, in order, those included that failed."""
        self.port = 0
        self._authority = authority

    @property
    def endpoint(self) -> str:
        return f"localhost:{self.port}"

    async def __aenter__(self) -> Self:
        certificate, key = self._authority.server("localhost", "127.0.0.1")
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self._handlers(),))
        credentials = grpc.ssl_server_credentials([(key.encode(), certificate.encode())])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    def _handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        methods = {
            "GetConnectionInfo": self._method(self._connection_info, alloydb.GetConnectionInfoRequest),
            "GenerateClientCertificate": self._method(self._certificate, alloydb.GenerateClientCertificateRequest),
        }
        return grpc.method_handlers_generic_handler(_SERVICE, methods)

    def _method(self, answer: Callable[[Any], Any], request: Any) -> "grpc.RpcMethodHandler[Any, Any]":
        name = request.__name__.removesuffix("Request")

        async def handle(message: Any, context: Any) -> Any:
            self.calls.append(name)
            if self.hangs:
                await asyncio.Event().wait()
            if self.down is not None:
                await context.abort(self.down, f"The stand-in's Admin API is switched to {self.down.name}.")
            return answer(message)

        return grpc.unary_unary_rpc_method_handler(handle, request.deserialize, lambda m: type(m).serialize(m))

    def _connection_info(self, request: Any) -> Any:
        return alloydb.ConnectionInfo(
            name=f"{request.parent}/connectionInfo",
            ip_address=self.addresses["PRIVATE"],
            public_ip_address=self.addresses["PUBLIC"],
            psc_dns_name=self.addresses["PSC"] and f"{self.addresses['PSC']}.",
            instance_uid="stand-in",
        )

    def _certificate(self, request: Any) -> Any:
        authority = self.client_authority
        return alloydb.GenerateClientCertificateResponse(
            pem_certificate_chain=[authority.client(request.public_key, self.certificate_lifetime), authority.pem],
            ca_cert=self._authority.pem,
        )


class Tokens:
    """The OAuth token endpoint, as google.auth calls it to refresh credentials."""

    def __init__(self) -> None:
        self.token = "stand-in-token"  # the same for all, for they may share a server, and so its roles
        """What is handed out; IAM users log in with it."""
        self.lifetime = timedelta(hours=1)
        self.calls = 0
        self._answering: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}/token"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self._answering.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next((line.split(":")[1] for line in head.splitlines() if line.startswith("content-length:")), "0")
        await reader.readexactly(int(length))
        self.calls += 1
        seconds = int(self.lifetime.total_seconds())
        body = json.dumps({"access_token": self.token, "expires_in": seconds, "token_type": "Bearer"}).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await writer.drain()

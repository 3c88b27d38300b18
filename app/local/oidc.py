"""ID tokens as Google signs them for a service account, and the certificates to check them with, over real HTTP.

A service under test verifies with google-auth as in production; only the address of the certificates differs.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

ISSUER = "https://accounts.google.com"
LIFETIME_SECONDS = 3600
CERTS_PATH = "/oauth2/v1/certs"
"""Certificates as {kid: X.509 PEM}: every google-auth reads it, and without PyJWT."""
JWKS_PATH = "/oauth2/v3/certs"
"""The same key as a JWK set. Google serves the two forms at the same two paths."""

_PATIENCE_SECONDS = 10.0
_RESPONSE = (
    "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
)


class Issuer:
    """One RSA key, made when the object is (about 0.1 s), and the tokens it signs."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._certificate = _self_signed(self._key)
        self.key_id = self._certificate.fingerprint(hashes.SHA256()).hex()[:40]

    def id_token(self, email: str, audience: str, /, **others: Any) -> str:
        """The token that Cloud Tasks puts into `Authorization` for the service account `email`. `others`: claims that are
        to be different."""
        now = int(time.time())
        account = _account_id(email)
        claims = {
            "iss": ISSUER,
            "aud": audience,
            "azp": account,
            "sub": account,
            "email": email,
            "email_verified": True,
            "iat": now,
            "exp": now + LIFETIME_SECONDS,
            **others,
        }
        return jwt.encode(claims, self._key, algorithm="RS256", headers={"kid": self.key_id})

    def documents(self) -> dict[str, str]:
        """What the certificate address serves: path → JSON."""
        pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        jwk = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        jwk |= {"kid": self.key_id, "alg": "RS256", "use": "sig"}
        return {CERTS_PATH: json.dumps({self.key_id: pem}), JWKS_PATH: json.dumps({"keys": [jwk]})}


@asynccontextmanager
async def publish(documents: Mapping[str, str], host: str, port: int) -> AsyncIterator[str]:
    """Serve fixed JSON `documents` over HTTP; yields the base URL. `port` 0 takes a free one."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer(request, documents))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, host, port)
    try:
        yield f"http://{host}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await server.wait_closed()


def _answer(request: bytes, documents: Mapping[str, str]) -> bytes:
    _method, target, *_rest = [*request.decode("latin-1").split(" "), "", ""]
    document = documents.get(target.partition("?")[0])
    body = "{}" if document is None else document
    head = _RESPONSE.format(status="404 Not Found" if document is None else "200 OK", length=len(body))
    return (head + body).encode()


def _account_id(email: str) -> str:
    """A service account's unique id: 21 digits, always the same for one email."""
    return "1" + str(int(hashlib.sha256(email.encode()).hexdigest(), 16))[:20]


def _self_signed(key: rsa.RSAPrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud-tasks-emulator")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )

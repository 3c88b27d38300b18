"""A stand-in for AlloyDB that the real connector takes for one: Admin API, token endpoint, and a proxy over mutual TLS
in front of a real Postgres."""

import atexit
import errno
import json
import os
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.faults.admin import Admin, Tokens
from tests.faults.certificates import Authority
from tests.faults.proxy import Proxy

INSTANCE = "projects/p/locations/us-central1/clusters/c/instances/i"
IAM_USER = "worker@project.iam"
PORT = 5433
"""Fixed in the connector."""

_ADDRESSES = 20
"""Tries; of some sixteen million, one in use is bad luck."""
_ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
_CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"


class AlloyDB:
    """One instance with one Postgres behind it. `database` is the login of the built-in user."""

    def __init__(
        self, postgres_url: str, proxy: Proxy, admin: Admin, tokens: Tokens, environment: dict[str, str]
    ) -> None:
        self.proxy = proxy
        self.admin = admin
        self.tokens = tokens
        self.environment = environment
        """For child processes: the credentials, and the authority that gRPC shall trust."""
        self._url = postgres_url

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments for `app.settings.load()`: the built-in user with its password."""
        login = urlsplit(self._url)
        return {
            "alloydb_instance": INSTANCE,
            "alloydb_endpoint": self.admin.endpoint,
            "alloydb_user": unquote(login.username or ""),
            "alloydb_password": unquote(login.password or ""),
            "alloydb_database": login.path.lstrip("/"),
        }

    def iam_settings(self) -> dict[str, Any]:
        """The same for an IAM user, who has no password; see `create_iam_user`."""
        settings = self.settings | {"alloydb_user": IAM_USER}
        del settings["alloydb_password"]
        return settings

    async def create_iam_user(self) -> None:
        """The role, with the token of now as its password, and every right in the database. May be repeated."""
        connection = await asyncpg.connect(self._url)
        try:
            exists = await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", IAM_USER)
            role = f"{'ALTER' if exists else 'CREATE'} ROLE %I LOGIN PASSWORD %L"
            for statement in (role, *_RIGHTS):
                arguments = (statement, IAM_USER, self.tokens.token, urlsplit(self._url).path.lstrip("/"))
                await connection.execute(
                    await connection.fetchval("SELECT format($1, $2::text, $3::text, $4::text)", *arguments)
                )
        finally:
            await connection.close()


_RIGHTS = (
    "GRANT ALL ON DATABASE %3$I TO %1$I",
    "GRANT ALL ON SCHEMA public TO %1$I",
    "GRANT ALL ON ALL TABLES IN SCHEMA public TO %1$I",
    "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO %1$I",
)


@asynccontextmanager
async def open_alloydb(postgres_url: str, folder: Path, authority: Authority | None = None) -> AsyncIterator[AlloyDB]:
    """A stand-in in front of this Postgres database. The files it needs go to `folder`.

    Within the block GOOGLE_APPLICATION_CREDENTIALS leads `google.auth.default()` to its credentials. Without `authority`
    it is `process_authority()`; another one is trusted by gRPC only in a process that was started with `environment`.
    """
    authority = authority or process_authority()
    async with (
        _open_proxy(postgres_url, authority) as proxy,
        Admin(authority, private=proxy.address[0], public=proxy.address[0], psc=name_of(proxy.address[0])) as admin,
        Tokens() as tokens,
    ):
        environment = {_CREDENTIALS: _write_credentials(folder, tokens), _ROOTS: _write_roots(folder, authority)}
        with _in_environment(_CREDENTIALS, environment[_CREDENTIALS]):
            yield AlloyDB(postgres_url, proxy, admin, tokens, environment)


@cache
def process_authority() -> Authority:
    """The authority that gRPC trusts in this process: the first call writes its certificate to a temporary file and sets
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH for good. gRPC reads that once, before the process's first secure channel."""
    authority = Authority()
    descriptor, path = tempfile.mkstemp(prefix="stand-in-authority-", suffix=".pem")
    with os.fdopen(descriptor, "w") as file:
        file.write(authority.pem)
    atexit.register(Path(path).unlink, missing_ok=True)
    os.environ[_ROOTS] = path
    return authority


def name_of(ip: str) -> str:
    """A name, for PSC, that every resolver takes to this loopback address without being asked: a shorter spelling of it,
    whose last part stands for two bytes. TLS compares it as a DNS name."""
    first, second, third, fourth = ip.split(".")
    return f"{first}.{second}.{int(third) * 256 + int(fourth)}"


@asynccontextmanager
async def _open_proxy(postgres_url: str, authority: Authority) -> AsyncIterator[Proxy]:
    """On a loopback address that nobody else uses: the port is fixed, and several stand-ins run at once."""
    server = urlsplit(postgres_url)
    assert server.hostname
    async with AsyncExitStack() as stack:
        for attempt in count(1):
            ip = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
            proxy = Proxy(
                (server.hostname, server.port or 5432), host=ip, port=PORT, tls=authority.tls(ip, name_of(ip))
            )
            try:
                await stack.enter_async_context(proxy)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or attempt == _ADDRESSES:
                    raise
            else:
                break
        yield proxy


def _write_credentials(folder: Path, tokens: Tokens) -> str:
    """A service account's key file. It names no account: google.auth would otherwise look up the account's "regional
    access boundary" at Google, in a thread of its own; without a name it logs an error and leaves it at that."""
    key = {
        "type": "service_account",
        "client_email": "",
        "private_key": _private_key(),
        "private_key_id": "stand-in",
        "project_id": "p",
        "token_uri": tokens.url,
    }
    path = folder / "credentials.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(key))
    return str(path)


@cache
def _private_key() -> str:
    """One is enough for a process: it takes a tenth of a second, and proves nothing to anybody."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _write_roots(folder: Path, authority: Authority) -> str:
    path = folder / "authority.pem"
    path.write_text(authority.pem)
    return str(path)


@contextmanager
def _in_environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

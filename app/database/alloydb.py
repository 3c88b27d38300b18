"""An AlloyDB instance, by Google's connector: one key pair, and what the Admin API said, for all connections."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog

from app.errors import DatabaseRefused
from app.settings import Settings

ADMIN_API = "alloydb.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"

log = structlog.get_logger(__name__)


class ConnectorBroken(ConnectionError):
    """The connector has cancelled what it shares among all connections. Another has taken its place."""


@asynccontextmanager
async def open_instance(settings: Settings) -> AsyncIterator["Instance"]:
    """Connects to nothing yet. Raises `DatabaseRefused` without Google credentials."""
    instance = Instance(settings.alloydb_instance or "", await _maker(settings))
    try:
        await instance.ready()
        yield instance
    finally:
        await instance.close()


class Instance:
    """`make` makes a connector that has been used by nobody, on the running loop."""

    def __init__(self, uri: str, make: Callable[[], Any]) -> None:
        self._uri = uri
        self._make = make
        self._whole = asyncio.create_task(_with_keys(make()))

    async def ready(self) -> None:
        """Returns when the connector has what all connections share, or is broken, which the first connection mends."""
        await asyncio.wait([self._whole])

    async def connect(self, **options: Any) -> Any:
        """An asyncpg connection. Raises `ConnectorBroken` where the connector is found broken, for the caller to try again.

        A task that is cancelled though nobody asked for it has met something shared that was cancelled with somebody else.
        The connector keeps that, and would hand it to everyone from then on."""
        whole = self._whole
        try:
            connector = await asyncio.shield(whole)
            return await connector.connect(self._uri, "asyncpg", **options)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._replace(whole)
            raise ConnectorBroken("The AlloyDB connector was broken and has been replaced.") from error

    def _replace(self, broken: "asyncio.Task[Any]") -> None:
        """Once, however many find it broken at the same time. It needs no closing: it refreshes nothing by itself."""
        if self._whole is broken:
            log.warning("the AlloyDB connector is broken and is replaced: it cancels every connection")
            self._whole = asyncio.create_task(_with_keys(self._make()))

    async def close(self) -> None:
        if not self._whole.cancelled():
            await (await self._whole).close()


async def _with_keys(connector: Any) -> Any:
    """Waits for its key pair, in a task that no deadline cancels. The connector makes the pair in a task of its own and
    lets whoever connects first wait for that directly: a deadline that runs out meanwhile, as it can where the process is
    held up, would cancel the pair for good. Its attribute is the only way to the pair."""
    await connector._keys
    return connector


async def _maker(settings: Settings) -> Callable[[], Any]:
    """The connector refreshes its certificate only when it connects: on Cloud Run a background refresh sleeps with the
    CPU. Imported here, as it takes half a second that a service on plain Postgres need not spend."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud.alloydbconnector import AsyncConnector, RefreshStrategy

    try:
        credentials, _ = await asyncio.to_thread(google.auth.default, scopes=[SCOPE])
    except DefaultCredentialsError as error:
        raise DatabaseRefused(
            "There are no Google credentials for AlloyDB: give the service a service account, or run"
            " `gcloud auth application-default login`."
        ) from error
    return lambda: AsyncConnector(
        credentials=credentials,
        refresh_strategy=RefreshStrategy.LAZY,
        ip_type=settings.alloydb_ip_type,
        enable_iam_auth=settings.alloydb_password is None,
        user_agent="proctor",
        alloydb_api_endpoint=settings.alloydb_endpoint or ADMIN_API,
    )

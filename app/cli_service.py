"""The commands of `proctor` that run the service, or parts of it: serve, migrate, local, demo, emulator."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.errors import DatabaseRefused, DatabaseUnavailable, ProctorError

if TYPE_CHECKING:
    from app.local.cloud_tasks import CloudTasksEmulator

service = typer.Typer()


@service.command()
def serve() -> None:
    """Run the service, as PROCTOR_… variables say."""
    from app.serve import serve

    serve()


@service.command()
def migrate() -> None:
    """Bring the database's tables to this version's."""
    from sqlalchemy.exc import DBAPIError

    from app.database.failures import describe, is_transient, refusal
    from app.database.migrate import migrate
    from app.settings import load

    settings = load()
    try:
        before, after = migrate(settings)
    except Exception as error:
        if reason := refusal(error):
            raise DatabaseRefused(f"The database refused: {reason} It is the {settings.database}.") from error
        if is_transient(error):
            raise DatabaseUnavailable(f"There is no {settings.database}: {describe(error)}") from error
        if isinstance(error, DBAPIError):
            raise ProctorError(f"The migration failed: {describe(error)}") from error
        raise
    print(f"{before or 'empty'} → {after}")


@service.command()
def local(
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port of the service on 127.0.0.1; 0: a free one.")
    ] = 8080,
    data: Annotated[Path, typer.Option(metavar="DIRECTORY", help="Where everything is kept.")] = Path(".proctor"),
) -> None:
    """Run the whole system on this machine: Postgres, queue, service."""
    with _local_extra():
        from app.local.stack import run_local
    run_local(port=port, data=data)


@service.command()
def demo() -> None:
    """Run a real evaluation on this machine, end to end."""
    with _local_extra():
        from app.local.demo import run_demo
    raise typer.Exit(run_demo())


@service.command()
def emulator(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port of the gRPC API; 0: a free one.")
    ] = 8123,
    oidc_port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port of the tokens' certificates.")
    ] = 8124,
) -> None:
    """Run the Cloud Tasks emulator alone."""
    with _local_extra():
        from app.local.cloud_tasks import CloudTasksEmulator, serve

    def ready(running: "CloudTasksEmulator") -> None:
        message = f"Cloud Tasks is at {running.endpoint} (gRPC, no TLS), certificates at {running.certs_url}"
        print(message, file=sys.stderr)

    try:
        asyncio.run(serve(CloudTasksEmulator(host=host, port=port, oidc_port=oidc_port), ready))
    except (OSError, RuntimeError) as error:
        raise ProctorError(f"The emulator cannot run at {host}:{port} and {oidc_port}: {error}") from error


@contextmanager
def _local_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("app"):
            raise
        raise ProctorError(f"{error.name} is missing here: pip install 'proctor[local]'") from error

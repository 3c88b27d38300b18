"""The real PgBouncer in transaction mode before a real Postgres, with few sessions for many clients."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
WHY_NOT = "" if PROGRAM else "there is no PgBouncer here: .ci/pgbouncer installs it, as root"

START_TIMEOUT = 30
"""Seconds; it takes some hundredths."""
PORTS = 5
"""Tried: each was free a moment before."""

SESSIONS = 2
"""Of the server, for each database: fewer than the clients that are at work at once."""


@contextmanager
def open_pgbouncer(postgres_url: str, folder: Path, **given: str) -> Iterator[str]:
    """Yields `postgres_url` by way of a PgBouncer of its own. `given`: further settings of its own file."""
    for tries_left in reversed(range(PORTS)):
        port = _free_port()
        process = _start(_written(postgres_url, folder, port, given), folder)
        try:
            if _listens(port, process):
                yield _at(postgres_url, port)
                return
            if not tries_left:
                raise RuntimeError((folder / "pgbouncer.out").read_text())
        finally:
            process.terminate()
            process.wait()


def _written(postgres_url: str, folder: Path, port: int, given: dict[str, str]) -> Path:
    server = urlsplit(postgres_url)
    folder.mkdir(exist_ok=True)
    users = folder / "users.txt"
    users.write_text(f'"{server.username}" "{server.password}"\n')
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": str(users),
        "pool_mode": "transaction",
        "default_pool_size": str(SESSIONS),
        "max_client_conn": "200",
        **given,
    }
    lines = ["[databases]", f"* = host={server.hostname} port={server.port}", "[pgbouncer]"]
    written = folder / "pgbouncer.ini"
    written.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in settings.items())]) + "\n")
    return written


def _start(settings: Path, folder: Path) -> "subprocess.Popen[bytes]":
    """As somebody who is not root, whom it refuses; and it ends with this process."""
    assert PROGRAM
    with (folder / "pgbouncer.out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "app.local.unprivileged", str(os.getpid()), PROGRAM, str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _listens(port: int, process: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.02)
    return False


def _at(url: str, port: int) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

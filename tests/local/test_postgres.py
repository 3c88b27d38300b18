"""The embedded server: what its start has to reckon with."""

import socket
from pathlib import Path

import asyncpg
import pytest

from app.local import postgres
from app.local.postgres import open_postgres


async def test_a_port_that_somebody_else_took_meanwhile_is_left_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], postgres._free_port()])
        monkeypatch.setattr(postgres, "_free_port", lambda: next(ports))
        with open_postgres(tmp_path / "postgres", durable=False) as url:
            connection = await asyncpg.connect(url)
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()
    assert list(ports) == []

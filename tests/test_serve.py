"""The process around the application: what serves it, and what it does not wait for."""

import os
import socket
from pathlib import Path

import anyio
import httpx
import pytest
from anyio import to_thread
from fastapi import FastAPI

from app.main import first_look, open_services
from app.serve import Server, config
from app.settings import Settings, load
from app.web.health import Readiness, ready

PATIENCE = 60


async def test_uvloop_and_httptools_serve() -> None:
    app = FastAPI()
    server = Server(config(app, load(database_url="postgresql://nobody@127.0.0.1:9/none")), app)

    @app.get("/")
    async def served_by() -> list[str]:
        (connection,) = server.server_state.connections
        return [type(connection).__module__, type(connection.loop).__module__]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with anyio.create_task_group() as group:
            group.start_soon(
                to_thread.run_sync, server.run, [listener]
            )  # in a loop of its own, as `proctor serve` has it
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                answer = await client.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")
            server.should_exit = True
    assert answer.json() == ["uvicorn.protocols.http.httptools_impl", "uvloop"]


async def test_it_is_ready_while_the_forkserver_warms(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forkserver is held at its very beginning: it waits for somebody to open the other end of a named pipe."""
    held = tmp_path / "held"
    os.mkfifo(held)
    (tmp_path / "sitecustomize.py").write_text(f"open({str(held)!r}).read()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with anyio.fail_after(PATIENCE):
        async with open_services(settings.model_copy(update={"queue_endpoint": "127.0.0.1:9"})) as services:
            await first_look(services)
            assert isinstance(await ready(services), Readiness)

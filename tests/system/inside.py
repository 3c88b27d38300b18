"""A worker in the test's own process: real HTTP, real children, and a database behind a proxy. Nobody listens to its queue:
pushes are made by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import psutil
from fastapi import FastAPI
from sqlalchemy import text

from app.database.engine import open_engine
from app.database.session import Database
from app.ledger import Ledger
from app.main import create_app
from app.runner.supervisor import OUTPUT
from app.serve import InnerServer, config
from app.settings import Settings, load
from tests.conftest import own_database
from tests.faults.proxy import Proxy

PATIENCE = 120
"""Seconds: what takes longer is stuck."""

_RUNNING = text("SELECT progress IS NOT NULL AS told FROM task_executions WHERE id = :id AND state = 'running'")
_ROWS = text(
    """/* test.rows */
SELECT 'evaluation' AS what, concat(ctid, xmin) AS version, to_jsonb(r) AS row FROM evaluations r WHERE id = :id
UNION ALL
SELECT 'execution', concat(ctid, xmin), to_jsonb(r) FROM task_executions r WHERE evaluation_id = :id
UNION ALL
SELECT 'attempt', concat(ctid, xmin), to_jsonb(r) FROM execution_attempts r WHERE execution_id LIKE :id || '.%'
UNION ALL
SELECT 'sample', concat(ctid, xmin), to_jsonb(r) FROM sample_results r WHERE evaluation_id = :id
ORDER BY 1, 2
"""
)


@dataclass(frozen=True)
class Inside:
    """`database` and `ledger` go round the proxy; the ledger is another worker's. `url`: of that database."""

    settings: Settings
    app: FastAPI
    client: httpx.AsyncClient
    proxy: Proxy
    url: str
    database: Database
    ledger: Ledger

    async def push(self, execution: str, cloud_task: str = "by-hand") -> httpx.Response:
        """As Cloud Tasks does."""
        headers = {"X-CloudTasks-TaskName": cloud_task, "X-CloudTasks-QueueName": "proctor"}
        return await self.client.post("/tasks/execute", json={"execution_id": execution}, headers=headers)

    def pushing(self, execution: str, cloud_task: str = "by-hand") -> "asyncio.Task[httpx.Response]":
        return asyncio.create_task(self.push(execution, cloud_task))

    async def to_the_end(self, execution: str) -> httpx.Response:
        """Pushes until it is acknowledged, as the queue does."""
        async with asyncio.timeout(PATIENCE):
            while (answer := await self.push(execution)).status_code in (409, 503):
                await asyncio.sleep(0.1)
        return answer

    async def planned(self, body: dict[str, Any]) -> str:
        """A new evaluation, whose plan has run: a report needs the plan's own log."""
        submitted = await self.client.post("/evaluations", json=body)
        assert submitted.status_code == 202, submitted.text
        evaluation = str(submitted.json()["id"])
        assert (await self.push(f"{evaluation}.plan")).json()["state"] == "succeeded"
        return evaluation

    async def get(self, path: str) -> Any:
        answer = await self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def rows(self, evaluation: UUID | str) -> list[tuple[Any, ...]]:
        """All that the database has of it. Equal only if nothing was written in between, not even the same again."""
        return [tuple(row) for row in await self.database.run(_ROWS, {"id": str(evaluation)})]

    async def under_way(self, *executions: str) -> list[psutil.Process]:
        """Their children, as soon as each has told of its sample."""
        async with asyncio.timeout(PATIENCE):
            for execution in executions:
                while not any(row.told for row in await self.database.run(_RUNNING, {"id": execution})):
                    await asyncio.sleep(0.05)
        return [await self.child(execution) for execution in executions]

    async def child(self, execution: str) -> psutil.Process:
        """The process that works at it, as soon as there is one."""
        async with asyncio.timeout(PATIENCE):
            while not (found := _working_at(execution)):
                await asyncio.sleep(0.02)
        return found[0]


@asynccontextmanager
async def open_inside(postgres: str, folder: Path, **given: Any) -> AsyncIterator[Inside]:
    """On a database of its own. `given`: settings."""
    async with own_database(postgres) as url:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        async with Proxy((address.hostname, address.port)) as proxy:
            usual = {
                "renew_interval": 0.2,
                "queue_endpoint": "127.0.0.1:9",
                "queue_patience": 0.1,
                "artifacts": f"file://{folder}/artifacts",
                "scratch": folder / "scratch",
                "worker": "inside",
                "port": 0,
            }
            settings = load(**{**usual, **given, "database_url": proxy.through(url)})
            direct = load(**{**usual, "database_url": url})
            async with open_engine(direct) as engine, _serving(settings) as (app, client):
                database = Database(engine, direct)
                yield Inside(
                    settings=settings,
                    app=app,
                    client=client,
                    proxy=proxy,
                    url=url,
                    database=database,
                    ledger=Ledger(database, lease=settings.lease, worker="another"),
                )


@asynccontextmanager
async def _serving(settings: Settings) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    app = create_app(settings)
    server = InnerServer(config(app, settings), app)
    serving = asyncio.create_task(server.serve())
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        ready.cancel()
        serving.result()
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=PATIENCE) as client:
            yield app, client
    finally:
        await server.drain()
        server.should_exit = True
        await asyncio.shield(asyncio.wait({serving}))


def _working_at(execution: str) -> list[psutil.Process]:
    """A child prints into a file of its attempt's folder, and nobody else does."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            printed = [file.path for file in process.open_files() if file.fd == 1]
            if any(f"/{execution}/" in path and path.endswith(OUTPUT) for path in printed):
                found.append(process)
    return found

"""What an evaluation leaves behind can be read without Proctor: by Inspect's viewer, and by its functions."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket
from urllib.parse import quote

import httpx
import psutil

from tests.system.conftest import PATIENCE, run, samples, spec


async def test_the_merged_log_opens_in_inspect_view(client: httpx.AsyncClient) -> None:
    view = await run(client, spec(task_args={"n": 3}))
    log = Path(view["log"].removeprefix("file://"))
    async with viewing(log.parent) as address, httpx.AsyncClient(base_url=address, timeout=PATIENCE) as http:
        (listed,) = (await http.get("/api/log-files")).json()["files"]
        shown = (await http.get(f"/api/logs/{quote(listed['name'], safe='')}")).json()
    assert shown["status"] == "success"
    assert [s["id"] for s in shown["samples"]] == [1, 2, 3]
    assert shown["results"]["scores"][0]["metrics"]["accuracy"]["value"] == 2 / 3


READ = """
import sys
from inspect_ai.log import list_eval_logs, read_eval_log
merged, evaluation, *transcripts = sys.argv[1:]
(only,) = list_eval_logs(merged)
assert read_eval_log(only).status == "success"
assert set(transcripts) < {info.name for info in list_eval_logs(evaluation)}
for transcript in transcripts:
    (sample,) = read_eval_log(transcript).samples
    assert sample.messages
"""


async def test_the_log_directories_are_plain_inspect_log_directories(client: httpx.AsyncClient) -> None:
    """In a process of its own: Inspect's synchronous functions leave event loops open behind them."""
    view = await run(client, spec(task_args={"n": 2}))
    log = Path(view["log"].removeprefix("file://"))
    transcripts = [s["transcript"] for s in await samples(client, view["id"])]
    command = [sys.executable, "-c", READ, str(log.parent), str(log.parents[2]), *transcripts]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@asynccontextmanager
async def viewing(directory: Path) -> AsyncIterator[str]:
    """The viewer's address. It takes no port 0, and seconds to take any: if somebody was quicker, it ends, and another is
    tried."""
    for _ in range(5):
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        viewer = start_viewer(directory, port)
        try:
            if await listens(viewer, port):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            viewer.kill()
            viewer.wait()
    raise AssertionError("the viewer does not start")


def start_viewer(directory: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "inspect_ai", "view", "start", "--log-dir", str(directory)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INSPECT_")}
    return subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL
    )


async def listens(viewer: "subprocess.Popen[bytes]", port: int) -> bool:
    """False: it has ended instead."""
    async with asyncio.timeout(PATIENCE):
        while viewer.poll() is None:
            own = psutil.Process(viewer.pid).net_connections("tcp")
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in own):
                return True
            await asyncio.sleep(0.1)
    return False

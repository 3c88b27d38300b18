"""What an evaluation leaves behind can be read without Proctor: by Inspect's viewer, and by its functions."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from socket import socket
from urllib.parse import quote

import httpx

from tests.system.conftest import PATIENCE, run, samples, spec


async def test_the_merged_log_opens_in_inspect_view(client: httpx.AsyncClient) -> None:
    view = await run(client, spec(task_args={"n": 3}))
    log = Path(view["log"].removeprefix("file://"))
    viewer, address = start_viewer(log.parent)
    try:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as http:
            (listed,) = (await answered(http, "/api/log-files")).json()["files"]
            shown = (await http.get(f"/api/logs/{quote(listed['name'], safe='')}")).json()
    finally:
        viewer.kill()
        viewer.wait()
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


def start_viewer(directory: Path) -> tuple["subprocess.Popen[bytes]", str]:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "inspect_ai", "view", "start", "--log-dir", str(directory)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INSPECT_")}
    viewer = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL
    )
    return viewer, f"http://127.0.0.1:{port}"


async def answered(http: httpx.AsyncClient, path: str) -> httpx.Response:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await http.get(path)
            except httpx.TransportError:
                await asyncio.sleep(0.1)

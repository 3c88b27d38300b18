"""What an evaluation leaves behind can be read without Proctor: by Inspect's viewer, and by its functions."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket
from typing import Any
from urllib.parse import quote

import httpx
import psutil

from app.artifacts import TRANSCRIPTS
from tests.system.conftest import PATIENCE, ended, run, samples, spec


async def test_the_merged_log_opens_in_inspect_view(client: httpx.AsyncClient) -> None:
    view = await run(client, spec(task_args={"n": 3}))
    log = Path(view["log"].removeprefix("file://"))
    async with viewing(log.parents[2]) as address, httpx.AsyncClient(base_url=address, timeout=PATIENCE) as http:
        (listed,) = (await http.get("/api/log-files")).json()["files"]
        shown = (await http.get(f"/api/logs/{quote(listed['name'], safe='')}")).json()
    assert shown["status"] == "success"
    assert [s["id"] for s in shown["samples"]] == [1, 2, 3]
    assert shown["results"]["scores"][0]["metrics"]["accuracy"]["value"] == 2 / 3


READ = """
import sys
from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample_summaries
evaluation, transcripts = sys.argv[1:]
(counted,) = list_eval_logs(evaluation)
log = read_eval_log(counted)
assert (log.status, log.location) == (sys.stdin.readline().strip(), counted.name)
print(*(f"{s.id}.{s.epoch}" for s in read_eval_log_sample_summaries(counted)))
parts = list_eval_logs(transcripts)
assert {read_eval_log(part, header_only=True).eval.eval_id for part in parts}.isdisjoint({log.eval.eval_id})
for url in sys.stdin.read().split():
    assert url in {part.name for part in parts}
    (sample,) = read_eval_log(url).samples
    assert sample.messages
"""


async def test_a_reader_of_an_evaluation_s_folder_counts_one_log(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """However often it was retried; and each transcript is a log by itself, apart."""
    flag = tmp_path / "flag"
    how = {"n": 3, "how": f"fail:3:{flag}", "sample": 2}
    view = await run(client, spec(task_args=how, epochs=2, max_failures=1, continue_on_fail=True))
    said = [(view["state"], await read(client, view))]
    while view["state"] == "failed":
        assert len(said) < 4
        assert (await client.post(f"/evaluations/{view['id']}/retry")).status_code == 202
        view = await ended(client, view["id"])
        said.append((view["state"], await read(client, view)))
    assert [state for state, _ in said] == ["failed", "failed", "succeeded"]
    assert {samples for _, samples in said} == {"1.1 2.1 3.1 1.2 2.2 3.2"}


async def read(client: httpx.AsyncClient, view: dict[str, Any]) -> str:
    """Its samples, as a reader of its folder counts them. In a process of its own: Inspect's synchronous functions leave
    event loops open behind them."""
    evaluation = Path(view["log"].removeprefix("file://")).parents[2]
    assert evaluation.name == view["id"]
    transcripts = [s["transcript"] for s in await samples(client, view["id"])]
    folders = str(evaluation), str(evaluation.parent / TRANSCRIPTS / view["id"])
    status = "success" if view["state"] == "succeeded" else "error"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", READ, *folders],
        input="\n".join([status, *transcripts]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def test_a_merged_log_that_was_left_behind_is_deleted_when_its_report_is_delivered_again(
    client: httpx.AsyncClient,
) -> None:
    """By an attempt that could not record it, say."""
    view = await run(client, spec(task_args={"n": 1}))
    log = Path(view["log"].removeprefix("file://"))
    left = log.parents[1] / "0" / log.name
    left.parent.mkdir()
    left.write_bytes(log.read_bytes())
    again = await client.post("/tasks/execute", json={"execution_id": f"{view['id']}.report"})
    assert again.status_code == 200
    assert (log.exists(), left.exists()) == (True, False)


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

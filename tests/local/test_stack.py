"""`proctor local`: one command, one data directory, and nothing left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes import command_line, is_forkserver
from tests.system.conftest import ended, spec, submit, until

PATIENCE = 60
QUICK_LEASE = {"PROCTOR_LEASE": "3", "PROCTOR_STATEMENT_TIMEOUT": "2", "PROCTOR_RENEW_INTERVAL": "1"}


@contextmanager
def local(data: Path, *, prefix: tuple[str, ...] = ()) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """The running command and the address it printed."""
    code = f"from pathlib import Path; from app.local.stack import run_local; run_local(0, Path({str(data)!r}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROCTOR_")} | QUICK_LEASE
    command = [*prefix, sys.executable, "-c", code]
    log = data.with_suffix(".log")
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environment | {"COLUMNS": "500"}, start_new_session=True)
    try:
        yield process, _address(process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if address := re.search(r"Proctor is at (http://\S+)", log.read_text()):
            return address[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def descendants(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    return not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_no_process_is_left(tmp_path: Path, number: signal.Signals) -> None:
    with local(tmp_path / "data") as (process, url):
        assert httpx.get(f"{url}/health/ready", timeout=PATIENCE).status_code == 200
        below = descendants(process)
        assert any(command_line(p).startswith("postgres: ") for p in below)
        assert any("app.local.unprivileged" not in command_line(p) for p in below)
        assert any(map(is_forkserver, below))
        # as a terminal does it: Ctrl-C reaches the whole foreground group
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait(PATIENCE) == (-9 if number == signal.SIGKILL else 0)
        assert gone(below)


async def test_an_evaluation_outlives_a_killed_stack(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with local(tmp_path / "data") as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            evaluation = await submit(client, spec(task_args={"n": 2, "how": f"until:{flag}", "sample": 2}))
            await until(client, f"/evaluations/{evaluation}", lambda v: v["samples"]["succeeded"] == 1)
            await until(client, f"/executions/{evaluation}.2", lambda v: v.get("progress"))
        below = descendants(process)
        process.kill()
        assert gone(below)
    flag.touch()
    with local(tmp_path / "data") as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            view = await ended(client, evaluation)
            assert (view["state"], view["samples"]["succeeded"]) == ("succeeded", 2)
            lost = (await client.get(f"/executions/{evaluation}.2")).json()
            assert [a["outcome"] for a in lost["attempts"]] == ["interrupted", "succeeded"]
            kept = (await client.get(f"/executions/{evaluation}.1")).json()
            assert kept["attempt"] == 1


def refused(data: Path, port: int = 0) -> str:
    """What `proctor local` says instead of running."""
    command = [sys.executable, "-m", "app.cli", "local", "--port", str(port), "--data", str(data)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    return ended.stderr


def test_a_second_one_on_the_same_data_says_who_holds_it(tmp_path: Path) -> None:
    """Also where it wants the same port."""
    with local(tmp_path / "data") as (process, url):
        for port in (0, int(url.rpartition(":")[2])):
            said = refused(tmp_path / "data", port)
            assert said.startswith(f"proctor: The data in {tmp_path / 'data'} is in use by the Proctor at {url}")
            assert f"(process {process.pid})" in said


@pytest.mark.parametrize("way", ["it is a file", "below a file", "a part is a file", "too long a name", "a loop"])
def test_data_that_cannot_be_kept_is_said_in_one_line(tmp_path: Path, way: str) -> None:
    data = tmp_path / "data"
    match way:
        case "it is a file":
            data.touch()
        case "below a file":
            data.touch()
            data /= "below"
        case "a part is a file":
            data.mkdir()
            (data / "postgres").touch()
        case "too long a name":
            data /= "x" * 300
        case "a loop":
            data.symlink_to(data)
    said = refused(data)
    assert f"Nothing can be kept in {data}" in said
    assert "--data" in said


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_data_that_this_user_may_not_write_is_said_in_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(tmp_path / "data")
    finally:
        tmp_path.chmod(0o700)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = f"from pathlib import Path; from app.local.stack import run_local; run_local({port}, Path({str(tmp_path)!r}))"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert f"Port {port}" in ended.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as an ordinary user already")
def test_it_works_for_an_ordinary_user(tmp_path: Path) -> None:
    """As root the tests take the other way; a user namespace in which we are user 1000 takes this one."""
    unshare = shutil.which("unshare")
    assert unshare, "the program unshare (util-linux) is missing"
    prefix = (unshare, "--user", "--map-user=1000", "--map-group=1000")
    with local(tmp_path / "data", prefix=prefix) as (process, url):
        assert httpx.get(f"{url}/health/ready", timeout=PATIENCE).status_code == 200
        below = descendants(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert gone(below)

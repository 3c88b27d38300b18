"""Files in the store: whole or not there, and a store that fails for a while."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gcsfs.retry import HttpError
from google.auth.exceptions import TransportError

from app.artifacts import Artifacts


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(f"file://{tmp_path}/store")


async def test_what_is_written_is_listed_read_and_deleted(artifacts: Artifacts, tmp_path: Path) -> None:
    file = tmp_path / "log.eval"
    file.write_bytes(b"log")
    await artifacts.ship(file, artifacts.url("e", "e.1", 1, "log.eval"))
    await artifacts.write(artifacts.url("e", "e.1", 2, "outcome.json"), b"{}")
    assert sorted(await artifacts.names(artifacts.url("e", "e.1"))) == ["1/log.eval", "2/outcome.json"]
    assert await artifacts.read(artifacts.url("e", "e.1", 1, "log.eval")) == b"log"
    await artifacts.fetch(artifacts.url("e", "e.1", 1, "log.eval"), tmp_path / "deep" / "again.eval")
    assert (tmp_path / "deep" / "again.eval").read_bytes() == b"log"
    await artifacts.delete([artifacts.url("e", "e.1", 1, "log.eval"), artifacts.url("e", "e.1", 3, "none")])
    assert await artifacts.names(artifacts.url("e", "e.1")) == ["2/outcome.json"]
    assert not (tmp_path / "store" / "e" / "e.1" / "1").exists(), "empty folders go too"


async def test_nothing_is_listed_where_nothing_is(artifacts: Artifacts) -> None:
    assert await artifacts.names(artifacts.url("nobody")) == []
    with pytest.raises(FileNotFoundError):
        await artifacts.read(artifacts.url("nobody", "file"))


async def test_the_root_outlives_its_last_file(artifacts: Artifacts, tmp_path: Path) -> None:
    await artifacts.write(artifacts.url("e", "e.1", 1, "a"), b"")
    await artifacts.delete([artifacts.url("e", "e.1", 1, "a")])
    assert [path.name for path in (tmp_path / "store").iterdir()] == []


async def test_a_file_that_was_cut_short_is_not_one(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crash in the middle of a copy leaves it."""

    def half(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:2])
        raise KeyboardInterrupt

    file = tmp_path / "log.eval"
    file.write_bytes(b"whole")
    url = artifacts.url("e", "e.1", 1, "log.eval")
    await artifacts.ship(file, url)
    file.write_bytes(b"newer")
    monkeypatch.setattr(artifacts._filesystem, "put_file", half)
    with pytest.raises(KeyboardInterrupt):
        artifacts._put(file, url)
    assert await artifacts.read(url) == b"whole"
    assert await artifacts.names(artifacts.url("e")) == ["e.1/1/log.eval"]


async def test_a_store_that_fails_for_a_while_is_tried_again(artifacts: Artifacts, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("a file in the folder's place: nothing can be written below it")
    writing = asyncio.create_task(artifacts.write(artifacts.url("e", "f"), b"kept"))
    await asyncio.sleep(0.3)
    assert not writing.done()
    store.unlink()
    await writing
    assert await artifacts.read(artifacts.url("e", "f")) == b"kept"


@pytest.mark.parametrize(
    "refusal",
    [
        HttpError({"code": 503, "message": "Backend Error"}),
        aiohttp.ClientPayloadError("Response payload is not completed"),
        TransportError("the metadata server does not answer"),  # type: ignore[no-untyped-call]
    ],
    ids=["gcsfs", "aiohttp", "google.auth"],
)
async def test_what_a_bucket_says_is_tried_again_though_it_is_no_oserror(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    refusals, url = [refusal], artifacts.url("e", "e.1", 1, "a")
    pipe = artifacts._filesystem.pipe_file

    def reluctant(*args: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return pipe(*args)

    monkeypatch.setattr(artifacts._filesystem, "pipe_file", reluctant)
    await artifacts.write(url, b"a")
    assert await artifacts.read(url) == b"a"


async def test_a_mistake_of_ours_is_not_tried_again(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts._filesystem, "pipe_file", lambda *_: [][0])
    with pytest.raises(IndexError):
        await artifacts.write(artifacts.url("e", "e.1", 1, "a"), b"a")


@pytest.mark.parametrize(("wanted", "module"), [(None, "gcsfs.core"), ("true", "gcsfs.extended_gcsfs")])
def test_a_buckets_kind_is_asked_for_only_where_that_is_wanted(wanted: str | None, module: str) -> None:
    """gcsfs asks by gRPC before each operation and forgets that it got no answer: minutes where gRPC is not let out."""
    name = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: wanted} if wanted else {})
    code = "import app, gcsfs; print(gcsfs.GCSFileSystem.__module__)"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == module

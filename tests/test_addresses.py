"""Addresses of files whose names mean something to a URL, a glob, a shell or fsspec."""

import asyncio
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import gcsfs
import pytest

from app.addresses import NAME_BYTES, address, file_name, filesystem, folder_for_inspect, local_path, readable
from app.artifacts import Artifacts
from app.local.demo import viewing

ODD = [
    "c#proj",
    "why?",
    "%41",
    "50%25 off",
    "with space",
    "a+b&c=d;e|f",
    "~",
    "~root",
    "[ab]*{c,d}",
    "Grüße ✓",
    "dot.",
    "a::b",
    "file:",
    "memory:x@y",
    "two\nlines",
    "'single' \"double\" $HOME `ls` \\",
    "-n",
]
READ = """
import sys
from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSpec, read_eval_log, write_eval_log
spec = EvalSpec(created="2026-01-01T00:00:00+00:00", task="t", dataset=EvalDataset(), model="m", config=EvalConfig())
for path in sys.argv[1:]:
    write_eval_log(EvalLog(eval=spec, status="success"), path)
    assert read_eval_log(path, header_only=True).status == read_eval_log(path).status == "success", path
"""


async def test_what_is_written_below_an_odd_folder_is_listed_read_and_deleted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"log")
    for odd in ODD:
        artifacts = Artifacts(f"file://{tmp_path}/{odd}/store")
        url = artifacts.url("e", odd, 1, f"{odd}.eval")
        await artifacts.ship(source, url)
        await artifacts.write(artifacts.url("e", odd, 2), b"two")
        assert Path(tmp_path, odd, "store", "e", odd, "1", f"{odd}.eval").read_bytes() == b"log"
        assert sorted(await artifacts.names(artifacts.url("e"))) == sorted([f"{odd}/1/{odd}.eval", f"{odd}/2"])
        await artifacts.fetch(url, tmp_path / "fetched")
        assert await artifacts.read(url) == (tmp_path / "fetched").read_bytes() == b"log"
        await artifacts.delete([url, artifacts.url("e", odd, 2)])
        assert not any(Path(tmp_path, odd, "store").iterdir())


@pytest.mark.parametrize("root", ["memory://bucket/c#proj", "memory://bucket/why?", "memory://bucket/%41 [a]*"])
async def test_the_same_holds_for_a_store_that_is_no_disk(root: str) -> None:
    artifacts = Artifacts(root)
    await artifacts.write(artifacts.url("e", "C# 100%?.eval"), b"log")
    assert artifacts.url("e", "C# 100%?.eval") == f"{root}/e/C# 100%?.eval"
    assert await artifacts.names(artifacts.url("e")) == ["C# 100%?.eval"]
    assert await artifacts.read(artifacts.url("e", "C# 100%?.eval")) == b"log"
    await artifacts.delete([artifacts.url("e", "C# 100%?.eval")])
    assert await artifacts.names(artifacts.url("e")) == []


def test_a_bucket_is_asked_for_the_object_of_that_very_name() -> None:
    bucket = gcsfs.GCSFileSystem
    for odd in ["c#proj", "why?generation=1", "%41", "a b", "[x]*"]:
        there = address(f"gs://bucket/{odd}", "e", 1, "a.eval")
        assert bucket._split_path(there)[:2] == ("bucket", f"{odd}/e/1/a.eval")
        assert (local_path(there), readable(there)) == (None, there)


def test_an_address_is_a_url_only_where_it_means_that_file(tmp_path: Path) -> None:
    for odd in ODD:
        path = f"{tmp_path}/{odd}/a.eval"
        for made in (address(f"file://{tmp_path}/{odd}", "a.eval"), address(f"{tmp_path}/{odd}/", "a.eval")):
            assert local_path(made) == Path(path)
            assert readable(made) == path
            assert not made.startswith("file:") or urlparse(made).path == path
            store = filesystem(made)
            store.pipe_file(made, b"x")
            assert Path(path).read_bytes() == b"x"
            assert store.sizes([made]) == [1]


async def test_inspect_reads_and_writes_what_is_readable(tmp_path: Path) -> None:
    logs = [readable(address(f"file://{tmp_path}/{odd}", f"{odd}.eval")) for odd in ODD]
    for odd in ODD:
        (tmp_path / odd).mkdir()
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", READ, *logs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(log).is_file() for log in logs)


def test_a_folder_has_a_name_for_inspect_that_is_no_url(tmp_path: Path) -> None:
    for odd in ODD:
        made = folder_for_inspect(tmp_path / odd)
        assert not set(made) & set("#?%\n")
        Path(made).mkdir(exist_ok=True)
        Path(made, "a").write_text(odd)
        assert (tmp_path / odd / "a").read_text() == odd
        assert subprocess.run(["cat", f"{made}/a"], capture_output=True, check=True).stdout == odd.encode()


def test_a_tasks_name_is_part_of_a_files_name_whatever_is_in_it() -> None:
    for odd in [*ODD, "", "/", "..", "x" * 5_000, "ü" * 5_000, "\ud800", "a\0b", "many_faced"]:
        name = file_name(odd)
        assert 0 < len(name.encode()) <= NAME_BYTES
        assert not set(name) & set("#?%/\\_*[]{}'\"$\n\0 ")
    assert file_name("C# riddles") == "C--riddles"


async def test_the_line_that_opens_the_viewer_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    for odd in ODD:
        folder = tmp_path / "logs" / odd
        line = viewing(folder)
        own = Path(sys.executable).with_name("inspect")
        assert shlex.split(line)[1:] == ["view", "--log-dir", str(folder)]
        program = shlex.split(line)[0]
        assert Path(shutil.which(program) or program) == own
        echo = await asyncio.create_subprocess_exec(
            "bash", "-c", f'set -- {line}; printf %s "$4"', stdout=asyncio.subprocess.PIPE
        )
        assert (await echo.communicate())[0].decode() == str(folder)

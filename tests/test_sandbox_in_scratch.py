"""The sandbox starts wherever the scratch folder lies, though that is closed to everyone but the service's user."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import app
from app.runner.reachable import is_root

REPOSITORY = Path(app.__file__).resolve().parents[1]
NOBODY = 65534

PROBE = """
import asyncio, concurrent.futures.thread, os, sys, tempfile
import anyio
from app.containment import Contained
from app.runner import bubblewrap, launchers, visible
from app.runner.messages import Containment
from app.settings import load
user, temporary, *given = sys.argv[1:]
anyio.run(launchers.probe, Containment())  # loads what an ordinary user may not read here
visible.system_mounts.cache_clear(); visible.python_folders.cache_clear()
binary, packages = bubblewrap.binary(), visible.pytest_packages()
bubblewrap.binary, visible.pytest_packages = lambda: binary, lambda: packages  # such a user has them where it may go
if int(user) != os.getuid():
    os.setgroups([]); os.setresgid(*3 * [int(user)]); os.setresuid(*3 * [int(user)])
tempfile.tempdir = temporary
settings = load(database_url="postgresql://nobody@127.0.0.1:9/none", **{"scratch": folder for folder in given})

async def main():
    async with Contained(settings) as contained:
        found = await contained.here()
        print(found.launcher, oct(settings.scratch.stat().st_mode & 0o777), settings.scratch, found.refusal, sep="|")

asyncio.run(main())
"""


@pytest.fixture(params=["root", "an ordinary user"])
def user(request: pytest.FixtureRequest) -> int:
    if request.param == "an ordinary user":
        return NOBODY if is_root() else os.getuid()
    if not is_root():
        pytest.skip("not root: that is shown for this user below")
    return 0


@pytest.fixture
def temporary(user: int) -> Iterator[Path]:
    """A temporary folder that everybody may use, as /tmp."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.mark.parametrize("before", [None, 0o700, 0o755], ids=["new", "closed", "open"])
@pytest.mark.parametrize("default", [True, False], ids=["default", "another"])
def test_the_sandbox_starts_in_a_scratch_folder_that_is_closed(
    default: bool, before: int | None, user: int, temporary: Path
) -> None:
    scratch = temporary / (f"proctor-{user}" if default else "one of its own")
    if before is not None:
        scratch.mkdir()
        if is_root():
            os.chown(scratch, user, user)
        scratch.chmod(before)
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, str(user), str(temporary), *([] if default else [str(scratch)])],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PROCTOR_SANDBOX_LAUNCHERS": "bubblewrap"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    launcher, mode, where, refusal = ran.stdout.splitlines()[-1].split("|")
    assert (launcher, mode, where) == ("bubblewrap", "0o700", str(scratch)), refusal

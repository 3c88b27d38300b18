"""Builds the image from the Dockerfile, without a registry, and runs it as a container runtime does.

The stand-in for the official base is Debian 13 with its own Python, and like that one without Python's bytecode. Pip and
apt find their packages as they do on this machine. The base is kept in the user's cache.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "localhost/proctor-test-base:trixie"
IMAGE = "localhost/proctor-test"
STORE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "proctor", "image")
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))

_CONTAINER = """
set -e
mount --rbind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount --rbind /dev dev
pivot_root . .
umount -l .
cd "$2"
shift 2
exec "$@"
"""
"""A new root, not a chroot: within a chroot nobody may create user namespaces, as the sandbox does. The last `exec` makes
the command the container's first process."""


@dataclass(frozen=True)
class Image:
    root: Path
    """Where its files are."""
    user: str
    environment: tuple[str, ...]
    directory: str
    command: tuple[str, ...]
    labels: dict[str, str]
    seconds: float
    """That the build took."""

    def arguments(self, *command: str, **variables: object) -> list[str]:
        """What runs a command (else: the image's) in a container, as the image's user and with its environment."""
        user, group = self.user.split(":")
        given = [f"{name}={value}" for name, value in variables.items()]
        return [
            *("unshare", "--mount", "--pid", "--fork"),
            *("sh", "-c", _CONTAINER, "container", str(self.root), self.directory),
            *("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"),
            *("env", "-i", *self.environment, *given, *(command or self.command)),
        ]

    def run(self, *command: str, **variables: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.arguments(*command, **variables), capture_output=True, text=True, check=False)

    def output(self, *command: str, **variables: object) -> str:
        done = self.run(*command, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def megabytes(self, folder: str = ".") -> int:
        return int(_run("du", "-sxm", str(self.root / folder)).split()[0])


def missing() -> str | None:
    """Why there can be no image here, in one line."""
    if os.geteuid() != 0:
        return "building the image takes root (it mounts, and debootstrap makes the base)"
    tools = [name for name in ("buildah", "debootstrap", "unshare", "pivot_root") if shutil.which(name) is None]
    if tools:
        return f"{', '.join(tools)} is missing: apt-get install buildah debootstrap util-linux"
    return None if _mirror() else "no Debian mirror is named in /etc/apt: the image's base is made from one"


@contextmanager
def built(folder: Path) -> Iterator[Image]:
    """`folder`: for what the build needs and does not keep."""
    if BASE not in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        _make_base(folder)
    began = time.monotonic()
    arguments = ("--build-arg", f"BASE={BASE}", "--build-arg", "REVISION=of-the-test")
    _buildah(
        *("build", "--isolation", "chroot", "--pull-never", "--tag", IMAGE, *arguments, *_pips_way(folder), str(ROOT))
    )
    seconds = time.monotonic() - began
    container = _buildah("from", "--pull-never", IMAGE).strip()
    try:
        config = json.loads(_buildah("inspect", "--type", "image", IMAGE))["OCIv1"]["config"]
        yield Image(
            root=Path(_buildah("mount", container).strip()),
            user=config["User"],
            environment=tuple(config["Env"]),
            directory=config["WorkingDir"],
            command=tuple(config["Cmd"]),
            labels=config["Labels"],
            seconds=seconds,
        )
    finally:
        _buildah("rm", container)
        _buildah("rmi", "--prune", "--force")
        _buildah("rmi", IMAGE)


def _make_base(folder: Path) -> None:
    root = folder / "base"
    _run(
        "debootstrap",
        "--variant=minbase",
        "--include=ca-certificates,python3,python3-pip",
        "trixie",
        str(root),
        _mirror(),
    )
    for folder_of in ("var/lib/apt/lists", "var/cache/apt/archives"):
        shutil.rmtree(root / folder_of)
        (root / folder_of / "partial").mkdir(parents=True)
    for bytecode in list(root.rglob("*.pyc")):
        bytecode.unlink()
    container = _buildah("from", "scratch").strip()
    _run("cp", "-a", f"{root}/.", _buildah("mount", container).strip())
    _buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)


def _mirror() -> str:
    """This machine's."""
    text = "\n".join(source.read_text() for source in SOURCES if source.exists())
    found = re.findall(r"^(?:URIs: |deb (?:\[[^]]*\] )?)(https?:\S+)", text, re.MULTILINE)
    return next((mirror for mirror in found if "security" not in mirror), "")


def _pips_way(folder: Path) -> list[str]:
    """Pip's settings on this machine, wherever it has them from, and the files that they name."""
    listed = _run(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {
        key.rpartition(".")[2]: literal_eval(value) for key, _, value in (line.partition("=") for line in listed)
    }
    lines = [f"{key} = {value}".replace("\n", "\n  ") for key, value in settings.items() if key != "user"]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines]))
    named = [(key, word.removeprefix("file://")) for key, value in settings.items() for word in str(value).split()]
    # a folder that is an index has its files beside it
    paths = {
        Path(word).parent if key.endswith("index-url") else Path(word) for key, word in named if word.startswith("/")
    }
    files = sorted(str(path) for path in paths if path.exists())
    mounts = [f"{folder}/pip.conf:/etc/pip.conf:ro", *(f"{f}:{f}:ro" for f in files)]
    return [part for mount in mounts for part in ("--volume", mount)]


def _buildah(command: str, *arguments: str) -> str:
    store = ("--storage-driver", "vfs", "--root", f"{STORE}/storage", "--runroot", f"{STORE}/run")
    return _run("buildah", *store, command, *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command[:8])} …: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout

"""The seam to Google Cloud: the `gcloud` command, one call a time."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, TypeAlias

from app.errors import ProctorError

Argv: TypeAlias = Sequence[str]
"""What comes after `gcloud`."""


class GcloudFailed(ProctorError):
    """The message is the command and the last line that it said."""

    title = "gcloud failed"


class GcloudMissing(ProctorError):
    title = "gcloud missing"


def run(argv: Argv) -> str:
    """What the command printed to stdout; its stderr goes on to ours only when it fails."""
    ended = _end(argv)
    if ended.returncode != 0:
        said = ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}"
        raise GcloudFailed(f"gcloud {' '.join(argv)}: {said}")
    return ended.stdout


def ask(argv: Argv) -> Any:
    """The command's answer with `--format=json`."""
    return json.loads(run([*argv, "--format=json"]) or "null")


def finds(argv: Argv) -> bool:
    """Whether the command finds anything: a `describe` or `list` that prints something."""
    ended = _end(argv)
    return ended.returncode == 0 and bool(ended.stdout.strip())


def _end(argv: Argv) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("gcloud")
    if program is None:
        raise GcloudMissing("There is no gcloud here: install the Google Cloud CLI, and run `gcloud auth login`.")
    return subprocess.run([program, *argv, "--quiet"], capture_output=True, text=True, check=False)

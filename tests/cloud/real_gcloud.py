"""The installed gcloud's own command line parser: it knows each command, flag, choice and form of value, and asks nobody."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_PARSE = """
import contextlib, io, json, sys
sys.path[:0] = [sys.argv[1] + "/lib", sys.argv[1] + "/lib/third_party"]
from googlecloudsdk import gcloud_main
cli = gcloud_main.CreateCLI([])
refused = []
for argv in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cli._CLI__parser.parse_args(argv)
        except SystemExit:
            refused.append([" ".join(argv), said.getvalue()[:300]])
print(json.dumps(refused))
"""


def refused(argvs: Sequence[Sequence[str]], home: Path) -> dict[str, str]:
    """Commands (without `gcloud`) that gcloud would not take, and why. Skips the test where there is no gcloud."""
    program = next((p for p in map(Path, _programs()) if (p.resolve().parents[1] / "lib").is_dir()), None)
    if program is None:
        pytest.skip("there is no gcloud on this machine, so its flags are not checked against it")
    sdk = program.resolve().parents[1]
    bundled = sdk / "platform/bundledpythonunix/bin/python3"
    ended = subprocess.run(
        [str(bundled) if bundled.exists() else "python3", "-c", _PARSE, str(sdk)],
        input=json.dumps(argvs),
        env={"PATH": os.environ["PATH"], "HOME": str(home), "CLOUDSDK_CONFIG": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(ended.stdout))


def _programs() -> list[str]:
    """Every gcloud on the PATH: the first may be a test's own."""
    folders = os.environ["PATH"].split(os.pathsep)
    return [found for folder in folders if (found := shutil.which("gcloud", path=folder))]

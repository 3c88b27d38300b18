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


_READ = """
import json, sys
sys.path[:0] = [sys.argv[1] + "/lib", sys.argv[1] + "/lib/third_party"]
from googlecloudsdk.api_lib.run import global_methods
from googlecloudsdk.api_lib.util import apis, messages
api = apis.GetMessagesModule(global_methods.SERVERLESS_API_NAME, global_methods.SERVERLESS_API_VERSION)
unread = []
for service in json.load(sys.stdin):
    try:
        messages.DictToMessageWithErrorCheck(service, api.Service)
        unread.append([])
    except messages.DecodeError as error:
        unread.append([line.strip() for line in str(error).splitlines()[1:]])
print(json.dumps(unread))
"""


def unread(services: Sequence[object], home: Path) -> list[list[str]]:
    """Of each Service the paths that `gcloud run services replace` does not know. Skips the test where there is no gcloud."""
    found: list[list[str]] = json.loads(_run(_READ, services, home))
    return found


def refused(argvs: Sequence[Sequence[str]], home: Path) -> dict[str, str]:
    """Commands (without `gcloud`) that gcloud would not take, and why. Skips the test where there is no gcloud."""
    return dict(json.loads(_run(_PARSE, argvs, home)))


def _run(script: str, given: object, home: Path) -> str:
    program = next((p for p in map(Path, _programs()) if (p.resolve().parents[1] / "lib").is_dir()), None)
    if program is None:
        pytest.skip("there is no gcloud on this machine, so this is not held against it")
    sdk = program.resolve().parents[1]
    bundled = sdk / "platform/bundledpythonunix/bin/python3"
    ended = subprocess.run(
        [str(bundled) if bundled.exists() else "python3", "-c", script, str(sdk)],
        input=json.dumps(given),
        env={"PATH": os.environ["PATH"], "HOME": str(home), "CLOUDSDK_CONFIG": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout


def _programs() -> list[str]:
    """Every gcloud on the PATH: the first may be a test's own."""
    folders = os.environ["PATH"].split(os.pathsep)
    return [found for folder in folders if (found := shutil.which("gcloud", path=folder))]

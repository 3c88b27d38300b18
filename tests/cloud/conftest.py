"""A deployment's values, and a `gcloud` that writes down what it is told."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.cloud import service
from app.cloud.place import Place
from app.cloud.service import Service

ROOT = Path(__file__).parents[2]
IMAGE = "us-docker.pkg.dev/my-project/proctor/proctor@sha256:0123"

_RECORDER = """#!{python} -IS
import json, os, sys
folder, argv = {folder!r}, sys.argv[1:]
files = {{a: open(a).read() for a in argv if a.endswith("service.yaml") and os.path.exists(a)}}
with open(folder + "/log", "a") as log:
    log.write(json.dumps([argv, files]) + "\\n")
for rule in json.load(open(folder + "/rules")):
    begins, needs, makes = rule["begins"], rule.get("needs"), rule.get("makes")
    if argv[: len(begins)] != begins or (needs and not os.path.exists(folder + "/" + needs)):
        continue
    if makes:
        open(folder + "/" + makes, "w").close()
    sys.stdout.write(rule.get("out", ""))
    sys.stderr.write(rule.get("err", ""))
    sys.exit(rule.get("code", 0))
"""


@dataclass(frozen=True)
class Call:
    """`files`: what stood in each service.yaml that the command was given."""

    argv: list[str]
    files: dict[str, str]


@dataclass
class Gcloud:
    """Answers by the first rule that fits: `begins` is how the command begins; `out`, `err`, `code` are the answer;
    `makes` and `needs` name a thing that the command makes, or that must have been made. Without a rule: nothing, 0."""

    folder: Path
    rules: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, begins: Sequence[str], out: Any = "", **more: Any) -> None:
        text = out if isinstance(out, str) else json.dumps(out)
        self.rules.append({"begins": list(begins), "out": text, **more})
        (self.folder / "rules").write_text(json.dumps(self.rules))

    @property
    def calls(self) -> list[Call]:
        """Without the `--quiet` that each has."""
        lines = (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []
        calls = [Call(*json.loads(line)) for line in lines]
        assert all(call.argv[-1] == "--quiet" for call in calls)
        return [Call(call.argv[:-1], call.files) for call in calls]

    @property
    def said(self) -> list[str]:
        return [" ".join(call.argv) for call in self.calls]

    def forget(self) -> None:
        (self.folder / "log").unlink()


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gcloud:
    folder = tmp_path / "gcloud"
    folder.mkdir()
    (folder / "rules").write_text("[]")
    program = folder / "gcloud"
    program.write_text(_RECORDER.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Gcloud(folder)


@pytest.fixture
def place() -> Place:
    return Place(
        project="my-project",
        project_number="123456789012",
        region="us-central1",
        alloydb_cluster="main",
        alloydb_instance="primary",
        bucket="my-project-proctor",
        callers="ann@example.com,@example.org",
    )


@pytest.fixture
def described(place: Place) -> Service:
    """The service.yaml that is shipped, with every placeholder filled in."""
    return service.load(ROOT / "service.yaml", place, IMAGE)

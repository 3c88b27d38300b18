"""A deployment's values, and a `gcloud` that writes down what it is told."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

from app.cloud import service
from app.cloud.place import Place
from app.cloud.service import Service

ROOT = Path(__file__).parents[2]
IMAGE = "us-docker.pkg.dev/my-project/proctor/proctor@sha256:0123"

WORD, FILE, CALL = "\x1f", "\x1d", "\x1e"
"""What ends a word, begins a file, ends a call in the log."""

_RECORDER = """#!/bin/sh
cd {folder}
IFS='{word}'
said="$*{word}"
{{
  printf '%s' "$said"
  for word; do
    case "$word" in *service.yaml) printf '{file}%s{word}' "$word"; cat "$word" ;; esac
  done
  printf '{call}'
}} >> log
{rules}
"""
"""Shell, for it starts in a millisecond. A word of the log may be anything that a command line may hold."""

_RULE = """case "$said" in {begins}*) if {needs}; then
  {makes}; printf '%s' {out}; printf '%s' {err} >&2; exit {code}
fi ;; esac
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
    rules: list[str] = field(default_factory=list)

    def answer(
        self,
        begins: Sequence[str],
        out: Any = "",
        *,
        err: str = "",
        code: int = 0,
        makes: str | None = None,
        needs: str | None = None,
    ) -> None:
        rule = _RULE.format(
            begins=quote(WORD.join([*begins, ""])),
            needs=f"[ -e {needs} ]" if needs else "true",
            makes=f": > {makes}" if makes else ":",
            out=quote(out if isinstance(out, str) else json.dumps(out)),
            err=quote(err),
            code=code,
        )
        self.rules.append(rule)
        self.write()

    def write(self) -> None:
        program = self.folder / "gcloud"
        rules = "".join(self.rules)
        program.write_text(
            _RECORDER.format(folder=quote(str(self.folder)), word=WORD, file=FILE, call=CALL, rules=rules)
        )
        program.chmod(0o755)

    @property
    def calls(self) -> list[Call]:
        """Without the `--quiet` that each has."""
        log = self.folder / "log"
        calls = [_call(text) for text in log.read_text().split(CALL)[:-1]] if log.exists() else []
        assert all(call.argv[-1] == "--quiet" for call in calls)
        return [Call(call.argv[:-1], call.files) for call in calls]

    @property
    def said(self) -> list[str]:
        return [" ".join(call.argv) for call in self.calls]


def _call(text: str) -> Call:
    words, *files = text.split(FILE)
    return Call(words.split(WORD)[:-1], dict(file.split(WORD, 1) for file in files))


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gcloud:
    folder = tmp_path / "gcloud"
    folder.mkdir()
    recorder = Gcloud(folder)
    recorder.write()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return recorder


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

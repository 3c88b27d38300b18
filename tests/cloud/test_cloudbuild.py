"""cloudbuild.yaml against its schema, and against what the release needs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app
from app.cloud.place import Place
from tests.cloud import discovery
from tests.cloud.conftest import ROOT

FILE = ROOT / "cloudbuild.yaml"
BUILD: dict[str, Any] = yaml.safe_load(FILE.read_text())
STEPS = {step["id"]: step for step in BUILD["steps"]}


def test_the_known_schema_takes_the_file_and_no_mistake(tmp_path: Path) -> None:
    mistaken = tmp_path / "cloudbuild.yaml"
    mistaken.write_text(FILE.read_text().replace("args: [push,", "arg: [push,"))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.cloudbuild"]
    ended = subprocess.run([*check, str(FILE)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    ended = subprocess.run([*check, str(mistaken)], capture_output=True, text=True, check=False)
    assert (ended.returncode, "'arg' was unexpected" in ended.stdout) == (1, True)


def test_cloud_build_takes_the_file_and_no_mistake() -> None:
    """That schema lets unknown keys pass at the top; the API's own description does not."""
    schema = discovery.strict("cloudbuild.v1")
    assert discovery.problems(schema, "Build", BUILD) == []
    mistakes: list[dict[str, Any]] = [
        {"stepps": []},
        {"timeout": 5400},
        {"options": {"logging": "NOWHERE"}},
        {"steps": [{"id": "a"}]},
    ]
    for mistake in mistakes:
        assert len(discovery.problems(schema, "Build", {**BUILD, **mistake})) == 1


def test_nothing_is_released_that_was_not_tested() -> None:
    def before(id: str) -> set[str]:
        direct = {name for name in STEPS[id].get("waitFor", []) if name != "-"}
        return direct.union(*(before(name) for name in direct))

    assert before("release") == {"test", "build", "push", "migrate"}
    assert before("migrate") == {"test", "build", "push"}


@pytest.mark.parametrize("id", ["migrate", "release"])
def test_the_commands_of_the_steps_exist(id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run without deploy.env: it comes as far as that."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, STEPS[id]["args"])
    assert "There is no deploy.env here" in str(result.exception)


def test_it_builds_where_and_as_whom_setup_has_prepared(place: Place) -> None:
    given = {"${PROJECT_ID}": place.project, "${_REGION}": place.region}

    def filled(text: str) -> str:
        for name, value in given.items():
            text = text.replace(name, value)
        return text

    assert filled(BUILD["substitutions"]["_IMAGE"]) == place.image
    assert filled(BUILD["serviceAccount"]).rpartition("/")[2] == place.builder

"""The commands as people type them, with a gcloud that is written down."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cloud import flags, service
from app.cloud.place import Place, PlaceError, load, save
from app.cloud.plan import PLACEHOLDER
from tests.cloud.conftest import ROOT, Gcloud

SETUP = (
    *("setup", "--project", "my-project", "--region", "us-central1", "--cluster", "main", "--instance", "primary"),
    *("--callers", "ann@example.com,@example.org"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone's root, as far as these commands see it."""
    shutil.copy(ROOT / "service.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_setup_prints_and_does_nothing(gcloud: Gcloud, here: Path) -> None:
    result = CliRunner().invoke(app, SETUP)
    assert result.exit_code == 0, result.exception
    assert gcloud.said == [], "it needs no login"
    assert not (here / "deploy.env").exists()
    assert result.stdout.startswith(
        "PROJECT_NUMBER=$(gcloud projects describe my-project '--format=value(projectNumber)')\n"
    )
    assert "--uri=https://proctor-${PROJECT_NUMBER}.us-central1.run.app/tasks/sweep" in result.stdout
    assert "0000000000" not in result.stdout
    assert not re.search(r"'[^'\n]*\{PROJECT_NUMBER\}[^'\n]*'", result.stdout), "quoted, the shell would not put it in"
    assert "--member=domain:example.org" in result.stdout
    assert "--member=user:ann@example.com" in result.stdout


def test_setup_applies_and_keeps_what_it_was_told(gcloud: Gcloud, here: Path, place: Place) -> None:
    result = CliRunner().invoke(app, [*SETUP, "--project-number", "123456789012", "--apply", "--queue", "openai"])
    assert result.exit_code == 0, result.exception
    assert load(here / "deploy.env") == replace(place, queues="proctor,openai")
    assert any(said.startswith("tasks queues create openai ") for said in gcloud.said)
    assert "gcloud builds submit --region=us-central1 --project=my-project" in result.stderr
    assert "gcloud secrets versions add proctor-openai-api-key --data-file=-" in result.stdout, "left to do"


def test_setup_refuses_numbers_that_do_not_fit(gcloud: Gcloud, here: Path) -> None:
    file = here / "service.yaml"
    file.write_text(file.read_text().replace("memory: 16Gi", "memory: 8Gi"))
    result = CliRunner().invoke(app, [*SETUP, "--project-number", "123456789012", "--apply"])
    assert "an instance has 8192 MiB" in str(result.exception)
    assert gcloud.calls == []


def test_setup_names_a_value_that_is_not_one() -> None:
    result = CliRunner().invoke(app, [*SETUP, "--project-number", "x"])
    assert isinstance(result.exception, PlaceError)
    assert str(result.exception) == "PROJECT_NUMBER: 'x' is not one"


def test_deploy_prints_the_command_that_it_would_run(here: Path, place: Place) -> None:
    save(place, here / "deploy.env")
    result = CliRunner().invoke(app, ["deploy", "--print", PLACEHOLDER])
    described = service.load(here / "service.yaml", place, PLACEHOLDER)
    assert shlex.split(result.stdout)[1:] == flags.deploy(described, place.region, place.project)

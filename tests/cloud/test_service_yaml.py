"""service.yaml against Cloud Run's own description, and against the settings."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app import settings
from app.cloud import budget, service
from app.cloud.place import Place
from app.cloud.service import Service, TemplateError
from app.settings import PREFIX, Settings
from tests.cloud.conftest import IMAGE, ROOT
from tests.cloud.real_gcloud import unread
from tests.cloud.run_schema import annotations, problems

TEXT = (ROOT / "service.yaml").read_text()

KNOWN = {PREFIX + name.upper() for name in Settings.model_fields}


def test_cloud_run_takes_the_file(described: Service) -> None:
    assert problems(described.document) == []


def test_gcloud_reads_the_file(described: Service, tmp_path: Path) -> None:
    """All but the sandbox launcher, which a gcloud from before July 2026 does not know."""
    mistaken = copy.deepcopy(described.document)
    _template(mistaken)["spec"]["containerConcurency"] = 15
    unknown, caught = unread([described.document, mistaken], tmp_path)
    assert [path for path in unknown if not path.endswith(".sandboxLauncher")] == []
    assert any(path.endswith("containerConcurency") for path in caught)


def _template(document: dict[str, Any]) -> Any:
    return document["spec"]["template"]


def _container(document: dict[str, Any]) -> Any:
    return _template(document)["spec"]["containers"][0]


MISTAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown key": lambda d: _template(d)["spec"].update(containerConcurency=15),
    "a key at the wrong place": lambda d: d["spec"].update(timeoutSeconds=1860),
    "an unknown key of a probe": lambda d: _container(d)["livenessProbe"].update(periodSecond=1),
    "a key that Cloud Run does not support": lambda d: _container(d)["startupProbe"].update(exec={"command": ["true"]}),
    "text for a number": lambda d: _template(d)["spec"].update(containerConcurrency="15"),
    "a number for text": lambda d: _container(d)["env"].append({"name": "PROCTOR_X", "value": 15}),
    "a switch that is not text": lambda d: _template(d)["metadata"]["annotations"].update(
        {"run.googleapis.com/cpu-throttling": False}
    ),
    "a switch that is neither true nor false": lambda d: _template(d)["metadata"]["annotations"].update(
        {"run.googleapis.com/cpu-throttling": "no"}
    ),
    "a time above the maximum": lambda d: _template(d)["spec"].update(timeoutSeconds=3601),
    "a start-up period above the maximum": lambda d: _container(d)["startupProbe"].update(periodSeconds=241),
    "a port that is none": lambda d: _container(d)["ports"][0].update(containerPort=0),
    "an unknown annotation": lambda d: d["metadata"]["annotations"].update({"run.googleapis.com/ingres": "all"}),
    "a revision's annotation on the service": lambda d: d["metadata"]["annotations"].update(
        {"run.googleapis.com/cpu-throttling": "false"}
    ),
    "an unknown limit": lambda d: _container(d)["resources"]["limits"].update(disk="1Gi"),
    "a secret without its version": lambda d: _container(d)["env"][-1]["valueFrom"]["secretKeyRef"].pop("key"),
    "no image": lambda d: _container(d).pop("image"),
    "another kind": lambda d: d.update(kind="Job"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schema_catches(mistake: str, described: Service) -> None:
    document = copy.deepcopy(described.document)
    MISTAKES[mistake](document)
    assert len({problem.partition(": ")[0] for problem in problems(document)}) == 1


def test_the_annotations_that_cloud_run_takes_are_found_in_its_prose() -> None:
    assert len(annotations("Service")) > 15
    assert len(annotations("Revision")) > 15
    assert "autoscaling.knative.dev/maxScale" not in annotations("Service")


def test_every_setting_is_set_or_named_with_the_reason_why_its_default_serves(described: Service) -> None:
    told = set(described.environment) | set(described.secrets)
    left = dict(re.findall(rf"^# ({PREFIX}[A-Z_]+) +(.*)$", TEXT, re.MULTILINE))
    assert KNOWN - told - left.keys() == set()
    assert told & left.keys() == set(), "set, and said to be left alone"
    assert all(re.match(r"\S.*: \S", reason) for reason in left.values()), "each: what it is, and why"


def test_it_names_no_setting_that_does_not_exist(described: Service) -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", TEXT))
    assert named - KNOWN == set()


def test_the_service_starts_with_these_settings(described: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in described.environment.items():
        if name in KNOWN:
            monkeypatch.setenv(name, value)
    loaded = settings.load()
    assert loaded.alloydb_user == "proctor-worker@my-project.iam"
    assert loaded.service_url == "https://proctor-123456789012.us-central1.run.app"
    assert loaded.connections == 15 == described.concurrency
    assert loaded.max_instances == described.max_instances


def test_what_must_be_as_it_is(described: Service) -> None:
    notes = described.template["metadata"]["annotations"]
    assert notes["run.googleapis.com/cpu-throttling"] == "false"
    assert notes["run.googleapis.com/execution-environment"] == "gen2"
    assert notes["run.googleapis.com/startup-cpu-boost"] == "true"
    assert json.loads(notes["run.googleapis.com/network-interfaces"]) == [
        {"network": "default", "subnetwork": "default"}
    ]
    assert described.container["sandboxLauncher"] is True
    assert all(
        described.container[probe]["httpGet"]["path"] == "/health/live" for probe in ("startupProbe", "livenessProbe")
    )
    assert "readinessProbe" not in described.container, "an idle worker makes no statements"
    secret = re.compile(r"KEY|PASSWORD|TOKEN|SECRET|DATABASE_URL")
    assert [name for name in described.environment if secret.search(name)] == [], "secrets are by reference"


def test_the_numbers_fit_one_another(described: Service) -> None:
    dispatches = budget.concurrent_dispatches(described)
    assert list(budget.problems(described, dispatches)) == []
    assert dispatches <= described.max_instances * 15


def _set(name: str, value: str) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> None:
        (variable,) = (v for v in _container(document)["env"] if v["name"] == PREFIX + name)
        variable["value"] = value

    return change


UNFIT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "containerConcurrency": lambda d: _template(d)["spec"].update(containerConcurrency=14),
    "pool_size": _set("POOL_SIZE", "6"),
    "timeoutSeconds": lambda d: _template(d)["spec"].update(timeoutSeconds=1800),
    "PROCTOR_MAX_INSTANCES": _set("MAX_INSTANCES", "19"),
    "connections": lambda d: (
        _template(d)["metadata"]["annotations"].update({service.MAX_SCALE: "34"}),
        _set("MAX_INSTANCES", "34")(d),
    ),
    "SANDBOX_WORKSPACE": _set("SANDBOX_WORKSPACE", str(2**30)),
    "memory": lambda d: _container(d)["resources"]["limits"].update(memory="8Gi"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_number_that_does_not_fit_is_named(what: str, described: Service) -> None:
    document = copy.deepcopy(described.document)
    UNFIT[what](document)
    changed = Service(document)
    told = list(budget.problems(changed, budget.concurrent_dispatches(changed)))
    assert len(told) == 1
    assert what in told[0]


def test_a_queue_that_dispatches_more_than_the_instances_take_is_named(described: Service) -> None:
    (told,) = budget.problems(described, 301)
    assert "301" in told


def test_a_placeholder_that_nobody_knows_is_refused(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(TEXT.replace("${BUCKET}", "${BUKCET}"))
    with pytest.raises(TemplateError, match=r"BUKCET"):
        service.load(file, place, IMAGE)


@pytest.mark.parametrize("broken", ["$BUCKET-x-${", "gs://$/artifacts"])
def test_a_broken_placeholder_is_refused(broken: str, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(TEXT.replace("gs://${BUCKET}/artifacts", broken))
    with pytest.raises(TemplateError, match="broken placeholder"):
        service.load(file, place, IMAGE)


def test_no_placeholder_is_left(described: Service) -> None:
    assert "${" not in json.dumps(described.document)


def test_a_value_cannot_become_anything_but_a_value() -> None:
    assert service.fill({"a": "${X}"}, {"X": "1\nb: 2"}) == {"a": "1\nb: 2"}

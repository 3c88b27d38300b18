"""`gcloud run deploy` and service.yaml say the same."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from app.cloud import flags
from app.cloud.flags import NO_FLAG, NotSayable
from app.cloud.place import Place
from app.cloud.service import Service
from tests.cloud.real_gcloud import refused

REVISION = "spec.template.metadata.annotations"
CONTAINER = "spec.template.spec.containers.0"

PATHS = {
    "image": f"{CONTAINER}.image",
    "ingress": "metadata.annotations.run.googleapis.com/ingress",
    "min": "metadata.annotations.run.googleapis.com/minScale",
    "max-instances": f"{REVISION}.autoscaling.knative.dev/maxScale",
    "cpu-throttling": f"{REVISION}.run.googleapis.com/cpu-throttling",
    "cpu-boost": f"{REVISION}.run.googleapis.com/startup-cpu-boost",
    "execution-environment": f"{REVISION}.run.googleapis.com/execution-environment",
    "vpc-egress": f"{REVISION}.run.googleapis.com/vpc-access-egress",
    "service-account": "spec.template.spec.serviceAccountName",
    "concurrency": "spec.template.spec.containerConcurrency",
    "timeout": "spec.template.spec.timeoutSeconds",
    "port": f"{CONTAINER}.ports.0.containerPort",
    "cpu": f"{CONTAINER}.resources.limits.cpu",
    "memory": f"{CONTAINER}.resources.limits.memory",
}
"""Where in service.yaml is said what each flag says. Source: gcloud's help, flag by flag."""


def leaves(node: Any, path: str = "") -> dict[str, str]:
    """Every value of the document, by its path; variables by their names."""
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = [(value["name"] if path.endswith(".env") else str(i), value) for i, value in enumerate(node)]
    else:
        return {path: str(node).lower() if isinstance(node, bool) else str(node)}
    found: dict[str, str] = {}
    for key, value in items:
        found |= leaves(value, f"{path}.{key}" if path else str(key))
    return found


def said_by(argv: list[str]) -> dict[str, str]:
    """The values that a `gcloud run deploy` sets, by their paths in service.yaml."""
    assert argv[:2] == ["run", "deploy"]
    found = {"metadata.name": argv[2]}
    for flag in argv[3:]:
        name, _, value = flag.removeprefix("--").partition("=")
        found |= _of_flag(name, value)
    return found


def _of_flag(name: str, value: str) -> dict[str, str]:
    if name in ("region", "project", "no-allow-unauthenticated", "network", "subnet"):
        return {}  # where; who, which is a policy's to say; the network is put together below
    if name.endswith("-probe"):
        probe = f"{CONTAINER}.{name.removesuffix('-probe')}Probe"
        return {f"{probe}.{key}": v for key, v in (part.split("=") for part in value.split(","))}
    if name == "set-env-vars":
        _, delimiter, said = value.split("^", 2)
        pairs = [pair.split("=", 1) for pair in said.split(delimiter)]
        return {f"{CONTAINER}.env.{key}.name": key for key, _ in pairs} | {
            f"{CONTAINER}.env.{key}.value": v for key, v in pairs
        }
    if name == "set-secrets":
        return {k: v for pair in value.split(",") for k, v in _secret(*pair.split("=", 1)).items()}
    if value == "":
        return {PATHS[name.removeprefix("no-")]: str(not name.startswith("no-")).lower()}
    return {PATHS[name]: value}


def _secret(variable: str, reference: str) -> dict[str, str]:
    name, key = reference.split(":")
    at = f"{CONTAINER}.env.{variable}"
    return {f"{at}.name": variable, f"{at}.valueFrom.secretKeyRef.name": name, f"{at}.valueFrom.secretKeyRef.key": key}


def _network(argv: list[str]) -> list[dict[str, str]]:
    given = dict(flag.removeprefix("--").split("=", 1) for flag in argv if flag.startswith(("--network=", "--subnet=")))
    return [{"network": given["network"], "subnetwork": given["subnet"]}]


def test_the_flags_say_what_the_file_says(described: Service, place: Place) -> None:
    argv = flags.deploy(described, place.region, place.project)
    in_file = leaves(described.document)
    interfaces = in_file.pop(f"{REVISION}.run.googleapis.com/network-interfaces")
    assert said_by(argv) == {path: value for path, value in in_file.items() if path not in NO_FLAG}
    assert _network(argv) == json.loads(interfaces)


def test_what_has_no_flag_is_in_the_file(described: Service) -> None:
    assert NO_FLAG.keys() - leaves(described.document).keys() == set(), "a reason for nothing"


def test_gcloud_takes_the_flags(described: Service, place: Place, tmp_path: Path) -> None:
    deploy = flags.deploy(described, place.region, place.project)
    job = flags.job(described, "proctor-migrate", "migrate", place.region, place.project)
    mistaken = [[*deploy, flag] for flag in ("--concurency=15", "--execution-environment=gen3", "--concurrency=x")]
    assert list(refused([deploy, job, *mistaken], tmp_path)) == [" ".join(argv) for argv in mistaken]


def test_a_value_that_the_command_line_cannot_carry_is_refused(described: Service, place: Place) -> None:
    document = copy.deepcopy(described.document)
    document["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": "X", "value": "a;b"})
    with pytest.raises(NotSayable, match="X: 'a;b'"):
        flags.deploy(Service(document), place.region, place.project)


def test_a_job_has_the_services_settings_and_no_model_providers_key(described: Service, place: Place) -> None:
    argv = flags.job(described, "proctor-migrate", "migrate", place.region, place.project)
    assert [flag for flag in argv if "API_KEY" in flag] == []
    assert f"--service-account={place.worker}" in argv
    assert next(f for f in argv if f.startswith("--set-env-vars")) in flags.deploy(described, "r", "p")

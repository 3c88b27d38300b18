"""`gcloud run deploy` does not read service.yaml, and people use it: the same, said in its flags.

What no flag can say is in `NO_FLAG` with the reason. `gcloud run deploy` leaves alone what it has no flag for, so a service
that `gcloud run services replace` made keeps it.
"""

import json
from collections.abc import Iterator

from app.cloud.service import Service
from app.errors import ProctorError
from app.settings import PREFIX

DELIMITER = ";"
"""Between variables: values hold commas."""

NO_FLAG = {
    "apiVersion": "says which form the file has",
    "kind": "says which form the file has",
    "metadata.annotations.run.googleapis.com/launch-stage": "gcloud sets it: `gcloud beta run deploy` is the flag",
    "spec.template.spec.containers.0.sandboxLauncher": "a preview: released gclouds have no flag for it, and"
    " `services replace` must have set it once",
    "spec.template.spec.containers.0.name": "for a single container, gcloud finds it by itself",
}
"""By path in service.yaml."""

_SWITCHES = {"run.googleapis.com/cpu-throttling": "cpu-throttling", "run.googleapis.com/startup-cpu-boost": "cpu-boost"}


class NotSayable(ProctorError):
    """A value that `gcloud run deploy` has no way to take."""

    title = "No flag for it"


def deploy(service: Service, region: str, project: str) -> list[str]:
    """What comes after `gcloud`, to deploy just what the file says."""
    return ["run", "deploy", service.document["metadata"]["name"], *_deploy_flags(service), *_where(region, project)]


def job(service: Service, name: str, arguments: str, region: str, project: str) -> list[str]:
    """What comes after `gcloud`, to deploy a Cloud Run job: one run of `proctor` with the service's image, account, network
    and settings. Without the model providers' keys, which only evaluations need."""
    annotations = service.template["metadata"]["annotations"]
    return [
        *("run", "jobs", "deploy", name, f"--image={service.container['image']}"),
        *(
            "--command=proctor",
            f"--args={arguments}",
            "--cpu=1",
            "--memory=2Gi",
            "--max-retries=0",
            "--task-timeout=900s",
        ),
        f"--service-account={service.template['spec']['serviceAccountName']}",
        *_network(annotations),
        _variables(service),
        *_secrets(service, prefix=PREFIX),
        *_where(region, project),
    ]


def _deploy_flags(service: Service) -> Iterator[str]:
    metadata, template, container = service.document["metadata"], service.template, service.container
    annotations = template["metadata"]["annotations"]
    yield f"--image={container['image']}"
    yield f"--ingress={metadata['annotations']['run.googleapis.com/ingress']}"
    yield f"--min={metadata['annotations']['run.googleapis.com/minScale']}"
    yield f"--max-instances={service.max_instances}"
    for annotation, switch in _SWITCHES.items():
        yield f"--{switch}" if annotations[annotation] == "true" else f"--no-{switch}"
    yield f"--execution-environment={annotations['run.googleapis.com/execution-environment']}"
    yield from _network(annotations)
    yield f"--service-account={template['spec']['serviceAccountName']}"
    yield f"--concurrency={service.concurrency}"
    yield f"--timeout={service.timeout}"
    yield f"--port={container['ports'][0]['containerPort']}"
    yield f"--cpu={container['resources']['limits']['cpu']}"
    yield f"--memory={container['resources']['limits']['memory']}"
    for name in ("startup", "liveness"):
        yield f"--{name}-probe={_probe(container[f'{name}Probe'])}"
    yield _variables(service)
    yield from _secrets(service)
    yield "--no-allow-unauthenticated"


def _network(annotations: dict[str, str]) -> Iterator[str]:
    (interface,) = json.loads(annotations["run.googleapis.com/network-interfaces"])
    yield f"--network={interface['network']}"
    yield f"--subnet={interface['subnetwork']}"
    yield f"--vpc-egress={annotations['run.googleapis.com/vpc-access-egress']}"


def _probe(probe: dict[str, object]) -> str:
    """`httpGet.path=/health/live,httpGet.port=8080,…`"""
    parts: dict[str, object] = {}
    for key, value in probe.items():
        parts |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return ",".join(f"{key}={value}" for key, value in parts.items())


def _variables(service: Service) -> str:
    for name, value in service.environment.items():
        if DELIMITER in value:
            raise NotSayable(f"{name}: {value!r} holds a {DELIMITER!r}, which separates variables on the command line.")
    said = DELIMITER.join(f"{name}={value}" for name, value in service.environment.items())
    return f"--set-env-vars=^{DELIMITER}^{said}"


def _secrets(service: Service, prefix: str = "") -> Iterator[str]:
    said = [f"{v}={name}:{key}" for v, (name, key) in service.secrets.items() if v.startswith(prefix)]
    if said:
        yield f"--set-secrets={','.join(said)}"


def _where(region: str, project: str) -> tuple[str, str]:
    return f"--region={region}", f"--project={project}"

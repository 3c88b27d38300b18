"""service.yaml: the template, and the Knative service that it becomes with a deployment's values."""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from app.cloud.place import Place
from app.errors import ProctorError
from app.settings import PREFIX

FILE = Path("service.yaml")

MAX_SCALE = "autoscaling.knative.dev/maxScale"
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}

Json = dict[str, Any]


class TemplateError(ProctorError):
    """The message names the file and the placeholders."""

    title = "Wrong template"


@dataclass(frozen=True)
class Service:
    """The document, with no placeholder left."""

    document: Json

    @property
    def template(self) -> Json:
        template: Json = self.document["spec"]["template"]
        return template

    @property
    def container(self) -> Json:
        container: Json = self.template["spec"]["containers"][0]
        return container

    @property
    def environment(self) -> dict[str, str]:
        """Variables with their values; those that refer to a secret are in `secrets`."""
        return {variable["name"]: variable["value"] for variable in self.container["env"] if "value" in variable}

    @property
    def secrets(self) -> dict[str, tuple[str, str]]:
        """By variable: the secret's name and its version."""
        references = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in self.container["env"] if "valueFrom" in v}
        return {variable: (reference["name"], reference["key"]) for variable, reference in references.items()}

    @property
    def concurrency(self) -> int:
        return int(self.template["spec"]["containerConcurrency"])

    @property
    def timeout(self) -> int:
        """Seconds for one request."""
        return int(self.template["spec"]["timeoutSeconds"])

    @property
    def max_instances(self) -> int:
        return int(self.template["metadata"]["annotations"][MAX_SCALE])

    @property
    def memory(self) -> int:
        """Bytes that one instance has."""
        quantity = str(self.container["resources"]["limits"]["memory"])
        found = re.fullmatch(r"(\d+)(\D*)", quantity)
        if found is None or found[2] not in _UNITS:
            raise TemplateError(f"resources.limits.memory: {quantity!r} is not an amount such as 16Gi.")
        return int(found[1]) * _UNITS[found[2]]

    def setting(self, name: str) -> str | None:
        """What the service is told for a setting of `app.settings`; None: nothing."""
        return self.environment.get(PREFIX + name.upper())


def load(file: Path, place: Place, image: str) -> Service:
    """The service with every placeholder replaced. Raises `TemplateError` when nothing is known for one."""
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise TemplateError(f"{file}: {error.strerror}. It is in the repository's root: run this there.") from error
    except yaml.YAMLError as error:
        raise TemplateError(f"{file} is not YAML: {error}") from error
    return Service(fill(document, place.substitutions(image), file))


def fill(node: Any, values: dict[str, str], file: Path = FILE) -> Any:
    """A placeholder is ``${NAME}``, in a string. It is replaced after the file was read as YAML, so that a value can be
    nothing but a value."""
    if isinstance(node, dict):
        return {key: fill(value, values, file) for key, value in node.items()}
    if isinstance(node, list):
        return [fill(value, values, file) for value in node]
    if not isinstance(node, str):
        return node
    try:
        return Template(node).substitute(values)
    except KeyError as error:
        raise TemplateError(f"{file}: nothing is known for the placeholder ${{{error.args[0]}}}.") from error
    except ValueError as error:
        raise TemplateError(f"{file}: {node!r} has a broken placeholder; write ${{NAME}}.") from error

"""What Cloud Run takes as a Service: its own description, made strict, and what that says in prose only."""

import functools
import re

from tests.cloud import discovery
from tests.cloud.discovery import Json

_RANGES: dict[tuple[str, str], Json] = {
    ("RevisionSpec", "timeoutSeconds"): {"minimum": 1, "maximum": 3600},
    ("RevisionSpec", "containerConcurrency"): {"minimum": 0, "maximum": 1000},
    ("ContainerPort", "containerPort"): {"minimum": 1, "maximum": 65535},
    ("Probe", "periodSeconds"): {"minimum": 1, "maximum": 3600},
    ("Probe", "timeoutSeconds"): {"minimum": 1, "maximum": 3600},
    ("Probe", "initialDelaySeconds"): {"minimum": 0, "maximum": 3600},
    ("Probe", "failureThreshold"): {"minimum": 1},
    ("TrafficTarget", "percent"): {"minimum": 0, "maximum": 100},
    ("Container", "startupProbe"): {"properties": {"periodSeconds": {"maximum": 240}}},
    ("ResourceRequirements", "limits"): {
        "properties": {"cpu": {"enum": ["1", "2", "4", "6", "8"]}, "memory": {"pattern": r"^\d+(Mi|Gi)$"}},
        "additionalProperties": False,
    },
}
"""What the document says in prose only. 1,000 and the CPUs are from Cloud Run's documentation of quotas and limits."""

_SWITCH = {"enum": ["true", "false"]}
_COUNT = {"pattern": r"^\d+$"}
_VALUES: dict[str, Json] = {
    "autoscaling.knative.dev/maxScale": _COUNT,
    "autoscaling.knative.dev/minScale": _COUNT,
    "run.googleapis.com/maxScale": _COUNT,
    "run.googleapis.com/minScale": _COUNT,
    "run.googleapis.com/cpu-throttling": _SWITCH,
    "run.googleapis.com/startup-cpu-boost": _SWITCH,
    "run.googleapis.com/execution-environment": {"enum": ["gen1", "gen2"]},
    "run.googleapis.com/ingress": {"enum": ["all", "internal", "internal-and-cloud-load-balancing"]},
    "run.googleapis.com/launch-stage": {"enum": ["ALPHA", "BETA", "GA"]},
    "run.googleapis.com/vpc-access-egress": {"enum": ["all-traffic", "private-ranges-only"]},
}
"""Of annotations, which are all text to the document."""


def problems(document: Json) -> list[str]:
    """What Cloud Run would not take, as `path: what`; empty if all is well."""
    return discovery.problems(_definitions(), "Service", document)


@functools.cache
def _definitions() -> Json:
    schemas = discovery.strict("run.v1", _RANGES)
    for kind in ("Service", "RevisionTemplate"):
        schemas[kind]["properties"]["metadata"] = _metadata(schemas["ObjectMeta"], kind.removesuffix("Template"))
    service = schemas["Service"]
    del service["properties"]["status"]  # Cloud Run's to say
    service["required"] = ["apiVersion", "kind", "metadata", "spec"]
    service["properties"] |= {"apiVersion": {"const": "serving.knative.dev/v1"}, "kind": {"const": "Service"}}
    return schemas


def _metadata(schema: Json, kind: str) -> Json:
    known = {key: {"type": "string", **_VALUES.get(key, {})} for key in annotations(kind)}
    named = {"type": "object", "properties": known, "additionalProperties": False}
    return {**schema, "properties": {**schema["properties"], "annotations": named}}


def annotations(kind: str) -> list[str]:
    """The keys that Cloud Run takes on this kind of resource: a list in the document's prose."""
    prose = discovery.document("run.v1")["schemas"]["ObjectMeta"]["properties"]["annotations"]["description"]
    listed = re.findall(r"\* `([^`]+)`: ([A-Za-z, ]+)\.", prose)
    return [key for key, kinds in listed if kind in kinds.replace(" ", "").split(",")]

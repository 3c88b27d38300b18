"""Google's own descriptions of its APIs (discovery documents) as strict JSON Schemas: unknown keys, wrong types and values
out of range are refused, where the documents themselves let them pass."""

import functools
import json
import re
from importlib import resources
from typing import Any

import jsonschema

Json = dict[str, Any]

_INT32 = {"minimum": -(2**31), "maximum": 2**31 - 1}


@functools.cache
def document(name: str) -> Json:
    """Such as `run.v1`, of the package google-api-python-client."""
    file = resources.files("googleapiclient.discovery_cache.documents").joinpath(f"{name}.json")
    read: Json = json.loads(file.read_text())
    return read


def strict(name: str, more: dict[tuple[str, str], Json] | None = None) -> Json:
    """Every schema of the document. `more`: what else holds for a property of one."""
    return {kind: _schema(kind, schema, more or {}) for kind, schema in document(name)["schemas"].items()}


def problems(definitions: Json, kind: str, instance: Json) -> list[str]:
    """What is wrong with it, as `path: what`; empty if all is well."""
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": definitions})
    return sorted(f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(instance))


def _schema(kind: str, schema: Json, more: dict[tuple[str, str], Json]) -> Json:
    """Without what the document says is "not supported", or the server's to say. "Required." is required, except of
    ObjectMeta, whose namespace gcloud fills in."""
    known = {
        key: value
        for key, value in schema.get("properties", {}).items()
        if not re.match(r"Not (currently )?supported|Output only", value.get("description", ""))
    }
    required = [
        k for k, v in known.items() if v.get("description", "").startswith("Required.") and kind != "ObjectMeta"
    ]
    properties = {key: {**value_of(value), **more.get((kind, key), {})} for key, value in known.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": required}


def value_of(value: Json) -> Json:
    """Schema of a property."""
    if "$ref" in value:
        return {"$ref": f"#/$defs/{value['$ref']}"}
    if value["type"] == "array":
        return {"type": "array", "items": value_of(value["items"])}
    if "additionalProperties" in value:
        return {"type": "object", "additionalProperties": value_of(value["additionalProperties"])}
    if "properties" in value:
        inner = {key: value_of(v) for key, v in value["properties"].items()}
        return {"type": "object", "properties": inner, "additionalProperties": False}
    if value["type"] == "any":
        return {}
    bounds = _INT32 if value.get("format") == "int32" else {}
    return {"type": value["type"], **bounds, **({"enum": value["enum"]} if "enum" in value else {})}

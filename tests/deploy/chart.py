"""Render the chart, and hold what comes out against the schemas of its kinds."""

import functools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tests.deploy.tools import helm
from tests.packaging.files import ROOT

CHART = ROOT / "deploy" / "helm" / "glimmer"
PRESETS = ("laptop", "single-gpu", "fleet")
NAMESPACE = "images"
KUBERNETES = "1.37"

Object = dict[str, Any]

_MODELS = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}

_DURATION = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_HTTP_ROUTE_SPEC = {  # of the Gateway API, what this chart may use; no package has its schema
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "hostnames": {"type": "array", "items": {"type": "string"}},
        "parentRefs": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name"]}},
        "rules": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "matches": {"type": "array"},
                    "timeouts": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"request": _DURATION, "backendRequest": _DURATION},
                    },
                    "backendRefs": {"type": "array", "items": {"type": "object", "required": ["name", "port"]}},
                },
            },
        },
    },
}


class RefusedError(Exception):
    """What helm printed instead of objects."""


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet: its object, its pods' template and their only container."""

    object: Object

    @property
    def name(self) -> str:
        return self.object["metadata"]["name"]

    @property
    def template(self) -> Object:
        return self.object["spec"]["template"]

    @property
    def pod(self) -> Object:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def component(self) -> str:
        """Return api, engine or redis."""
        return self.container["name"]

    @property
    def container(self) -> Object:
        [container] = self.pod["containers"]
        return container

    @property
    def environment(self) -> dict[str, str | None]:
        """Return the container's variables; None for those from a Secret."""
        return {entry["name"]: entry.get("value") for entry in self.container.get("env", [])}


def preset(name: str, chart: Path = CHART) -> Path:
    return chart / f"values-{name}.yaml"


def render(values: Path, *sets: str, chart: Path = CHART, release: str = "glimmer") -> list[Object]:
    """Return the objects, as `helm install` would create them.

    Raises:
        RefusedError: the schema or a template refuses the values.
    """
    command = [helm(), "template", release, chart, "--namespace", NAMESPACE, "--values", values]
    for value in sets:
        command += ["--set", value]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RefusedError(run.stderr)
    return [rendered for rendered in yaml.load_all(run.stdout, yaml.CSafeLoader) if rendered]


def workloads(objects: list[Object]) -> list[Workload]:
    return [Workload(found) for found in objects if found["kind"] in ("Deployment", "StatefulSet")]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def schema_problems(objects: list[Object]) -> Iterator[str]:
    """Yield what a cluster's schemas would refuse, unknown fields included."""
    for found in objects:
        if problem := _schema_problem(json.dumps(found)):
            yield f"{found['kind']} {found['metadata']['name']}: {problem}"


@functools.cache
def _schema_problem(text: str) -> str | None:
    found: Object = json.loads(text)
    try:
        if model := _MODELS.get(found["kind"]):
            kept = model.model_validate(found).model_dump(mode="json", by_alias=True, exclude_unset=True)
            return None if kept == found else "has fields that its schema does not know"  # the models drop them
        if found["kind"] == "HTTPRoute":
            jsonschema.validate(found["spec"], _HTTP_ROUTE_SPEC)
        else:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
        return error.message
    except (kubernetes_validate.SchemaNotFoundError, ValueError) as error:
        return str(error) or f"there is no {found['kind']}"
    return None

"""Rules for a release as a whole: each yields what is wrong between its objects."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from server.settings import ServerSettings
from tests.deploy.chart import NAMESPACE, Object, Workload, of_kind, workloads
from tests.exported_metrics import Exported, unknown_metrics
from tests.packaging.files import ROOT


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Return whether a label selector selects a pod; an empty one selects all."""
    for expression in selector.get("matchExpressions", []):
        if (labels.get(expression["key"]) in expression["values"]) != (expression["operator"] == "In"):
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def names(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that no object replaces another."""
    counted = Counter((found["kind"], found["metadata"]["name"]) for found in objects)
    yield from (f"{kind} {name} is there twice" for (kind, name), count in counted.items() if count > 1)


def selectors(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that each selector selects the pods it should."""
    running = workloads(objects)
    for workload in running:
        selected = [other for other in running if selects(workload.object["spec"]["selector"], other.labels)]
        if selected != [workload]:
            yield f"{workload.name} selects the pods of {[other.name for other in selected]}"
        budgets = [found for found in of_kind(objects, "PodDisruptionBudget") if _covers(found, workload)]
        if workload.component != "redis" and len(budgets) != 1:
            yield f"{workload.name} has {len(budgets)} PodDisruptionBudgets"
    for found in objects:
        if found["kind"] in ("PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
            selector = found["spec"]["podSelector" if found["kind"] == "NetworkPolicy" else "selector"]
        elif found["kind"] == "Service":
            selector = {"matchLabels": found["spec"]["selector"]}
        else:
            continue
        if not selector or not any(selects(selector, workload.labels) for workload in running):
            yield f"{found['kind']} {found['metadata']['name']} selects no pod"


def _covers(budget: Object, workload: Workload) -> bool:
    return selects(budget["spec"]["selector"], workload.labels)


def ports(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that traffic and scrapes arrive at a port of the pods behind it."""
    running = workloads(objects)
    services = {service["metadata"]["name"]: service for service in of_kind(objects, "Service")}
    for name, service in services.items():
        for workload in running:
            if selects({"matchLabels": service["spec"]["selector"]}, workload.labels):
                missing = {port["targetPort"] for port in service["spec"]["ports"]} - _port_names(workload)
                yield from (f"Service {name}: {workload.name} has no port {port}" for port in missing)
    for monitor in of_kind(objects, "PodMonitor"):
        for workload in running:
            if selects(monitor["spec"]["selector"], workload.labels):
                scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
                yield from (
                    f"PodMonitor: {workload.name} has no port {name}" for name in scraped - _port_names(workload)
                )
    for workload in running:
        listens = workload.environment.get("GLIMMER_PORT")
        if listens and {str(port["containerPort"]) for port in workload.container["ports"]} != {listens}:
            yield f"{workload.name} listens on {listens}, which is not its port"
    for name, port in _backends(objects):
        known = services.get(name, {"spec": {"ports": []}})["spec"]["ports"]
        if not any(port in (entry["name"], entry["port"]) for entry in known):
            yield f"there is no port {port} of a Service {name}"


def _port_names(workload: Workload) -> set[str]:
    return {port["name"] for port in workload.container.get("ports", [])}


def _backends(objects: list[Object]) -> Iterator[tuple[str, Any]]:
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            yield from ((backend["name"], backend["port"]) for backend in rule["backendRefs"])
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                yield service["name"], next(iter(service["port"].values()))


def long_responses(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that what is in front of the API neither cuts nor collects its events."""
    longest = ServerSettings.model_fields["max_timeout"].default
    for route in of_kind(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            timeouts = rule.get("timeouts", {})
            if min(_seconds(timeouts.get(name)) for name in ("request", "backendRequest")) <= longest:
                yield "HTTPRoute: ends requests that may still run"
    for ingress in of_kind(objects, "Ingress"):
        found = ingress["metadata"]["annotations"]
        prefix = "nginx.ingress.kubernetes.io/proxy-"
        if found.get(f"{prefix}buffering") != "off":
            yield "Ingress: collects events"
        if min(int(found.get(f"{prefix}{kind}-timeout", 60)) for kind in ("read", "send")) <= longest:
            yield "Ingress: ends requests that may still run"


def _seconds(duration: str | None) -> float:
    match = re.fullmatch(r"(\d+)s", duration or "15s")
    return float(match[1]) if match else 0.0


def secrets(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that the release's own Secret has what is read from it."""
    own = {found["metadata"]["name"]: found["stringData"] for found in of_kind(objects, "Secret")}
    for workload in workloads(objects):
        for entry in workload.container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if (
                reference
                and not reference.get("optional")
                and reference["key"] not in own.get(reference["name"], {reference["key"]: ""})
            ):
                yield f"{workload.name}: Secret {reference['name']} has no {reference['key']}"


def claims(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that each claim on devices has a template, and that a container takes it."""
    templates = {found["metadata"]["name"] for found in of_kind(objects, "ResourceClaimTemplate")}
    for workload in workloads(objects):
        given = workload.pod.get("resourceClaims", [])
        yield from (
            f"{workload.name}: there is no ResourceClaimTemplate {claim['resourceClaimTemplateName']}"
            for claim in given
            if claim["resourceClaimTemplateName"] not in templates
        )
        taken = {claim["name"] for claim in workload.container["resources"].get("claims", [])}
        if taken != {claim["name"] for claim in given}:
            yield f"{workload.name}: its container does not take its claims"


def scaling(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that KEDA can start the first engine, ends none too early, and asks for what is scraped."""
    targets = {workload.name: workload for workload in workloads(objects)}
    jobs = {f"{NAMESPACE}/{monitor['metadata']['name']}" for monitor in of_kind(objects, "PodMonitor")}
    scaled = of_kind(objects, "ScaledObject")
    for found in scaled:
        spec, name = found["spec"], found["spec"]["scaleTargetRef"]["name"]
        if name not in targets:
            yield f"ScaledObject: there is no {name}"
            continue
        if "replicas" in targets[name].object["spec"]:
            yield f"{name}: each upgrade would undo the scaling"
        if not spec["minReplicaCount"] <= spec["maxReplicaCount"]:
            yield f"{name}: minReplicas is above maxReplicas"
        startup = targets[name].container["startupProbe"]
        if spec["cooldownPeriod"] < startup["failureThreshold"] * startup["periodSeconds"]:
            yield f"{name}: an engine may be ended before it has loaded"
        [trigger] = spec["triggers"]
        metadata = trigger["metadata"]
        if metadata.get("activationThreshold") != "0":
            yield f"{name}: one job does not start an engine"
        if metadata.get("ignoreNullValues") != "false":
            yield f"{name}: a missing series would count as an empty queue"
        yield from (f"{name}: {problem}" for problem in unknown_metrics(metadata["query"], exported))
        if jobs and set(re.findall(r'job="([^"]*)"', metadata["query"])) != jobs:
            yield f"{name}: its query selects nothing that is scraped"
        apis = [other for other in targets.values() if other.component == "api"]
        is_awaited = all(api.environment.get("GLIMMER_SCALE_TO_ZERO") == "true" for api in apis)
        if spec["minReplicaCount"] == 0 and not is_awaited:
            yield f"{name}: without engines no job is accepted for which one could start"
    for workload in targets.values():
        is_scaled = any(found["spec"]["scaleTargetRef"]["name"] == workload.name for found in scaled)
        if not is_scaled and "replicas" not in workload.object["spec"]:
            yield f"{workload.name}: has no number of replicas"


def monitoring(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that rules and dashboards name metrics that exist, and that the rules are the project's."""
    known = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    rules = [rule for group in known["groups"] for rule in group["rules"]]
    for found in of_kind(objects, "PrometheusRule"):
        for group in found["spec"]["groups"]:
            for rule in group["rules"]:
                if rule not in rules:
                    yield f"alert {rule['alert']} differs from deploy/prometheus/alerts.yml"
                yield from (f"alert {rule['alert']}: {problem}" for problem in unknown_metrics(rule["expr"], exported))
    for found in of_kind(objects, "ConfigMap"):
        for text in found["data"].values():
            for expression in dashboard_queries(json.loads(text)):
                yield from (f"dashboard: {problem}" for problem in unknown_metrics(expression, exported))


def dashboard_queries(dashboard: Object) -> list[str]:
    """Return the PromQL of all panels and variables."""
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    defined = [entry["query"]["query"] for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
    return panels + defined


def network(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Check that the policies let pass what must, and nothing into engines."""
    running, policies = workloads(objects), of_kind(objects, "NetworkPolicy")
    if not policies:
        return
    store = next((workload for workload in running if workload.component == "redis"), None)
    anyone = {"app": "somebody-else"}
    for workload in running:
        enters = workload.labels, "Ingress"
        if workload.component == "redis":
            if _allows(policies, *enters, anyone, 6379):
                yield "anyone reaches Redis"
            continue
        if not _allows(policies, workload.labels, "Egress", {"k8s-app": "kube-dns"}, 53, "UDP"):
            yield f"{workload.name}: cannot resolve names"
        if not _allows(policies, workload.labels, "Egress", store.labels if store else {}, 6379):
            yield f"{workload.name}: cannot reach Redis"
        if store and not _allows(policies, store.labels, "Ingress", workload.labels, 6379):
            yield f"{workload.name}: Redis does not let it in"
        if workload.component == "api" and not _allows(policies, *enters, anyone, 8000):
            yield f"{workload.name}: nobody can reach it"
        if workload.component == "engine" and _allows(policies, *enters, anyone, 8000):
            yield f"{workload.name}: can be reached"
        downloads = workload.environment.get("GLIMMER_MODEL", "")
        if downloads and not downloads.startswith("/") and not _allows(policies, workload.labels, "Egress", {}, 443):
            yield f"{workload.name}: cannot download {downloads}"


def _allows(
    policies: list[Object], pod: dict[str, str], direction: str, peer: dict[str, str], port: int, protocol: str = "TCP"
) -> bool:
    """Return whether a pod's policies let it talk to, or be reached by, a peer; without one all may pass."""
    own = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod)
    ]
    rules = [rule for spec in own for rule in spec.get(direction.lower(), [])]
    side = "to" if direction == "Egress" else "from"
    return not own or any(
        any((entry.get("protocol", "TCP"), entry["port"]) == (protocol, port) for entry in rule["ports"])
        and (side not in rule or any(selects(found.get("podSelector", {}), peer) for found in rule[side]))
        for rule in rules
    )


RELEASE_RULES = (
    names,
    selectors,
    ports,
    long_responses,
    secrets,
    claims,
    scaling,
    monitoring,
    network,
)

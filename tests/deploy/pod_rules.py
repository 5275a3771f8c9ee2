"""Rules for pods: each yields what is wrong with one workload."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import click
import typer.main
from pydantic import ValidationError

from engine.config import HAND_BACK_S, EngineSettings
from server.app import create_app
from server.cli.commands import app
from server.cli.options import variable
from server.processes.serving import CANCEL_S, CLOSE_S, LAST_BYTES_S
from server.settings import ServerSettings
from tests.deploy.chart import Workload
from tests.packaging.files import image_environment, variables_of

ALLOWED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim"}
ALLOWED_VOLUMES |= {"projected", "secret"}  # the restricted standard, since Kubernetes 1.33
SECRETS = {"GLIMMER_REDIS_URL", "GLIMMER_API_KEY", "GLIMMER_PROMPT_REWRITER_KEY", "HF_TOKEN", "REDIS_PASSWORD"}
SECRETS |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
DRAIN_S = {"api": LAST_BYTES_S + CANCEL_S + CLOSE_S, "engine": HAND_BACK_S}  # beside the grace period
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def restricted(workload: Workload) -> Iterator[str]:
    """Check the restricted pod security standard, a read-only root and a numeric user."""
    pod, container = workload.pod, workload.container
    security, own = pod.get("securityContext", {}), container.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not int(security.get("runAsUser") or 0) > 0:
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
        yield "has capabilities"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "has a writable root"
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the node's namespaces"
    if pod.get("automountServiceAccountToken") is not False:
        yield "gets a token of the cluster"
    if pod.get("enableServiceLinks") is not False:
        yield "gets variables of Services"
    for volume in pod.get("volumes", []):
        if not volume.keys() - {"name"} <= ALLOWED_VOLUMES:
            yield f"volume {volume['name']} is not of an allowed kind"


def volumes(workload: Workload) -> Iterator[str]:
    """Check that mounts have a volume, and that what a process writes to can be written."""
    names = {volume["name"] for volume in workload.pod.get("volumes", [])}
    names |= {claim["metadata"]["name"] for claim in workload.object["spec"].get("volumeClaimTemplates", [])}
    mounts = workload.container.get("volumeMounts", [])
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    if unknown := {mount["name"] for mount in mounts} - names:
        yield f"mounts of unknown volumes: {unknown}"
    needed = {"/data"} if workload.component == "redis" else {"/tmp"}
    if workload.component == "engine":
        home = image_environment("engine")["HF_HOME"]
        needed |= {home.rpartition("/")[0]}
    if not needed <= writable:
        yield f"cannot write to {needed - writable}"


def bounded(workload: Workload) -> Iterator[str]:
    """Check requests and limits, and that images have a version."""
    resources = workload.container["resources"]
    if not {"cpu", "memory"} <= resources.get("requests", {}).keys():
        yield "requests no CPU or memory"
    if "memory" not in resources.get("limits", {}):
        yield "has no memory limit"
    if not re.search(r":\d+\.\d+", workload.container["image"]):
        yield f"image {workload.container['image']} has no version"


def probes(workload: Workload) -> Iterator[str]:
    """Check that each probe asks something that exists, and what it should ask."""
    container = workload.container
    ports = {port["name"] for port in container.get("ports", [])}
    paths = _paths()
    for name in PROBES:
        probe = container.get(name)
        if probe is None:
            yield f"has no {name}"
        elif "httpGet" in probe:
            if probe["httpGet"]["path"] not in paths:
                yield f"{name}: the server has no {probe['httpGet']['path']}"
            if probe["httpGet"]["port"] not in ports:
                yield f"{name}: there is no port {probe['httpGet']['port']}"
        elif workload.component != "redis" and (problem := _usage_problem(*probe["exec"]["command"])):
            yield f"{name}: {problem}"
    yield from _wrong_questions(workload)


@functools.cache
def _paths() -> set[str]:
    openapi = create_app(ServerSettings(redis_url="redis://nowhere")).openapi()
    return {path for path, methods in openapi["paths"].items() if "get" in methods}


def _wrong_questions(workload: Workload) -> Iterator[str]:
    asked = {name: workload.container.get(name, {}) for name in PROBES}
    if workload.component == "api":
        for name, probe in asked.items():
            if probe.get("httpGet", {}).get("path") != "/live":
                yield f"{name}: must not depend on Redis, the queue or engines"
    if workload.component == "engine":
        commands = {name: probe.get("exec", {}).get("command", []) for name, probe in asked.items()}
        if any("--engine" not in command for command in commands.values()):
            yield "a probe asks for an API"
        if "--ready" in commands["livenessProbe"]:
            yield "livenessProbe: a draining engine would be killed"
        if any("--ready" not in commands[name] for name in ("startupProbe", "readinessProbe")):
            yield "an engine that loads its checkpoint counts as ready"


@functools.cache
def _usage_problem(program: str, *arguments: str) -> str | None:
    """Return why the program would not accept a command."""
    if program != "glimmer":
        return f"the image has no {program}"
    group: Any = typer.main.get_command(app)
    try:
        name, subcommand, rest = group.resolve_command(click.Context(group), list(arguments))
        subcommand.make_context(name, rest, resilient_parsing=False)
    except Exception as error:  # of click or of typer's own copy
        return f"{program} {' '.join(arguments)}: {error}"
    return None


def environment(workload: Workload) -> Iterator[str]:
    """Check that variables are settings, that the process takes their values, and that secrets come from a Secret."""
    given = workload.environment
    yield from (f"{name} is in the open" for name in SECRETS & given.keys() if given[name] is not None)
    if workload.component == "redis":
        return
    [command] = workload.container["args"]
    if command not in ("api", "engine"):
        yield f"there is no command {command}"
        return
    yield from (
        f"{name} is not a setting of {command}"
        for name in given.keys() - _variables_of(command)
        if name.startswith("GLIMMER_")
    )
    try:
        settings_of(workload)
    except ValidationError as error:
        yield f"the {command} refuses its settings: {error}"


@functools.cache
def _variables_of(command: str) -> set[str]:
    return variables_of(command)


def settings_of(workload: Workload) -> ServerSettings | EngineSettings:
    """Return the settings as the process reads them, with an address for Redis."""
    model = ServerSettings if workload.component == "api" else EngineSettings
    values = {
        name: value for name in model.model_fields if (value := workload.environment.get(variable(name))) is not None
    }
    return model.model_validate(values | {"redis_url": "redis://redis:6379/0"})


def stops(workload: Workload) -> Iterator[str]:
    """Check that a pod is killed only after its drain."""
    if workload.component == "redis":
        return
    drain_s = float(workload.environment["GLIMMER_GRACE_S"] or 0) + DRAIN_S[workload.component]
    if workload.pod["terminationGracePeriodSeconds"] < drain_s:
        yield f"is killed before its drain of {drain_s:.0f} s ends"
    if not workload.pod.get("shareProcessNamespace"):
        yield "is process 1, which ignores SIGTERM until Python has a handler"


def replaced(workload: Workload) -> Iterator[str]:
    """Check that a rollout neither waits for a GPU that an old pod has nor leaves nobody to answer."""
    if workload.component == "redis":
        return
    rolling = workload.object["spec"]["strategy"]["rollingUpdate"]
    has_gpu = "nvidia.com/gpu" in workload.container["resources"]["limits"] or "resourceClaims" in workload.pod
    if has_gpu and rolling["maxSurge"] != 0:
        yield "a rollout waits for a GPU that the old pod has"
    if not has_gpu and rolling["maxUnavailable"] != 0:
        yield "a rollout stops a pod before its successor is ready"


def spread(workload: Workload) -> Iterator[str]:
    """Check that a node's death does not take all pods."""
    if workload.component == "redis":
        return
    for constraint in workload.pod.get("topologySpreadConstraints", [{"labelSelector": {"matchLabels": {"none": ""}}}]):
        if not constraint["labelSelector"]["matchLabels"].items() <= workload.labels.items():
            yield "its pods are not spread over nodes"


POD_RULES = (restricted, volumes, bounded, probes, environment, stops, replaced, spread)

"""The chart, rendered without a cluster: it follows the schemas and the rules, and planted mistakes are found."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import CHART, PRESETS, Object, RefusedError, of_kind, preset, render, schema_problems, workloads
from tests.deploy.mistakes import MISTAKES, Mistake
from tests.deploy.pod_rules import POD_RULES
from tests.deploy.release_rules import RELEASE_RULES
from tests.deploy.tools import helm, kubectl
from tests.exported_metrics import Exported
from tests.packaging.files import ROOT


def problems(objects: list[Object], exported: Exported) -> Iterator[str]:
    """Yield all that is wrong with a release; the rules are for what follows the schemas."""
    if refused := list(schema_problems(objects)):
        yield from refused
        return
    for rule in POD_RULES:
        for workload in workloads(objects):
            yield from (f"{workload.name}: {problem}" for problem in rule(workload))
    for check in RELEASE_RULES:
        yield from check(objects, exported)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_the_schemas_and_the_rules(name: str, exported: Exported) -> None:
    assert not list(problems(render(preset(name)), exported))


@pytest.mark.parametrize(
    "sets",
    [
        ("engine.gpus=2", "engine.gpuBy=dra"),
        ("redis.trial.enabled=true", "secretName=", "keysSecretName="),
        ("networkPolicy.enabled=false", "model.volume=pvc", "model.name=zai-org/GLM-Image"),
        ("service.type=LoadBalancer", "service.port=80", "ingress.enabled=true", "httpRoute.enabled=false"),
        ("engine.autoscaling.enabled=true", "stages.all.autoscaling.minReplicas=2", "engine.graceSeconds=900"),
        ("resultStore.url=s3://images/results", "resultStore.endpoint=http://minio:9000", "resultStore.port=9000"),
        ("images.pullSecrets[0]=mine", "engine.nodeSelector.gpu=h200", "ingress.tlsSecretName=tls"),
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_other_values_follow_the_rules(name: str, sets: tuple[str, ...], exported: Exported) -> None:
    if name == "laptop" and "secretName=" not in sets:
        sets = (*sets, "redis.trial.enabled=true")
    assert not list(problems(render(preset(name), *sets), exported))


@pytest.mark.parametrize("name", PRESETS)
def test_helm_finds_nothing(name: str) -> None:
    run = subprocess.run([helm(), "lint", "--strict", CHART, "--values", preset(name)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_a_package_has_the_files_it_shares_with_the_project(tmp_path: Path) -> None:
    subprocess.run([helm(), "package", CHART, "--destination", tmp_path], check=True, capture_output=True)
    [package] = tmp_path.glob("*.tgz")
    shutil.unpack_archive(package, tmp_path)
    for name, source in (("alerts.yml", "prometheus/alerts.yml"), ("dashboard.json", "grafana/dashboard.json")):
        packed = tmp_path / "glimmer" / "files" / name
        assert packed.read_bytes() == (ROOT / "deploy" / source).read_bytes()


REFUSED = {
    "api.replica=2": "replica",
    "api.replicas=two": "/api/replicas",
    "api.replicas=0": "/api/replicas",
    "engine.gpuBy=magic": "/engine/gpuBy",
    "stages.draw.replicas=1": "draw",
    "stages.plan.autoscaling.minReplica=1": "minReplica",
    "api.settings.GLIMMER_MAX_QUEU=1": "GLIMMER_MAX_QUEU",
    "api.settings.GLIMMER_GRACE_S=1": "GLIMMER_GRACE_S",
    "engine.settings.GLIMMER_MAX_QUEUE=1": "GLIMMER_MAX_QUEUE",
    "api.resources.limits.memory=lots": "/api/resources/limits/memory",
    "monitoring.prometheusUrl=prometheus": "/monitoring/prometheusUrl",
    "redis.trial.enabled=maybe": "/redis/trial/enabled",
    "secretName=mine": "secretName",
    "model.volume=image": "model.image",
    "stages.plan.replicas=1": "both `plan` and `render` are needed",
}


@pytest.mark.parametrize("value", REFUSED)
def test_wrong_values_are_refused_by_name(value: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(REFUSED[value])):
        render(preset("laptop"), value)


def test_numbers_reach_the_process_as_they_were_written() -> None:
    values = {"GLIMMER_MAX_RESULT_BYTES": "17179869184", "GLIMMER_DEFAULT_TIMEOUT": "0.5", "GLIMMER_MAX_QUEUE": "7"}
    [api] = [
        workload
        for workload in workloads(render(preset("laptop"), *(f"api.settings.{name}={values[name]}" for name in values)))
        if workload.component == "api"
    ]
    assert api.environment.items() >= values.items()


@pytest.mark.parametrize("name", ["single-gpu", "fleet"])
def test_the_commands_of_a_preset_make_the_secrets_it_names(name: str, tmp_path: Path) -> None:
    text = preset(name).read_text()
    values = yaml.safe_load(text)
    (tmp_path / "keys.toml").touch()
    comments = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    made = {}
    for command in re.findall(r"^kubectl (.*)$", comments.replace("\\\n", " "), re.MULTILINE):
        arguments = [*shlex.split(command), "--dry-run=client", "--output=json"]
        run = subprocess.run([kubectl(), *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        secret = json.loads(run.stdout)
        made[secret["metadata"]["name"]] = set(secret["data"])
    assert made == {values["secretName"]: {"GLIMMER_REDIS_URL"}, values["keysSecretName"]: {"keys.toml"}}


def test_the_password_of_the_trial_redis_is_not_in_the_files() -> None:
    first, second = ([found["stringData"] for found in of_kind(render(preset("laptop")), "Secret")] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.file}: {mistake.new[:40]}")
def test_planted_mistakes_are_found(mistake: Mistake, exported: Exported, tmp_path: Path) -> None:
    chart = tmp_path / "glimmer"
    shutil.copytree(CHART, chart)
    path = chart / "templates" / mistake.file
    text = path.read_text()
    assert mistake.old in text
    path.write_text(text.replace(mistake.old, mistake.new))
    found = list(problems(render(preset(mistake.preset, chart), chart=chart), exported))
    assert any(mistake.problem in problem for problem in found), found

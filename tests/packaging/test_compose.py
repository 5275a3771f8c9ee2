"""The compose files follow the official schema and agree with the project."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from engine.config import HAND_BACK_S
from engine.jobs.embedded import find_redis_server
from server.image_files.decode_worker import MAX_MEMORY
from server.image_files.decoders import PLACES
from server.processes.http_limits import MAX_UNSENT_BYTES
from server.processes.serving import CANCEL_S, CLOSE_S, LAST_BYTES_S
from server.settings import ServerSettings
from tests.packaging.files import COMPOSE_FILES, ROOT, compose, dockerfile, image_environment, last, variables_of

ENGINES = ("engine", "planner", "renderer")
OURS = ("api", *ENGINES)
PROFILES = {
    None: {"redis", "api", "engine"},
    "fleet": {"planner", "renderer"},
    "observability": {"prometheus", "grafana"},
}
BIN = Path(sys.executable).parent


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    """Validate a file against the Compose Specification's schema, which check-jsonschema includes."""
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(command, capture_output=True, text=True)


def services() -> dict[str, dict[str, Any]]:
    return compose()["services"]


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)s", duration)
    assert match, duration
    return float(match[1])


def target(service: str) -> str:
    """Return the image's target in the Dockerfile, which is also the command."""
    return "api" if service == "api" else "engine"


def with_defaults(text: str) -> str:
    """Replace `${NAME:-default}` and `${NAME:+other}` as compose does if no variable is set."""
    return re.sub(r"\$\{\w+:(?:-([^}]*)|\+[^}]*)\}", r"\1", str(text))


def environment(service: str) -> dict[str, str]:
    """Return the environment of the container's process: the image's and the service's variables."""
    given = services()[service]["environment"]
    set_here = {name: with_defaults(value) for name, value in given.items() if value is not None}
    return image_environment(target(service)) | set_here


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_follow_the_specification(name: str) -> None:
    checked = validate(ROOT / name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_schema_detects_an_unknown_key(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("stop_grace_period", "grace_period"))
    assert validate(wrong).returncode != 0


def test_every_service_has_a_health_check() -> None:
    """Check each service; the command may come from its image."""
    for name, service in services().items():
        assert service["healthcheck"]["interval"], name
        if "test" not in service["healthcheck"]:
            assert last(dockerfile()[service["build"]["target"]].steps, "HEALTHCHECK"), name


def test_our_services_are_built_from_existing_targets() -> None:
    for name in OURS:
        assert services()[name]["build"]["target"] == target(name)
        assert target(name) in dockerfile()


def test_profiles_add_services_to_those_that_always_start() -> None:
    found: dict[str | None, set[str]] = {}
    for name, service in services().items():
        for profile in service.get("profiles", [None]):
            found.setdefault(profile, set()).add(name)
    assert found == PROFILES


def test_the_engines_of_a_fleet_differ_in_their_stage_alone() -> None:
    for name, stage in (("planner", "plan"), ("renderer", "render")):
        service = dict(services()[name])
        assert service.pop("profiles") == ["fleet"]
        assert service["environment"].pop("GLIMMER_STAGE") == stage
        assert service == services()["engine"]


@pytest.mark.parametrize("name", sorted(PROFILES["observability"]))
def test_what_prometheus_and_grafana_read_is_there(name: str) -> None:
    for volume in services()[name]["volumes"]:
        source, mounted = volume.split(":")[:2]
        if source.startswith("./"):
            assert (ROOT / source).exists()
        else:
            assert source in compose()["volumes"]
            assert mounted in ("/prometheus", "/var/lib/grafana")
    (published,) = services()[name]["ports"]
    assert published.startswith("127.0.0.1:")


def test_grafana_is_provisioned_with_prometheus_and_the_dashboard() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert urlsplit(source["url"]).hostname == "prometheus"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "glimmer.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services()["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounted
    assert services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted


def test_prometheus_scrapes_every_api_and_has_the_rules() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    [scraped] = config["scrape_configs"]
    [names] = scraped["dns_sd_configs"]
    assert names["names"] == ["api"]
    assert str(names["port"]) == environment("api")["GLIMMER_PORT"]
    assert config["rule_files"] == ["alerts.yml"]
    [folder] = [volume.split(":") for volume in services()["prometheus"]["volumes"] if volume.startswith("./")]
    assert f"--config.file={folder[1]}/prometheus.yml" in services()["prometheus"]["command"]


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_images_are_pinned(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for service, definition in compose(name)["services"].items():
        tag = definition["image"].partition(":")[2]
        assert tag.startswith(version) if service in OURS else re.match(r"v?\d+\.\d+\.?\d*", tag), definition["image"]


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_variables_are_real_settings(name: str) -> None:
    for service, definition in compose(name)["services"].items():
        ours = {variable for variable in definition.get("environment", {}) if variable.startswith("GLIMMER_")}
        assert ours <= (variables_of(target(service)) if service in OURS else set()), service
    referenced = set(re.findall(r"\$\{(\w+)", (ROOT / name).read_text()))
    assert referenced <= variables_of("api") | variables_of("engine") | {
        "HF_TOKEN",
        "GLIMMER_REDIS_PASSWORD",
        "GRAFANA_PASSWORD",
    }


@pytest.mark.parametrize(
    ("service", "of_the_container"),
    [
        ("api", {"GLIMMER_HOST", "GLIMMER_PORT"}),
        ("engine", {"GLIMMER_ENGINE_ID", "GLIMMER_STAGE"}),
        ("planner", {"GLIMMER_ENGINE_ID"}),
        ("renderer", {"GLIMMER_ENGINE_ID"}),
    ],
)
def test_every_setting_can_be_set_from_outside(service: str, of_the_container: set[str]) -> None:
    """Except those that are useless in a container or set by its image."""
    ours = {name for name in services()[service]["environment"] if name.startswith("GLIMMER_")}
    assert ours == variables_of(target(service)) - of_the_container


def test_the_key_file_is_mounted_where_the_api_reads_it() -> None:
    """Without a key file the API reads none, and nothing that it could read as keys is mounted."""
    setting = services()["api"]["environment"]["GLIMMER_API_KEYS_FILE"]
    [mount] = services()["api"]["volumes"]
    assert setting == f"${{GLIMMER_API_KEYS_FILE:+{mount['target']}}}"
    assert mount["source"] == "${GLIMMER_API_KEYS_FILE:-/dev/null}"
    assert (mount["type"], mount["read_only"], mount["bind"]["create_host_path"]) == ("bind", True, False)


def test_the_api_accepts_its_variables_and_listens_where_the_port_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GLIMMER_")]:
        monkeypatch.delenv(name)
    for name, value in environment("api").items():
        monkeypatch.setenv(name, value)
    settings = ServerSettings()  # pyright: ignore[reportCallIssue]
    (published,) = services()["api"]["ports"]
    address, host_port, container_port = with_defaults(published).rsplit(":", 2)
    assert (settings.host, settings.port) == ("0.0.0.0", int(container_port))
    assert (address, host_port) == ("127.0.0.1", str(ServerSettings.model_fields["port"].default))
    assert not settings.asks_for_keys
    assert f"EXPOSE {container_port}" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", OURS)
def test_api_and_engine_use_the_same_redis_and_wait_for_it(name: str) -> None:
    url = urlsplit(environment(name)["GLIMMER_REDIS_URL"])
    assert (url.scheme, url.hostname, url.port) == ("redis", "redis", 6379)
    assert services()[name]["depends_on"]["redis"]["condition"] == "service_healthy"


@pytest.mark.parametrize("name", OURS)
def test_containers_get_more_time_to_stop_than_the_drain_takes(name: str) -> None:
    extra_s = LAST_BYTES_S + CANCEL_S + CLOSE_S if name == "api" else HAND_BACK_S
    grace = float(environment(name)["GLIMMER_GRACE_S"])
    assert seconds(services()[name]["stop_grace_period"]) >= grace + extra_s


@pytest.mark.parametrize("name", services())
def test_services_are_restarted(name: str) -> None:
    assert services()[name]["restart"] == "unless-stopped"


def test_the_volume_contains_the_hub_client_s_cache() -> None:
    volume, mounted = services()["engine"]["volumes"][0].split(":")
    assert volume in compose()["volumes"]
    assert Path(environment("engine")["HF_HOME"]).is_relative_to(mounted)


@pytest.mark.parametrize("name", services())
def test_services_are_confined(name: str) -> None:
    """Each is read-only, without privileges, bounded in memory, processes and logs, and not root."""
    service = services()[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert name in OURS or re.fullmatch(r"redis:redis|[1-9]\d*:\d+", service["user"])  # ours: see test_dockerfile


def test_redis_asks_for_a_password_and_is_reached_from_the_inner_network_alone() -> None:
    redis_service = services()["redis"]
    command = [with_defaults(word) for word in redis_service["command"]]
    password = command[command.index("--requirepass") + 1]
    assert password
    for name in OURS:
        assert urlsplit(environment(name)["GLIMMER_REDIS_URL"]).password == password
    assert with_defaults(redis_service["environment"]["REDISCLI_AUTH"]) == password
    assert redis_service["networks"] == ["queue"]
    assert compose()["networks"]["queue"] == {"internal": True}
    assert "ports" not in redis_service


def test_the_memory_of_redis_has_room_for_a_rewrite() -> None:
    command = services()["redis"]["command"]
    maxmemory = command[command.index("--maxmemory") + 1]
    assert maxmemory == "2gb"
    assert services()["redis"]["mem_limit"] == f"{4 * 1024 + 512}m"


def test_the_memory_of_the_api_has_room_for_its_decode_processes() -> None:
    limit = re.fullmatch(r"(\d+)g", services()["api"]["mem_limit"])
    assert limit
    in_flight = ServerSettings.model_fields["max_inflight_bytes"].default
    assert int(limit[1]) * 2**30 >= PLACES * MAX_MEMORY + in_flight + MAX_UNSENT_BYTES + 300 * 2**20


def test_a_real_redis_accepts_the_command_and_keeps_jobs(tmp_path: Path) -> None:
    program, *flags = (with_defaults(word) for word in services()["redis"]["command"])
    password = flags[flags.index("--requirepass") + 1]
    assert program == "redis-server"
    local = ["--port", "0", "--unixsocket", "redis.sock", "--logfile", "redis.log"]
    with subprocess.Popen([find_redis_server(), *flags, *local], cwd=tmp_path) as server:
        try:
            wanted = {
                "appendonly": "yes",
                "appendfsync": "always",
                "save": "",
                "maxmemory-policy": "noeviction",
            }
            assert {name: config(tmp_path / "redis.sock", password, name) for name in wanted} == wanted
            assert int(config(tmp_path / "redis.sock", password, "maxmemory") or 0) >= 2**30
        finally:
            server.terminate()


def config(path: Path, password: str, name: str) -> str | None:
    """Return the response to CONFIG GET of the server on a unix socket, once it listens."""
    retry = Retry(ConstantBackoff(0.05), 200, supported_errors=(RedisError, OSError))
    with redis.Redis(unix_socket_path=str(path), password=password, decode_responses=True, retry=retry) as client:
        answer = client.config_get(name)
        assert isinstance(answer, dict)
        return answer[name]

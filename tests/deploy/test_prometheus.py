"""Debian's Prometheus with the configuration of docker compose, against what a server exports."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.release_rules import dashboard_queries
from tests.deploy.tools import promtool
from tests.packaging.files import ROOT

FOLDER = ROOT / "deploy" / "prometheus"
QUERIES = dashboard_queries(json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text()))


@contextmanager
def serving(text: str) -> Iterator[int]:
    """Yield the port of a server with this page at /metrics."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[httpx.Client]:
    """Yield a client of a Prometheus that scrapes the target, once it has scraped twice."""
    program = promtool()
    if program is None or not program.with_name("prometheus").exists():
        pytest.skip("Prometheus is missing: run `make cluster-tools`, or install it")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    [scraped] = config["scrape_configs"]
    del scraped["dns_sd_configs"]
    scraped["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [program.with_name("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        try:
            give_up_at = time.monotonic() + 60
            while not ask(client, "count_over_time(up[1m]) > 3"):
                has_time = process.poll() is None and time.monotonic() < give_up_at
                assert has_time, (folder / "log").read_text()
                time.sleep(0.1)
            yield client
        finally:
            process.terminate()


def ask(client: httpx.Client, query: str) -> list[Any]:
    """Return the result of a query, none while the server starts."""
    try:
        response = client.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if response.status_code == 503:
        return []
    assert response.status_code == 200, response.text
    return response.json()["data"]["result"]


def test_a_real_prometheus_scrapes_the_rules_and_answers_the_dashboard(metrics_text: str, tmp_path: Path) -> None:
    with serving(metrics_text) as target, prometheus(tmp_path, target) as client:
        assert ask(client, "up{job='glimmer'} == 1")
        groups = client.get("/api/v1/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == len(yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"])
        assert not [rule for rule in rules if rule["health"] == "err"]
        for query in QUERIES:
            if not query.startswith("label_values("):
                assert ask(client, query.replace("$job", ".+")), query

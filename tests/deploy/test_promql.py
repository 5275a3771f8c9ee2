"""The alert rules and all queries as Prometheus reads them; skipped without promtool (`make cluster-tools`)."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import of_kind, preset, render
from tests.deploy.release_rules import dashboard_queries
from tests.deploy.tools import promtool
from tests.exported_metrics import Exported, unknown_metrics
from tests.packaging.files import ROOT

FOLDER = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())


def run_promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = promtool()
    if program is None:
        pytest.skip("promtool is missing: run `make cluster-tools`, or install Prometheus")
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def test_prometheus_accepts_the_rules() -> None:
    run = run_promtool("check", "rules", "--lint-fatal", FOLDER / "alerts.yml")
    assert run.returncode == 0, run.stderr


def test_the_rules_fire_when_they_should_and_only_then() -> None:
    run = run_promtool("test", "rules", FOLDER / "alerts_test.yml")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min(glimmer_redis_up) == 0", "max(glimmer_redis_up) == 0"),
        ("for: 30m", "for: 5m"),
        ("sum(max by (engine) (rate(glimmer_jobs_total{state", "sum(max by (engine) (rate(glimmer_job{state"),
        ("> 3 * max_over_time", "> max_over_time"),
        ("> 0.8 * max(glimmer_queue_cap)", "> 0.8 * sum(glimmer_queue_cap)"),
    ],
)
def test_changed_rules_fail_their_tests(old: str, new: str, tmp_path: Path) -> None:
    text = (FOLDER / "alerts.yml").read_text()
    assert old in text
    (tmp_path / "alerts.yml").write_text(text.replace(old, new))
    (tmp_path / "alerts_test.yml").write_text((FOLDER / "alerts_test.yml").read_text())
    assert run_promtool("test", "rules", tmp_path / "alerts_test.yml").returncode != 0


def test_prometheus_can_parse_what_dashboards_and_autoscalers_ask(tmp_path: Path) -> None:
    """Check the queries as recording rules; Grafana replaces its variables before it asks."""
    scaled = of_kind(render(preset("fleet")), "ScaledObject")
    asked = [trigger["metadata"]["query"] for found in scaled for trigger in found["spec"]["triggers"]]
    asked += [text for text in dashboard_queries(DASHBOARD) if not text.startswith("label_values(")]
    rules = [{"record": f"query:{index}", "expr": text} for index, text in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    run = run_promtool("check", "rules", tmp_path / "rules.yml")
    assert run.returncode == 0, run.stderr
    assert len(rules) > 25


def test_the_dashboard_asks_for_what_a_server_exports(exported: Exported) -> None:
    assert not [problem for text in dashboard_queries(DASHBOARD) for problem in unknown_metrics(text, exported)]


def test_panels_of_the_dashboard_do_not_overlap_and_say_what_they_show() -> None:
    cells = set()
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        taken = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells
        assert place["x"] + place["w"] <= 24
        cells |= taken
    assert all(target["legendFormat"] for panel in panels for target in panel["targets"])

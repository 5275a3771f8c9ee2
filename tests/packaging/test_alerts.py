"""The alert rules: their metrics are exported, and each has a section in docs/operations.md."""

import re
from typing import Any

import pytest
import yaml

from models.glm_image.model import GlmImage
from tests.exported_metrics import Exported, parse, read_metrics, unknown_metrics
from tests.job_queue import JobQueue
from tests.packaging.files import ROOT

RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
PAGE = (ROOT / "docs/operations.md").read_text()


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


@pytest.fixture
async def exported(queue: JobQueue, model: GlmImage) -> Exported:
    return parse(await read_metrics(queue, model))


async def test_every_metric_and_label_of_a_rule_is_exported(exported: Exported) -> None:
    problems = [(alert["alert"], problem) for alert in alerts() for problem in unknown_metrics(alert["expr"], exported)]
    assert not problems


def test_brackets_of_expressions_match() -> None:
    """Check what can be checked without Prometheus."""
    for alert in alerts():
        bare = re.sub(r'"[^"]*"', "", alert["expr"])
        for opening, closing in ("()", "[]", "{}"):
            assert bare.count(opening) == bare.count(closing), alert["alert"]
        assert re.search(r"absent\(|[<>=]", bare), f"{alert['alert']} compares nothing"


def test_alerts_have_a_severity_a_runbook_and_a_summary() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{alert['alert'].lower()}"
        assert alert["annotations"]["summary"].endswith(".")


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    assert re.findall(r"^### (Glimmer\w+)$", PAGE, re.MULTILINE) == [alert["alert"] for alert in alerts()]


def test_links_within_the_page_exist() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors

"""The alert rules: their metrics are exported, and each has a section in docs/operations.md."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from models.glm_image.model import GlmImage
from server.app import create_app
from server.settings import ServerSettings
from tests.checkpoints import small_engine
from tests.engine.test_worker import working
from tests.job_queue import JobQueue
from tests.packaging.files import ROOT
from tests.waiting import until

RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
PAGE = (ROOT / "docs/operations.md").read_text()
URL = "/v1/images/generations"

Labels = dict[str, str]


@dataclass(frozen=True)
class Selector:
    """`name{label="value", ...}` in an expression."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value

    def matches(self, labels: Labels) -> bool:
        return all(_matches(labels.get(label, ""), operator, value) for label, operator, value in self.matchers)


def _matches(found: str, operator: str, value: str) -> bool:
    return found == value if operator == "=" else re.fullmatch(value, found) is not None


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def selectors(expression: str) -> Iterator[Selector]:
    for name, braces in re.findall(r"\b(glimmer_\w+)(?:\{([^}]*)\})?", expression):
        yield Selector(name, tuple(re.findall(r'(\w+)(=~|=)"([^"]*)"', braces)))


def grouped_by(expression: str) -> set[str]:
    return {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", expression) for label in labels.split(",")}


@pytest.fixture
async def exported(queue: JobQueue, model: GlmImage) -> dict[str, list[Labels]]:
    """Return the labels of all samples by name, for an API with an engine that has generated an image."""
    settings = ServerSettings(prompt_rewriter="http://127.0.0.1:1/v1")  # type: ignore[call-arg]
    app = create_app(settings, queue)
    transport = httpx.ASGITransport(app)
    async with (
        working(queue, small_engine(model)) as worker,
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as client,
    ):
        await until(lambda: _has_heartbeat(queue))
        response = await client.post(URL, json={"prompt": "x", "size": "64x64", "num_inference_steps": 1})
        assert response.status_code == 200
        await queue.heartbeat(worker._info, worker._engine.metrics.exposition(), 5)
        text = (await client.get("/metrics")).text
    found: dict[str, list[Labels]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


async def _has_heartbeat(queue: JobQueue) -> bool:
    return bool(await queue.engines())


async def test_every_metric_and_label_of_a_rule_is_exported(exported: dict[str, list[Labels]]) -> None:
    for alert in alerts():
        named = list(selectors(alert["expr"]))
        assert named, alert["alert"]
        for selector in named:
            assert selector.name in exported, f"{alert['alert']}: there is no {selector.name}"
            samples = exported[selector.name]
            # A status is exported only once a response had it.
            wanted = Selector(selector.name, tuple(m for m in selector.matchers if m[0] != "status"))
            assert any(map(wanted.matches, samples)), f"{alert['alert']}: no sample of {selector}"
            for status in (value for label, _, value in selector.matchers if label == "status"):
                assert HTTPStatus(int(status))
                assert all("status" in labels for labels in samples)
        labels = {label for selector in named for sample in exported[selector.name] for label in sample}
        assert grouped_by(alert["expr"]) <= labels, alert["alert"]


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

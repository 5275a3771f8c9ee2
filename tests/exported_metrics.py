"""What a running server exports at /metrics, and which names of a PromQL expression are not among it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus

import httpx
from prometheus_client.parser import text_string_to_metric_families

from models.glm_image.model import GlmImage
from server.app import create_app
from server.settings import ServerSettings
from tests.checkpoints import small_engine
from tests.engine.test_worker import working
from tests.job_queue import JobQueue
from tests.waiting import until

Labels = dict[str, str]
Exported = dict[str, list[Labels]]
"""The labels of all samples by name."""

TARGET_LABELS = {"job", "instance", "namespace", "pod"}  # Prometheus adds them to what it scrapes


@dataclass(frozen=True)
class Selector:
    """`name{label="value", ...}` in an expression, without labels that Prometheus adds."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value

    def matches(self, labels: Labels) -> bool:
        """Compare; a status is exported only once a response had it."""
        return all(
            label in labels if label == "status" else _matches(labels.get(label, ""), operator, value)
            for label, operator, value in self.matchers
        )


def _matches(found: str, operator: str, value: str) -> bool:
    return found == value if operator == "=" else re.fullmatch(value, found) is not None


def selectors(expression: str) -> Iterator[Selector]:
    for name, braces in re.findall(r"\b(glimmer_\w+)(?:\{([^}]*)\})?", expression):
        matchers = re.findall(r'(\w+)(=~|=)"([^"]*)"', braces)
        yield Selector(name, tuple(found for found in matchers if found[0] not in TARGET_LABELS))


def unknown_metrics(expression: str, exported: Exported) -> Iterator[str]:
    """Yield what a PromQL expression names and no server exports."""
    named = list(selectors(expression))
    if not named:
        yield f"{expression} names no metric"
    for selector in named:
        if selector.name not in exported:
            yield f"there is no metric {selector.name}"
        elif not any(map(selector.matches, exported[selector.name])):
            yield f"no sample of {selector}"
        for status in (value for label, _, value in selector.matchers if label == "status"):
            HTTPStatus(int(status))
    known = {label for selector in named for sample in exported.get(selector.name, []) for label in sample}
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        if unknown := {label.strip() for label in labels.split(",")} - known - TARGET_LABELS:
            yield f"no sample has the labels {unknown}"


def parse(text: str) -> Exported:
    """Return the labels of all samples of a response to GET /metrics."""
    found: Exported = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


async def read_metrics(queue: JobQueue, model: GlmImage) -> str:
    """Return what an API with an engine exports that has generated an image."""
    settings = ServerSettings(prompt_rewriter="http://127.0.0.1:1/v1")  # type: ignore[call-arg]
    app = create_app(settings, queue)
    transport = httpx.ASGITransport(app)
    async with (
        working(queue, small_engine(model)) as worker,
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as client,
    ):
        await until(lambda: _has_heartbeat(queue))
        body = {"prompt": "x", "size": "64x64", "num_inference_steps": 1}
        response = await client.post("/v1/images/generations", json=body)
        assert response.status_code == 200
        await queue.heartbeat(worker._info, worker._engine.metrics.exposition(), 5)
        return (await client.get("/metrics")).text


async def _has_heartbeat(queue: JobQueue) -> bool:
    return bool(await queue.engines())

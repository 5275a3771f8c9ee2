"""/health, /live, /metrics, logs, OpenAPI, and what importing the API loads."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import httpx
import jsonschema
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.jobs.job import JobSpec
from engine.observability import logs
from server.admission import queue_state
from server.metrics import exposition
from server.middleware import _request_id
from tests.job_queue import JobQueue
from tests.jobs.helpers import claim, submit
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine

URL = "/v1/images/generations"


async def test_health_with_an_engine(client: httpx.AsyncClient, stub: StubEngine) -> None:
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "engines": [{"id": stub.info.id, "pid": stub.info.pid, "stage": "all", "state": "ready"}],
        "queue": {"waiting": 0, "running": 0},
    }


async def test_health_without_an_engine(client: httpx.AsyncClient) -> None:
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json() == {
        "status": "unavailable",
        "reason": "No engine is running.",
        "engines": [],
        "queue": {"waiting": 0, "running": 0},
    }
    assert (await client.get("/live")).json() == {"status": "ok"}


async def test_health_with_a_full_queue(
    make_client: MakeClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_state, "CACHE_TTL_S", 0.0)
    await queue.heartbeat(StubEngine(queue).info, "", 10)  # ready, but claims nothing
    async with make_client(max_queue=1) as client:
        assert (await client.get("/health")).status_code == 200
        await queue.submit(JobSpec("x", 64, 64, 1), job_id="a", timeout_s=9, priority="batch", max_queue=1)
        full = await client.get("/health")
        assert (full.status_code, full.json()["reason"]) == (503, "The queue is full.")
        assert full.json()["queue"] == {"waiting": 1, "running": 0}
        await queue.cancel("a")
        assert (await client.get("/health")).status_code == 200


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return all samples of an exposition, after checking that families and samples are unique."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    found = [(sample.name, frozenset(sample.labels.items()), sample.value) for f in families for sample in f.samples]
    assert len({sample[:2] for sample in found}) == len(found)
    return {(name, labels): value for name, labels, value in found}


def engine_text(steps: float) -> str:
    registry = CollectorRegistry()
    Counter("glimmer_steps", "Steps.", ("kind",), registry=registry).labels("render").inc(steps)
    Histogram("glimmer_step_seconds", "Time.", registry=registry).observe(0.1)
    return generate_latest(registry).decode()


async def test_metrics_are_one_valid_exposition(make_client: MakeClient, queue: JobQueue) -> None:
    async with StubEngine(queue, metrics=engine_text(7)), make_client() as client:
        await client.post(URL, json={"prompt": "x"})
        await client.post(URL, json={"prompt": ""})
        await client.get("/v1/models/a/b/c")
        await client.get("/nothing/here")
        await client.request("BREW", "/live")
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.text)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert value("glimmer_http_requests_total", route=URL, method="POST", status="200") == 1
    assert value("glimmer_http_requests_total", route=URL, method="POST", status="400") == 1
    assert value("glimmer_http_requests_total", route="/v1/models/{model:path}", method="GET", status="404") == 1
    assert value("glimmer_http_requests_total", route="unmatched", method="GET", status="404") == 1
    assert value("glimmer_http_requests_total", route="/live", method="other", status="405") == 1
    assert value("glimmer_http_request_seconds_count", route=URL, method="POST") == 2
    assert value("glimmer_api_jobs_total", state="succeeded") == 1
    assert value("glimmer_queue_jobs", state="waiting") == 0
    assert value("glimmer_redis_up") == 1
    assert value("glimmer_http_requests_in_flight") == 1  # this scrape
    assert value("glimmer_steps_total", kind="render", engine="stub-engine") == 7
    assert value("glimmer_step_seconds_count", engine="stub-engine") == 1


async def test_the_backlog_of_each_stage(client: httpx.AsyncClient, queue: JobQueue) -> None:
    """A job that runs counts, and one that was handed over counts for the other stage."""
    planner = JobQueue(queue.client, stage="plan")
    for _ in range(3):
        await submit(queue)
    await planner.hand_over("planner", await claim(planner, "planner"), {}, 3, [])
    await claim(planner, "planner")
    found = samples((await client.get("/metrics")).text)
    backlog = {stage: found["glimmer_stage_backlog", frozenset({("stage", stage)})] for stage in ("plan", "render")}
    assert backlog == {"plan": 2, "render": 1}


def test_engines_share_families_and_an_unreadable_one_is_skipped() -> None:
    own = CollectorRegistry()
    Counter("glimmer_steps", "Steps.", ("kind",), registry=own).labels("api").inc()
    other_type = CollectorRegistry()
    Gauge("glimmer_step_seconds", "Once a gauge.", registry=other_type).set(1)
    texts = {
        "a": engine_text(1),
        "b": engine_text(2),
        "old": generate_latest(other_type).decode(),
        "broken": "glimmer_steps_total{ 1 2 3",
    }
    text = exposition(own, texts).decode()
    found = samples(text)
    assert text.count("# TYPE glimmer_steps_total counter") == 1
    assert found["glimmer_steps_total", frozenset({("kind", "api")})] == 1
    for engine, steps in (("a", 1), ("b", 2)):
        assert found["glimmer_steps_total", frozenset({("kind", "render"), ("engine", engine)})] == steps
    assert not any(("engine", "old") in labels for _, labels in found)


async def test_no_prompt_and_no_image_in_the_logs(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "tell-no-one"
    fields = {"prompt": secret, "negative_prompt": secret, "user": secret, "safety_identifier": secret}
    response = await client.post(URL, json=fields, headers={"x-request-id": "request-7"})
    await client.post(URL, json={**fields, "n": secret})
    await client.post(URL, json={secret: secret})
    await client.get(f"/{secret}")
    queue.submit = _broken  # type: ignore[method-assign]
    assert (await client.post(URL, json=fields)).status_code == 500
    lines = [f"{record.getMessage()} {record.exc_text}" for record in caplog.records]
    glimmer = [record.getMessage() for record in caplog.records if record.name.startswith("glimmer")]
    assert not any(secret in line for line in lines if not line.startswith("HTTP Request:"))  # httpx logs the URL
    assert not any(response.json()["data"][0]["b64_json"][:40] in line for line in lines)
    assert any(
        re.match("request request=request-7 job=job_[0-9a-f]+ method=POST route=/v1/im", line) for line in glimmer
    )
    assert any(line.startswith("unhandled") and "error=RuntimeError" in line for line in glimmer)


async def _broken(spec: object, **_: object) -> None:
    raise RuntimeError(f"cannot submit {spec}")


class TestLogLines:
    def test_one_line_per_event(self) -> None:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            record = logging.LogRecord("x", logging.INFO, "", 0, "event %s", ("a\nb",), sys.exc_info())
        line = logs.LineFormatter().format(record)
        assert "\n" not in line
        assert "event a b" in line
        assert "ValueError" in line
        assert "lines" not in line  # an error's text may quote a prompt

    def test_json(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        logs.event(logging.getLogger("glimmer.t"), "went", logging.WARNING, ms=1.25, left_out=None, path=Path("/a b"))
        line = json.loads(logs.JsonFormatter().format(caplog.records[-1]))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert line == {"level": "warning", "logger": "glimmer.t", "event": "went", "ms": 1.25, "path": "/a b"}

    def test_json_of_other_loggers(self) -> None:
        try:
            raise ValueError("secret")
        except ValueError:
            record = logging.LogRecord("x", logging.ERROR, "", 0, "a\n%s", ("b",), sys.exc_info())
        line = json.loads(logs.JsonFormatter().format(record))
        assert (line["message"], line["error"]) == ("a\nb", "ValueError")
        assert line["where"].endswith(":test_json_of_other_loggers")
        assert "secret" not in str(line)

    async def test_bound_fields_are_in_the_lines_of_a_task_and_of_those_it_starts(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)

        async def tell(name: str) -> None:
            logs.event(logging.getLogger("t"), name, n=1)

        async def with_ids() -> None:
            logs.bind(request="r", job=None)
            logs.bind(job="j")
            await asyncio.gather(tell("inside"), asyncio.to_thread(asyncio.run, tell("in_thread")))

        await asyncio.create_task(with_ids())
        await tell("outside")
        lines = {record.getMessage() for record in caplog.records if record.name == "t"}
        assert lines == {"inside request=r job=j n=1", "in_thread request=r job=j n=1", "outside n=1"}

    def test_ambiguous_values_are_quoted(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        logs.event(logging.getLogger("t"), "went", id="a-1", reason='no "way" out', left_out=None, ms=1.25, empty="")
        assert caplog.records[-1].getMessage() == 'went id=a-1 reason="no \\"way\\" out" ms=1.2 empty=""'


def test_unsafe_request_ids_are_replaced() -> None:
    for sent in ("", "a b", "x" * 129, "a\nb", "é"):
        assert _request_id({"x-request-id": sent}).startswith("req_")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module",
    [
        "server.app",
        "server.cli.commands",
        "server.processes.launch",
        "engine.jobs.producer",
        "engine.jobs.consumer",
        "engine.config",
    ],
)
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_openapi_describes_the_request(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"][URL]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/GenerationRequest"
    statuses = {"200", "202", "400", "401", "404", "409", "413", "422", "429", "500", "503", "504"}
    assert set(operation["responses"]) == statuses
    assert {parameter["name"] for parameter in operation["parameters"]} == {"prefer", "idempotency-key"}
    schemas = document["components"]["schemas"]
    assert "PlanBody" in schemas
    assert schemas["GenerationRequest"]["properties"]["n"]["anyOf"][0] == {
        "maximum": 10,
        "minimum": 1,
        "type": "integer",
    }
    assert (await client.get("/docs")).status_code == 200


@pytest.mark.parametrize("key", [None, "k"])
async def test_openapi_has_security_only_with_keys(make_client: MakeClient, key: str | None) -> None:
    async with make_client(api_key=key) as client:
        document = (await client.get("/openapi.json")).json()
    paths = document["paths"]
    assert ("securitySchemes" in document["components"]) == (key is not None)
    asking = {
        path for path, operations in paths.items() for operation in operations.values() if "security" in operation
    }
    jobs = {"/v1/jobs/{job_id}", "/v1/jobs/{job_id}/events"}
    assert asking == ({URL, "/v1/images/edits", *jobs, "/v1/models", "/v1/models/{model}"} if key else set())


async def test_openapi_describes_both_bodies_of_an_edit(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operation, schemas = document["paths"]["/v1/images/edits"]["post"], document["components"]["schemas"]
    content = operation["requestBody"]["content"]
    assert {kind: described["schema"]["$ref"].rsplit("/", 1)[1] for kind, described in content.items()} == {
        "multipart/form-data": "EditForm",
        "application/json": "EditRequest",
    }
    form, json = schemas["EditForm"], schemas["EditRequest"]
    files = {"image", "images", "image[]", "mask"}
    assert set(json["properties"]) - files == set(schemas["GenerationRequest"]["properties"])
    assert set(form["properties"]) - files == set(schemas["GenerationRequest"]["properties"])
    assert form["properties"]["n"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 10,
        "default": 1,
        "title": "N",
        "description": "a number of images, 1..10",
    }
    encoded = {"prompt": "x", "image": ["data:image/png;base64,"], "mask": {"image_url": "data:,"}, "n": None}
    jsonschema.validate(encoded, {**json, "components": document["components"]})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**encoded, "image": 5}, {**json, "components": document["components"]})


async def test_openapi_has_no_validation_error_of_the_framework(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json")
    assert "ValidationError" not in response.text
    for path, operations in response.json()["paths"].items():
        for operation in operations.values():
            assert ("422" in operation["responses"]) == path.startswith("/v1/images/")


async def test_openapi_describes_health(client: httpx.AsyncClient, stub: StubEngine) -> None:
    document = (await client.get("/openapi.json")).json()
    health = document["paths"]["/health"]["get"]["responses"]
    for status in ("200", "503"):
        assert health[status]["content"]["application/json"]["schema"]["$ref"] == "#/components/schemas/HealthBody"
    schema = {"$ref": "#/components/schemas/HealthBody", "components": document["components"]}
    jsonschema.validate((await client.get("/health")).json(), schema)
    assert set(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}

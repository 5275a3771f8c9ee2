"""Each request is one trace with spans of the API and of the engines that worked on its job, as a collector gets it."""

import asyncio
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
import torch
from typer.testing import CliRunner

from engine.config import EXIT_CONFIGURATION, EngineSettings
from engine.engine import Engine
from engine.jobs.job import FreeCapacity, JobState, Origin
from engine.observability.tracing import Tracing, TracingError, open_tracing
from engine.stop_signals import StopSignals
from engine.worker import process
from models.glm_image.model import GlmImage
from server.app import create_app
from server.cli import commands as cli
from server.settings import ServerSettings
from tests.checkpoints import small_engine
from tests.collector import Collector, Received
from tests.engine.test_worker import SPEC, until_running, working
from tests.job_queue import JobQueue

URL = "/v1/images/generations"
SECRET = "tell-no-one"
BODY = {"prompt": f"a poster {SECRET}", "size": "64x64", "num_inference_steps": 3, "negative_prompt": SECRET}
TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CLIENT_SPAN}-01"
ORIGIN = Origin("req_1", TRACEPARENT)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


@pytest.fixture
async def tracing(collector: Collector) -> AsyncIterator[Tracing]:
    """Yield an engine's tracing."""
    tracing = open_tracing("glimmer-engine")
    yield tracing
    tracing.close()


@asynccontextmanager
async def serving(queue: JobQueue, engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    """Run an API and an engine; both have exported their spans at the end."""
    app, tracing = create_app(ServerSettings(), queue), open_tracing("glimmer-engine")
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        async with working(queue, engine, tracing):
            async with asyncio.timeout(20):
                while not await queue.engines():  # noqa: ASYNC110 (another task writes it to Redis)
                    await asyncio.sleep(0.02)
            yield client
        await asyncio.to_thread(tracing.close)


async def test_a_generation_is_one_trace_in_order(queue: JobQueue, model: GlmImage, collector: Collector) -> None:
    began = time.time_ns()
    async with serving(queue, small_engine(model)) as client:
        headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
        response = await client.post(URL, json={**BODY, "n": 2}, headers=headers)
        await client.get("/health")
    assert response.status_code == 200
    assert {span.trace for span in collector.spans} == {TRACE}
    [request], [queued], [run] = (collector.named(name) for name in (f"POST {URL}", "queue", "run"))
    assert (request.service, request.parent, request.is_of_request) == ("glimmer-api", CLIENT_SPAN, True)
    assert (queued.parent, run.parent) == (request.id, request.id)
    parts = [span for span in collector.spans if span.parent == run.id]
    assert Counter(span.name for span in parts) == {"plan": 2, "render": 2, "decode": 2, "encode": 2, "commit": 1}
    assert len(collector.spans) == 3 + len(parts)
    assert {span.service for span in (queued, run, *parts)} == {"glimmer-engine"}

    assert queued.ended == run.began
    [commit] = [span for span in parts if span.name == "commit"]
    for index in range(2):
        plan, render, decode, encode = (
            next(s for s in parts if s.name == name and s.attributes["glimmer.image_index"] == index)
            for name in ("plan", "render", "decode", "encode")
        )
        assert run.began < plan.began < plan.ended == render.began < render.ended == decode.began < decode.ended
        assert decode.ended < encode.began < encode.ended < commit.began
    assert commit.ended < run.ended
    assert all(began < span.began <= span.ended < time.time_ns() for span in (request, run))

    job_id = request.attributes["glimmer.job_id"]
    engine_id = run.attributes["glimmer.engine_id"]
    facts = {"images": 2, "width": 64, "height": 64, "steps": 3, "run": 1, "job_id": job_id, "engine_id": engine_id}
    for span in (queued, run, *parts):
        assert span.attributes.items() >= {f"glimmer.{key}": value for key, value in facts.items()}.items()
        assert span.error is None
    assert run.attributes["glimmer.state"] == "succeeded"
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": URL,
        "http.response.status_code": 200,
        "glimmer.request_id": "mine",
        "glimmer.job_id": job_id,
    }
    sent = b"".join(collector.bodies)
    assert job_id.encode() in sent  # searchable as it is
    assert SECRET.encode() not in sent


async def test_failed_requests_are_marked(
    queue: JobQueue, model: GlmImage, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send a request that the engine refuses and one that fails after planning."""
    engine = small_engine(model)

    def broken(image: object) -> None:
        raise torch.OutOfMemoryError(f"planted {SECRET}")

    monkeypatch.setattr(engine.renderer.runner, "prepare", broken)
    async with serving(queue, engine) as client:
        refused = await client.post(URL, json={**BODY, "prompt": f"<|image|> {SECRET}"})
        failed = await client.post(URL, json=BODY)
    assert (refused.status_code, failed.status_code) == (400, 500)
    requests, runs = collector.named(f"POST {URL}"), collector.named("run")
    assert [request.error for request in requests] == [None, "500"]
    assert requests[0].trace != requests[1].trace
    for response, request, run in zip((refused, failed), requests, runs, strict=True):
        error = response.json()["error"]
        assert run.parent == request.id
        assert request.parent == ""
        assert run.error == run.attributes["error.type"] == (error["code"] or error["type"])
        assert run.attributes["glimmer.state"] == "failed"
    assert [plan.trace for plan in collector.named("plan")] == [requests[1].trace]
    assert not collector.named("commit")
    assert SECRET.encode() not in b"".join(collector.bodies)


async def test_further_runs_are_in_the_same_trace(
    queue: JobQueue, model: GlmImage, collector: Collector, tracing: Tracing
) -> None:
    """Run a job of an engine that died, one that is cancelled, and one of an API without tracing."""
    options = {"timeout_s": 60, "priority": "interactive", "max_queue": 9}
    await queue.submit(SPEC, job_id="again", origin=ORIGIN, **options)
    claim = await queue.claim("first", FreeCapacity(8, 100_000, 0, True))
    assert claim is not None
    assert claim.origin == ORIGIN
    await queue.requeue_all("first")
    await queue.submit(SPEC, job_id="untraced", **options)
    await queue.client.hdel(f"{queue.prefix}:job:untraced", "origin")  # type: ignore[misc]
    async with working(queue, small_engine(model), tracing):
        assert (await queue.wait("again")).state is JobState.SUCCEEDED
        assert (await queue.wait("untraced")).state is JobState.SUCCEEDED
        long = replace(SPEC, num_inference_steps=200, width=256, height=256)
        await queue.submit(long, job_id="cancelled", origin=ORIGIN, **options)
        await until_running(queue, "cancelled")
        await queue.cancel("cancelled")
    await asyncio.to_thread(tracing.close)
    again, cancelled = collector.named("run")
    assert [(span.trace, span.parent) for span in (again, cancelled)] == 2 * [(TRACE, CLIENT_SPAN)]
    assert (again.attributes["glimmer.run"], again.attributes["glimmer.state"]) == (2, "succeeded")
    assert (cancelled.attributes["glimmer.run"], cancelled.attributes["glimmer.state"]) == (1, "lost")
    assert cancelled.error is None
    assert not [span for span in collector.spans if span.attributes["glimmer.job_id"] == "untraced"]


class TestSettings:
    def run(self, collector: Collector, traceparent: str = "") -> Received:
        tracing = open_tracing("glimmer-api")
        tracing.request("GET", traceparent).end()
        tracing.close()
        return collector.spans[-1]

    @pytest.mark.parametrize("sent", ["", "nonsense", f"00-{'0' * 32}-{CLIENT_SPAN}-01", f"00-{TRACE}-01"])
    def test_an_invalid_traceparent_starts_a_new_trace(self, collector: Collector, sent: str) -> None:
        span = self.run(collector, sent)
        assert span.parent == ""
        assert span.trace not in ("0" * 32, TRACE)

    @pytest.mark.parametrize(
        ("name", "value", "service"),
        [
            ("OTEL_SERVICE_NAME", "images", "images"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=images,a=b", "images"),
            ("OTEL_RESOURCE_ATTRIBUTES", "a=b", "glimmer-api"),
        ],
    )
    def test_the_service_name_can_be_set(
        self, collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str, service: str
    ) -> None:
        monkeypatch.setenv(name, value)
        assert self.run(collector).service == service

    @pytest.mark.parametrize(("flags", "sampler"), [("00", ""), ("", "always_off")])
    def test_an_unsampled_trace_is_not_exported_by_api_or_engine(
        self, collector: Collector, monkeypatch: pytest.MonkeyPatch, flags: str, sampler: str
    ) -> None:
        if sampler:
            monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        tracing = open_tracing("glimmer-api")
        span = tracing.request("GET", flags and f"00-{TRACE}-{CLIENT_SPAN}-{flags}")
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[02]", span.traceparent)  # the last bit means sampled
        span.child("plan", span.began)
        span.end()
        tracing.close()
        assert not collector.bodies

    @pytest.mark.parametrize("off", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
    def test_tracing_can_be_disabled(
        self, collector: Collector, monkeypatch: pytest.MonkeyPatch, off: dict[str, str]
    ) -> None:
        for name, value in off.items():
            monkeypatch.setenv(name, value)
        assert open_tracing("glimmer-api").request("GET", TRACEPARENT).traceparent == ""

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
            ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "localhost:4318", "http://localhost:4318"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "max_queue_size"),
        ],
    )
    def test_unsupported_settings_are_reported(
        self, collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(TracingError, match=re.escape(expected)):
            open_tracing("glimmer-api")

    def test_an_unreachable_collector_does_not_delay_shutdown(
        self, collector: Collector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Collector() as closed:
            pass
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", closed.url)
        monkeypatch.setattr("engine.observability.tracing.LAST_EXPORT_TIMEOUT_S", 0.2)
        tracing = open_tracing("glimmer-api")
        tracing.request("GET", "").end()
        began = time.monotonic()
        tracing.close()
        assert time.monotonic() - began < 5  # an export is retried for 10 s


def test_without_the_sdk_processes_do_not_start(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setattr(process, "configure", lambda *_: None)
    monkeypatch.setattr(cli.logs, "configure", lambda *_: None)
    assert process.main(EngineSettings(redis_url="redis://nowhere", engine_id="e"), StopSignals()) == EXIT_CONFIGURATION
    api = CliRunner().invoke(cli.app, ["api", "--redis-url", "redis://nowhere", "--port", "0"])
    assert api.exit_code == EXIT_CONFIGURATION
    for message in (capsys.readouterr().err, api.stderr):
        assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in message
        assert "pip install glimmer[otel]" in message


def test_the_sdk_is_imported_only_for_tracing() -> None:
    code = """
import sys
import engine.worker.worker, server.app
from engine.observability.tracing import open_tracing
from server.settings import ServerSettings
server.app.create_app(ServerSettings(redis_url="redis://nowhere"))
assert open_tracing("glimmer-engine").request("GET", "").traceparent == ""
loaded = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.proto.")
print(*(name for name in sys.modules if name.startswith(loaded)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "\n"), ended.stderr

"""The log lines and spans of requests to a running `glimmer serve`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import Collector
from tests.test_end_to_end import Server

URL = "/v1/images/generations"
SECRET = "tell-no-one"
FIELDS = {"size": "64x64", "num_inference_steps": 2, "negative_prompt": SECRET, "user": SECRET}


@dataclass(frozen=True)
class Run:
    """A server's output, its log lines, its spans, and its responses by request id."""

    printed: str
    lines: list[dict[str, Any]]
    collector: Collector
    responses: dict[str, httpx.Response]

    def lines_of(self, request: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("request") == request]


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Send an image request, one that the engine refuses and one that the API refuses, over one connection."""
    with Collector() as collector, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        flags = ("--model", str(checkpoint), "--log-format", "json", "--log-level", "debug")
        server = Server(tmp_path_factory.mktemp("serve"), *flags)
        bodies = {
            "made": {**FIELDS, "prompt": f"a poster {SECRET}"},
            "refused": {**FIELDS, "prompt": f"<|image|> {SECRET}"},
            "wrong": {**FIELDS, "prompt": SECRET, "n": SECRET, SECRET: SECRET},
        }
        with httpx.Client(base_url=server.url, timeout=60) as client:
            responses = {
                request: client.post(URL, json=body, headers={"x-request-id": request})
                for request, body in bodies.items()
            }
        assert server.stop() == 0, server.log.read_text()
        printed = server.log.read_text()
        lines = [json.loads(line) for line in printed.splitlines() if not line.startswith("Glimmer")]
        yield Run(printed, lines, collector, responses)


def test_a_request_s_lines_share_its_id_in_api_and_engine(run: Run) -> None:
    statuses = {request: response.status_code for request, response in run.responses.items()}
    assert statuses == {"made": 200, "refused": 400, "wrong": 400}
    for request, ended in (("made", "succeeded"), ("refused", "failed")):
        events = [(line["logger"], line["event"]) for line in run.lines_of(request)]
        assert sorted(events) == [
            ("glimmer.engine", "job_claimed"),
            ("glimmer.engine", "job_ended"),
            ("glimmer.http", "request"),
            ("glimmer.images", "job_accepted"),
        ]
        assert len({line["job"] for line in run.lines_of(request)}) == 1
        assert [line["state"] for line in run.lines_of(request) if line["event"] == "job_ended"] == [ended]
    [engine] = {line["engine"] for line in run.lines if line.get("event") == "engine_ready"}
    assert {line["engine"] for line in run.lines if line.get("event") == "job_claimed"} == {engine}


def test_a_rejected_request_has_no_job_id(run: Run) -> None:
    """Check that the id of an earlier request on the connection is not kept."""
    [line] = run.lines_of("wrong")
    assert (line["event"], line["status"], line.get("job")) == ("request", 400, None)


def test_lines_have_time_and_level(run: Run) -> None:
    for line in run.lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("debug", "info")


def test_no_line_has_a_prompt_or_image_data(run: Run) -> None:
    assert SECRET not in run.printed
    assert run.responses["made"].json()["data"][0]["b64_json"][:40] not in run.printed
    assert SECRET.encode() not in b"".join(run.collector.bodies)


def test_both_processes_add_to_the_same_trace(run: Run) -> None:
    [job] = {line["job"] for line in run.lines_of("made")}
    [trace] = {span.trace for span in run.collector.spans if span.attributes.get("glimmer.job_id") == job}
    spans = {(span.service, span.name) for span in run.collector.spans if span.trace == trace}
    names = ("queue", "run", "plan", "render", "decode", "encode", "commit")
    assert spans == {("glimmer-api", f"POST {URL}"), *(("glimmer-engine", name) for name in names)}

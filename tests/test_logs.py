"""What `glimmer serve` logs about requests, as a live run prints it: who can be followed, and what is in no line."""

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
    """All that a server printed, the lines of its log, its spans, and the answers by the ids of their requests."""

    printed: str
    lines: list[dict[str, Any]]
    collector: Collector
    answers: dict[str, httpx.Response]

    def of(self, request: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("request") == request]


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A picture, a prompt that the engine refuses, a body that the API refuses; one connection for all."""
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
            answers = {
                request: client.post(URL, json=body, headers={"x-request-id": request})
                for request, body in bodies.items()
            }
        assert server.stop() == 0, server.log.read_text()
        printed = server.log.read_text()
        lines = [json.loads(line) for line in printed.splitlines() if not line.startswith("Glimmer")]
        yield Run(printed, lines, collector, answers)


def test_a_request_is_followed_from_the_api_into_the_engine_and_back(run: Run) -> None:
    statuses = {request: answer.status_code for request, answer in run.answers.items()}
    assert statuses == {"made": 200, "refused": 400, "wrong": 400}
    for request, ended in (("made", "succeeded"), ("refused", "failed")):
        told = [(line["logger"], line["event"]) for line in run.of(request)]
        assert sorted(told) == [
            ("glimmer.engine", "job_claimed"),
            ("glimmer.engine", "job_ended"),
            ("glimmer.http", "request"),
            ("glimmer.images", "job_accepted"),
        ]
        assert len({line["job"] for line in run.of(request)}) == 1
        assert [line["state"] for line in run.of(request) if line["event"] == "job_ended"] == [ended]
    [engine] = {line["engine"] for line in run.lines if line.get("event") == "engine_ready"}
    assert {line["engine"] for line in run.lines if line.get("event") == "job_claimed"} == {engine}


def test_what_never_was_a_job_has_none(run: Run) -> None:
    """Though it came over the connection of the others."""
    [line] = run.of("wrong")
    assert (line["event"], line["status"], line.get("job")) == ("request", 400, None)


def test_lines_say_when_and_how_grave(run: Run) -> None:
    for line in run.lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("debug", "info")


def test_no_line_has_a_prompt_or_a_picture_in_it(run: Run) -> None:
    assert SECRET not in run.printed
    assert run.answers["made"].json()["data"][0]["b64_json"][:40] not in run.printed
    assert SECRET.encode() not in b"".join(run.collector.bodies)


def test_both_processes_tell_of_the_same_trace(run: Run) -> None:
    [job] = {line["job"] for line in run.of("made")}
    [trace] = {span.trace for span in run.collector.spans if span.attributes.get("glimmer.job_id") == job}
    told = {(span.service, span.name) for span in run.collector.spans if span.trace == trace}
    of_engine = {("glimmer-engine", name) for name in ("queue", "run", "plan", "render", "decode", "encode", "commit")}
    assert told == of_engine | {("glimmer-api", f"POST {URL}")}

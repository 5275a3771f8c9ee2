"""Generated requests from the OpenAPI document, valid and invalid: no 5xx, and no response outside of the document.

GLIMMER_FUZZ_CASES sets the number of cases per operation and kind.
"""

import asyncio
import os
import threading
from collections.abc import Iterator

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, strategies
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema
from schemathesis.transport.serialization import Binary

from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.image_files import file_of, patterned, plain
from tests.server.stub_engine import StubEngine

CASES = int(os.environ.get("GLIMMER_FUZZ_CASES", "300"))
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
OPERATIONS = [
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("GET", "/v1/jobs/{job_id}"),
    ("DELETE", "/v1/jobs/{job_id}"),
    ("GET", "/v1/jobs/{job_id}/events"),
    ("GET", "/v1/files/{name}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/live"),
    ("GET", "/metrics"),
]
WITHOUT_INPUT = {"/v1/models", "/health", "/live", "/metrics"}

# Random bytes are never an image.
FILES = [file_of(patterned()), file_of(plain(), "JPEG"), file_of(plain(64, 64, (0, 0, 0, 0), "RGBA")), b"none"]
schemathesis.openapi.format("binary", strategies.sampled_from(FILES).map(Binary))


@pytest.fixture(scope="module")
def url(redis_server: EmbeddedRedis) -> Iterator[str]:
    """Run a server with a stub engine in a thread and return its URL."""
    urls: list[str] = []
    started, stopped = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        redis = connect(redis_server.url)
        queue = JobQueue(redis, prefix="fuzz")
        async with StubEngine(queue):
            server = LiveServer(queue, ServerSettings(max_pixels=256 * 256))
            urls.append(server.url)
            started.set()
            await stopped.wait()
            await server.stop()
        await queue.close()
        await redis.aclose()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(60)
    yield urls[0]
    loops[0].call_soon_threadsafe(stopped.set)
    thread.join(60)


@pytest.fixture(scope="module")
def schema(url: str) -> OpenApiSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_is_tested(url: str) -> None:
    paths = requests.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    assert {(method.upper(), path) for path, found in paths.items() for method in found} == set(OPERATIONS)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(  # only bodies can be invalid: any path is valid
    ("method", "path", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [("POST", path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if method == "POST"],
)
def test_responses_follow_the_document(schema: OpenApiSchema, method: str, path: str, mode: GenerationMode) -> None:
    operation = schema[path][method]

    @hypothesis.settings(
        max_examples=1 if path in WITHOUT_INPUT else CASES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call()
        # A `timeout` of a nanosecond is valid.
        assert response.status_code < 500 or response.status_code == 504, response.text
        case.validate_response(response, checks=CHECKS)

    check()

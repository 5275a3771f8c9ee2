"""HTTP clients of other kinds: the JDK's and curl, which offer an upgrade to HTTP/2 over http://."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.client import JavaClient, serving
from tests.clients.forms import DOTNET, form
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import IMAGE

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
REQUEST = {"prompt": "größer 緑", "size": "160x96", "seed": 4}
CURL = ("--silent", "--show-error", "--http2", "--write-out", "\n%{http_code}\n")
HEADERS = ("--header", "Content-Type: application/json")


def image(body: bytes) -> bytes:
    return base64.b64decode(json.loads(body)["data"][0]["b64_json"])


async def run_curl(curl: str, *arguments: str) -> list[tuple[int, bytes]]:
    """Return status and body of each response."""
    process = await asyncio.create_subprocess_exec(
        curl, *CURL, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode == 0, errors
    lines = output.splitlines()
    return [(int(status), body) for body, status in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize("way", ["whole", "stream", "continue"])
async def test_java(java: JavaClient, live_server: LiveServer, stub: StubEngine, way: str) -> None:
    url = live_server.url
    status, body = await java.send("POST", url + GENERATIONS, json.dumps(REQUEST).encode(), way=way)
    assert (status, stub.specs[0].prompt) == (200, REQUEST["prompt"])
    assert image(body) == stub_image(stub.specs[0], 4)
    content_type, sent = form(DOTNET, {"prompt": "bluer", "seed": "4"}, ("image", "a.png", IMAGE))
    status, body = await java.send("POST", url + EDITS, sent, content_type, way=way)
    assert status == 200
    assert image(body) == stub_image(stub.specs[1], 4, stub.sources[1])


async def test_java_without_bodies(java: JavaClient, queue: JobQueue, stub: StubEngine) -> None:
    async with serving(queue, api_key="right") as server:
        for method in ("GET", "HEAD"):
            assert (await java.send(method, f"{server.url}/v1/models", key="right"))[0] == 200
        assert (await java.send("GET", f"{server.url}/v1/models", key="wrong"))[0] == 401
        asked = json.dumps({"prompt": "x", "stream": True}).encode()
        status, events = await java.send("POST", server.url + GENERATIONS, asked, key="right")
        assert (status, b"event: image_generation.completed" in events) == (200, True)
        status, body = await java.send("DELETE", f"{server.url}/v1/jobs/none", key="right")
        assert (status, json.loads(body)["error"]["code"]) == (404, "job_not_found")


@pytest.mark.parametrize("more", [(), ("--header", "Transfer-Encoding: chunked"), ("--header", "Expect: 100-continue")])
async def test_curl(
    curl: str, live_server: LiveServer, stub: StubEngine, tmp_path: Path, more: tuple[str, ...]
) -> None:
    data: tuple[Any, ...] = (*HEADERS, "--data-binary", json.dumps(REQUEST))
    [(status, body)] = await run_curl(curl, live_server.url + GENERATIONS, *data, *more)
    assert status == 200
    assert image(body) == stub_image(stub.specs[0], 4)
    file = tmp_path / 'we"ird; ü.png'
    file.write_bytes(IMAGE)
    path = str(file).replace('"', '\\"')
    fields = ("--form-string", "prompt=@bluer", "--form", "seed=4", "--form", f'image[]=@"{path}";type=image/png')
    [(status, body)] = await run_curl(curl, live_server.url + EDITS, *fields, *more)
    assert (status, stub.specs[1].prompt) == (200, "@bluer")
    assert image(body) == stub_image(stub.specs[1], 4, stub.sources[1])


async def test_curl_that_keeps_its_connection(curl: str, live_server: LiveServer, stub: StubEngine) -> None:
    arguments = (live_server.url + GENERATIONS, *HEADERS, "--data-binary", json.dumps(REQUEST))
    connections = ("--write-out", "\n%{num_connects}\n")  # made for a request
    answers = await run_curl(curl, *arguments, "--next", *CURL, *arguments, *connections)
    assert [image(body) for _, body in answers] == [stub_image(spec, 4) for spec in stub.specs]
    assert [number for number, _ in answers] == [200, 0]

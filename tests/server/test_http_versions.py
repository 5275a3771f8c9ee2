"""What differs by HTTP version, method, trailing slash and address family, over all routes."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi.routing import APIRoute

from server.processes.serving import url_of
from server.routes import files, health, images, jobs, models, pages
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine
from tests.server.test_jobs_api import submitted
from tests.server.wire import serve

ROUTES = [
    route
    for module in (images, jobs, files, models, health, pages)
    for route in module.router.routes
    if isinstance(route, APIRoute)
]
READ = sorted({route.path for route in ROUTES if "GET" in (route.methods or ())} | {"/v1/nothing", "/v1/jobs/none"})
WRITTEN = sorted({route.path for route in ROUTES if "POST" in (route.methods or ())})
VARYING = {"x-request-id", "openai-processing-ms", "date", "content-length"}  # `/metrics` grows


@pytest.fixture
async def paths(live_server: LiveServer, stub: StubEngine) -> dict[str, str]:
    """Return values of the parameters of paths: of a job that has succeeded, with an image by URL."""
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        job_id = await submitted(client, response_format="url", num_inference_steps=1)
        events = await client.get(f"/v1/jobs/{job_id}/events")
        name = events.text.partition("/v1/files/")[2].partition('"')[0]
    return {"job_id": job_id, "name": name, "model:path": "zai-org/GLM-Image"}


def filled(path: str, values: dict[str, str]) -> str:
    values = {**values, "name": "app.js"} if path.startswith("/playground") else values
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value)
    return path


@pytest.mark.parametrize("path", READ)
async def test_head_is_get_without_a_body(live_server: LiveServer, paths: dict[str, str], path: str) -> None:
    async with httpx.AsyncClient(base_url=live_server.url, timeout=20) as client:
        got, head = await client.get(filled(path, paths)), await client.head(filled(path, paths))
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert got.status_code == (404 if "no" in path else 200)
        assert {name: value for name, value in head.headers.items() if name not in VARYING} == {
            name: value for name, value in got.headers.items() if name not in {*VARYING, "transfer-encoding"}
        }
        assert ("content-length" in head.headers) == ("content-length" in got.headers)
        if path != "/metrics":
            assert head.headers.get("content-length") == got.headers.get("content-length")
        again = await client.get("/live")  # on the same connection
        assert again.status_code == 200


@pytest.mark.parametrize("path", [path for path in READ if path != "/"])
async def test_a_trailing_slash_changes_nothing(live_server: LiveServer, paths: dict[str, str], path: str) -> None:
    async with httpx.AsyncClient(base_url=live_server.url, timeout=20) as client:
        plain, slashed = [await client.get(filled(path, paths) + more) for more in ("", "/")]
        assert slashed.status_code == plain.status_code
        assert path in ("/metrics", "/v1/nothing") or slashed.content == plain.content


@pytest.mark.parametrize("path", WRITTEN)
async def test_a_trailing_slash_keeps_the_body(live_server: LiveServer, path: str) -> None:
    async with httpx.AsyncClient(base_url=live_server.url, timeout=20) as client:
        response = await client.post(path + "/", json={"prompt": 1})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", WRITTEN)
async def test_other_methods_are_a_405(live_server: LiveServer, method: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=live_server.url, timeout=20) as client:
        response = await client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", READ)
async def test_http_1_0_gets_no_chunks(live_server: LiveServer, paths: dict[str, str], path: str) -> None:
    """What has no length ends with the connection."""
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        expected = await client.get(filled(path, paths))
    reader, writer = await asyncio.open_connection(*live_server.address)
    writer.write(f"GET {filled(path, paths)} HTTP/1.0\r\n\r\n".encode())  # and no Host
    async with asyncio.timeout(20):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert int(head.split()[1]) == expected.status_code
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert path in ("/metrics", "/health") or "/files/" in path or len(body) == len(expected.content)


@pytest.mark.parametrize("path", [b"/live", b"/events"])
async def test_http_1_0_is_kept_alive_on_request_where_the_length_is_known(path: bytes) -> None:
    async with serve() as server, server.connect() as wire:
        for _ in range(2):
            wire.send(b"GET /live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            response = await wire.response()
            assert (response.status, response.headers["connection"]) == (200, "keep-alive")
        wire.send(b"GET %s HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" % path)
        response = await wire.response()
        assert response.headers["connection"] == ("close" if path == b"/events" else "keep-alive")
        if path == b"/events":
            assert await wire.reader.read() == b"onetwo"


async def test_http_1_0_gets_no_100_continue() -> None:
    async with serve() as server, server.connect() as wire:
        wire.send(b"POST /echo HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}")
        response = await wire.response()
        assert (response.status, response.json["body"]) == (200, "{}")


# --- addresses --------------------------------------------------------------------------------------------------------

HOSTS = {
    "::": ["127.0.0.1", "::1"],
    "[::]": ["127.0.0.1", "::1"],
    "0:0::0": ["127.0.0.1", "::1"],
    "::1": ["::1"],
    "0.0.0.0": ["127.0.0.1"],
    "127.0.0.1": ["127.0.0.1"],
}


@asynccontextmanager
async def listening(queue: JobQueue, host: str) -> AsyncIterator[socket.socket]:
    server = LiveServer(queue, ServerSettings(), host)
    try:
        yield server.listener
    finally:
        await server.stop()


@pytest.mark.parametrize("host", HOSTS)
async def test_who_is_served_at_an_address(queue: JobQueue, host: str) -> None:
    """And is known by the address of its own version: `/health` shows pids to this machine only."""
    async with StubEngine(queue), listening(queue, host) as listener, httpx.AsyncClient(timeout=20) as client:
        assert (await client.get(f"{url_of(listener)}/live")).status_code == 200
        for address in ("127.0.0.1", "::1"):
            try:
                url = f"http://{f'[{address}]' if ':' in address else address}:{listener.getsockname()[1]}"
                response = await client.get(f"{url}/health")
            except httpx.ConnectError:
                assert address not in HOSTS[host]
            else:
                assert address in HOSTS[host]
                assert response.json()["engines"][0]["pid"]

"""LangChain's image tools for OpenAI's API, in Python and in JavaScript."""

import base64

import httpx
import pytest

from tests.clients.client import ClientProcess, Raised, serving
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image

URLS = {"default_response_format": "url", "served_model_name": "glm-image,dall-e-2,dall-e-3"}


async def fetched(urls: str) -> list[bytes]:
    async with httpx.AsyncClient() as browser:
        return [(await browser.get(url)).content for url in urls.split("\n")]


async def test_python(langchain_python: ClientProcess, queue: JobQueue, stub: StubEngine) -> None:
    """The tool reads URLs and cannot ask for them, so the server has to give them by default."""
    async with serving(queue, **URLS) as server:
        urls = await langchain_python.call(server, "run", "a fox", n=2, size="160x96", quality="hd")
        [spec] = stub.specs
        assert (spec.width, spec.height, spec.n, spec.model) == (160, 96, 2, "dall-e-2")
        assert await fetched(urls) == [stub_image(spec, spec.seed + index) for index in (0, 1)]


async def test_node(langchain_node: ClientProcess, queue: JobQueue, stub: StubEngine) -> None:
    async with serving(queue, **URLS) as server:
        url = await langchain_node.call(server, "invoke", "a fox", user="me")
        [spec] = stub.specs
        assert (spec.width, spec.height, spec.model) == (1024, 1024, "dall-e-3")
        assert await fetched(url) == [stub_image(spec, spec.seed)]


async def test_node_with_images_in_the_response(
    langchain_node: ClientProcess, live_server: LiveServer, stub: StubEngine
) -> None:
    fields = {"model": "glm-image", "size": "160x96", "dallEResponseFormat": "b64_json"}
    image = await langchain_node.call(live_server, "invoke", "a fox", **fields)
    assert base64.b64decode(image) == stub_image(stub.specs[0], stub.specs[0].seed)
    several = await langchain_node.call(live_server, "invoke", "a fox", n=2, **fields)
    assert len(several) == 2
    assert len(stub.specs) == 3


async def test_errors(
    langchain_python: ClientProcess, langchain_node: ClientProcess, queue: JobQueue, stub: StubEngine
) -> None:
    async with serving(queue, api_key="right", **URLS) as server:
        with pytest.raises(Raised, match="The API key is not valid here") as python:
            await langchain_python.call(server, "run", "a fox", key="wrong")
        with pytest.raises(Raised, match=r"64\.\.2048 pixels") as node:
            await langchain_node.call(server, "invoke", "a fox", key="right", size="63x64")
    assert (python.value["status_code"], node.value["status"], node.value["param"]) == (401, 400, "size")

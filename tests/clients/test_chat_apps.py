"""The requests of chat applications: Open WebUI's, with aiohttp as it sends them, and LibreChat's (`librechat.mjs`)."""

import base64
import io
from typing import Any

import aiohttp
import httpx
import pytest

from tests.clients.client import ClientProcess, serving
from tests.job_queue import JobQueue
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import IMAGE

NAMES = "glm-image,gpt-image-1,dall-e-2,dall-e-3"
USER = {"X-OpenWebUI-User-Name": "J%C3%B6rg", "X-OpenWebUI-User-Id": "1", "X-OpenWebUI-User-Role": "user"}


def images(response: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(image["b64_json"]) for image in response["data"]]


async def open_webui(url: str, path: str, fields: dict[str, Any], files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Send the request of Open WebUI's engine "openai": JSON, or with files a form."""
    headers = {"Authorization": "Bearer right", **USER}
    body: dict[str, Any] = {"json": fields, "headers": {**headers, "Content-Type": "application/json"}}
    if files:
        form = aiohttp.FormData()
        for name, value in fields.items():
            form.add_field(name, str(value))
        for name, data in files:
            form.add_field(name, io.BytesIO(data), filename="0e0c.png", content_type="image/png")
        body = {"data": form, "headers": headers}
    async with aiohttp.ClientSession(trust_env=True) as session, session.post(f"{url}/v1{path}", **body) as response:
        assert response.status == 200, await response.text()
        return await response.json(content_type=None)


@pytest.mark.parametrize("query", ["", "?api-version=2025-04-01-preview"])
async def test_open_webui(queue: JobQueue, stub: StubEngine, query: str) -> None:
    async with serving(queue, served_model_name=NAMES, api_key="right") as server:
        asked: dict[str, Any] = {"model": "dall-e-2", "prompt": "a fox", "n": 2, "size": "512x512"}
        response = await open_webui(
            server.url, f"/images/generations{query}", {**asked, "response_format": "b64_json"}, []
        )
        assert images(response) == [stub_image(stub.specs[0], stub.specs[0].seed + index) for index in (0, 1)]
        assert not any(image.get("url") for image in response["data"])  # it would prefer one
        # Without a response format, and with an administrator's parameters.
        asked |= {"model": "gpt-image-1", "n": 1, "size": "auto", "quality": "medium", "moderation": "low"}
        response = await open_webui(server.url, f"/images/generations{query}", asked, [])
        assert images(response) == [stub_image(stub.specs[1], stub.specs[1].seed)]


@pytest.mark.parametrize("names", [["image"], ["image[]"], ["image[]", "image[]"]])
async def test_edits_of_open_webui(queue: JobQueue, stub: StubEngine, names: list[str]) -> None:
    async with serving(queue, served_model_name=NAMES, api_key="right") as server:
        fields = {"model": "gpt-image-1", "prompt": "bluer", "n": 1, "size": "512x512", "background": "auto"}
        response = await open_webui(
            server.url,
            "/images/edits?api-version=2025-04-01-preview",
            {**fields, "response_format": "b64_json"},
            [(name, IMAGE) for name in names],
        )
    [spec] = stub.specs
    assert (spec.num_sources, spec.width, spec.model) == (len(names), 512, "gpt-image-1")
    assert images(response) == [stub_image(spec, spec.seed, stub.sources[0])]


async def test_librechat(librechat: ClientProcess, queue: JobQueue, stub: StubEngine) -> None:
    async with serving(queue, served_model_name=NAMES, api_key="right") as server:
        auto = {"background": "auto", "quality": "auto", "size": "auto"}
        fields = {"model": "gpt-image-1", "prompt": "a fox", "n": 1, "output_format": "webp", "output_compression": 100}
        response = await librechat.call(server, "generate", key="right", **fields, **auto)
        assert images(response) == [stub_image(stub.specs[0], stub.specs[0].seed)]
        edit = {"model": "gpt-image-1", "prompt": "bluer", "quality": "auto", "size": "auto"}
        response = await librechat.call(server, "edit", key="right", **edit, images=[IMAGE, IMAGE])
        assert images(response) == [stub_image(stub.specs[1], stub.specs[1].seed, stub.sources[1])]
        assert stub.specs[1].num_sources == 2


async def test_librechats_dall_e_tool(librechat: ClientProcess, queue: JobQueue, stub: StubEngine) -> None:
    """It reads a URL and does not ask for one; the name of the file comes from it."""
    fields = {"model": "dall-e-3", "quality": "hd", "style": "vivid", "size": "1024x1792", "prompt": "a fox", "n": 1}
    async with serving(queue, served_model_name=NAMES, api_key="right", default_response_format="url") as server:
        response = await librechat.call(server, "generate", key="right", **fields)
        url = response["data"][0]["url"]
        assert httpx.URL(url).path.endswith(".png")
        async with httpx.AsyncClient() as browser:
            assert (await browser.get(url)).content == stub_image(stub.specs[0], stub.specs[0].seed)
    assert (stub.specs[0].width, stub.specs[0].height) == (1024, 1792)

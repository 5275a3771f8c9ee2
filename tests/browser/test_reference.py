"""The API reference in a browser. `open_page` checks that no other server is used and the policy blocks nothing."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from playwright.async_api import Browser, Locator, Page, expect
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import ServerSettings
from tests import source_images
from tests.browser.conftest import open_page
from tests.browser.test_playground import VIEWPORTS
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine, stub_image
from tests.server.test_edits import data_url

GENERATE, EDIT, MODELS = "POST /v1/images/generations", "POST /v1/images/edits", "GET /v1/models"
PREFIX = "/images/glimmer"


async def openapi_document(server: LiveServer) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{server.url}/openapi.json")).json()


async def opened(page: Page, name: str) -> Locator:
    """Return a route by method and path, after a click on it."""
    method, path = name.split()
    block = page.locator(f".opblock-{method.lower()}", has=page.locator(f"[data-path='{path}']"))
    await block.locator(".opblock-summary-control").click()
    return block


async def execute(block: Locator, status: int) -> Locator:
    """Send the request; return the response once it has the status."""
    clear = block.get_by_role("button", name="Clear")
    if await clear.count():
        await clear.click()
    await block.get_by_role("button", name="Execute").click()
    response = block.locator(".live-responses-table .response")
    await expect(response.locator(".response-col_status")).to_contain_text(str(status))
    return response


async def body_of(response: Locator) -> dict[str, Any]:
    return json.loads(await response.locator(".response-col_description pre").first.inner_text())


@pytest.mark.parametrize("device", VIEWPORTS)
async def test_the_page_shows_the_whole_document(
    browser: Browser, live_server: LiveServer, device: str, tmp_path: Path
) -> None:
    document = await openapi_document(live_server)
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    viewport: Any = VIEWPORTS[device]
    async with open_page(browser, live_server.url, "/docs", viewport=viewport, color_scheme="dark") as page:
        await expect(page.locator(".opblock")).to_have_count(len(routes))
        paths = await page.locator(".opblock-summary-path").evaluate_all("all => all.map((one) => one.dataset.path)")
        methods = await page.locator(".opblock-summary-method").all_text_contents()
        assert sorted(f"{method} {path}" for method, path in zip(methods, paths, strict=True)) == sorted(routes)
        for name in document["components"]["schemas"]:
            await expect(page.locator(".models").get_by_text(name, exact=True)).to_have_count(1)
        await page.screenshot(path=tmp_path / "docs.png", full_page=True)
        assert await page.evaluate("document.scrollingElement.scrollWidth") <= viewport["width"]
        await page.get_by_role("link", name="Playground").click()
        await expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


async def test_the_example_creates_an_image(browser: Browser, queue: JobQueue, live_server: LiveServer) -> None:
    async with StubEngine(queue) as stub, open_page(browser, live_server.url, "/docs") as page:
        body = await body_of(await execute(await opened(page, GENERATE), 200))
        [spec] = stub.specs
        assert (spec.width, spec.height, spec.seed) == (256, 256, 1)
        assert data_url(stub_image(spec, 1)).endswith(f",{body['data'][0]['b64_json']}")


async def test_an_edit_with_files(browser: Browser, queue: JobQueue, live_server: LiveServer, tmp_path: Path) -> None:
    image = tmp_path / "source.png"
    image.write_bytes(source_images.png(source_images.source_image(1, 64, 64)))
    async with StubEngine(queue) as stub, open_page(browser, live_server.url, "/docs") as page:
        block = await opened(page, EDIT)
        fields = block.locator("tr.parameters")
        await fields.filter(has_text="a PNG, JPEG or WEBP file").locator("input").set_input_files(image)
        await execute(block, 200)
        several = fields.filter(has_text="such files")
        await several.get_by_role("button", name="Add string item").click()
        await several.locator("input").set_input_files(image)
        await fields.filter(has_text="a number of images").locator("input").fill("2")
        await execute(block, 200)
        asked = [(spec.prompt, spec.seed, spec.n, spec.num_sources) for spec in stub.specs]
        assert asked == [("make the background green", 1, 1, 1), ("make the background green", 1, 2, 2)]


async def test_an_image_by_its_url(browser: Browser, queue: JobQueue, live_server: LiveServer) -> None:
    async with StubEngine(queue), open_page(browser, live_server.url, "/docs") as page:
        async with httpx.AsyncClient(base_url=live_server.url) as client:
            asked = {"prompt": "a fox", "size": "160x96", "response_format": "url"}
            response = await client.post("/v1/images/generations", json=asked)
        block = await opened(page, "GET /v1/files/{name}")
        await block.get_by_placeholder("name").fill(response.json()["data"][0]["url"].rpartition("/")[2])
        image = (await execute(block, 200)).locator("img")
        await expect(image).to_be_visible()
        assert await image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 160


async def test_a_server_with_keys_requires_one(browser: Browser, queue: JobQueue) -> None:
    server = LiveServer(queue, ServerSettings(api_key="right"))  # type: ignore[call-arg]
    async with open_page(browser, server.url, "/docs") as page:
        block = await opened(page, MODELS)
        await execute(block, 401)
        await page.locator(".auth-wrapper > .authorize").click()
        await page.get_by_label("auth-bearer-value").fill("right")
        await page.get_by_role("button", name="Apply credentials").click()
        await page.get_by_role("button", name="Close").click()
        body = await body_of(await execute(block, 200))
        assert body["object"] == "list"
        assert await page.evaluate("[...Object.keys(localStorage), ...Object.keys(sessionStorage)]") == []
    await server.stop()


async def test_behind_a_proxy_in_a_folder(browser: Browser, queue: JobQueue) -> None:
    """The page sends requests to where it was loaded from, and the checks of the origin accept them."""
    server = LiveServer(queue, ServerSettings(public_url=f"https://images.example.org{PREFIX}"))  # type: ignore[call-arg]
    server.server.config.app = _without_prefix(server.server.config.app)  # type: ignore[arg-type]
    async with StubEngine(queue) as stub, open_page(browser, server.url + PREFIX, "/docs") as page:
        await execute(await opened(page, GENERATE), 200)
        assert len(stub.specs) == 1
    await server.stop()


async def test_no_key_to_enter_without_keys(browser: Browser, live_server: LiveServer) -> None:
    async with open_page(browser, live_server.url, "/docs") as page:
        await opened(page, GENERATE)
        await expect(page.locator(".authorize")).to_have_count(0)


def _without_prefix(app: FastAPI) -> ASGIApp:
    """Return the app behind a proxy that serves it under `PREFIX` and nothing else."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{PREFIX}/"), scope["path"]
            scope = {**scope, "path": scope["path"].removeprefix(PREFIX)}
        await app(scope, receive, send)

    return proxy

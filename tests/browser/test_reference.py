"""The API reference in a browser. `open_page` checks that no other server is used."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from server.settings import ServerSettings
from tests import source_images
from tests.browser.conftest import open_page
from tests.browser.test_playground import VIEWPORTS, run_curl, run_python
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine

# The fields in the table below an object's heading.
FIELDS = """
(name) => [...document.getElementById(name).nextElementSibling.querySelectorAll("td:first-child > code")]
  .map((cell) => cell.textContent)
"""

LOST_LINKS = """
() => [...document.querySelectorAll('a[href^="#"]')]
  .map((link) => decodeURIComponent(link.getAttribute("href").slice(1)))
  .filter((id) => !document.getElementById(id))
"""


async def openapi_document(server: LiveServer) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{server.url}/openapi.json")).json()


def route(page: Page, name: str) -> Locator:
    return page.locator(f"[id='{name}']")


@pytest.mark.parametrize("device", VIEWPORTS)
async def test_the_page_shows_the_whole_document(browser: Browser, live_server: LiveServer, device: str) -> None:
    document = await openapi_document(live_server)
    routes = [f"{method.upper()}{path}" for path, methods in document["paths"].items() for method in methods]
    async with open_page(browser, live_server.url, "/docs", viewport=VIEWPORTS[device]) as page:
        await expect(page.locator("#routes > section")).to_have_count(len(routes))
        assert await page.locator("#routes h2").all_text_contents() == routes
        assert await page.locator("#contents a").all_text_contents() == routes
        for name, schema in document["components"]["schemas"].items():
            assert await page.evaluate(FIELDS, name) == list(schema.get("properties", {})), name
        assert await page.evaluate(LOST_LINKS) == []
        statuses = route(page, "post/v1/images/generations").locator("tr", has=page.get_by_text("The queue is full"))
        assert (await statuses.text_content() or "").startswith("429")
        assert await page.evaluate("document.scrollingElement.scrollWidth") <= VIEWPORTS[device]["width"]


async def test_a_link_opens_its_target(browser: Browser, live_server: LiveServer) -> None:
    async with open_page(browser, live_server.url, "/docs#EditRequest") as page:
        await expect(page.locator("#EditRequest")).to_be_in_viewport()
        await page.locator("#contents a").last.click()
        await expect(route(page, "get/metrics")).to_be_in_viewport()
        await route(page, "post/v1/images/generations").locator("summary").first.click()
        await expect(page.locator("#GenerationRequest")).to_be_hidden()
        await page.evaluate("location.hash = 'GenerationRequest'")
        await expect(page.locator("#GenerationRequest")).to_be_in_viewport()


@pytest.mark.parametrize("name", ["post/v1/images/generations", "post/v1/images/edits"])
async def test_the_examples_create_images(
    browser: Browser, queue: JobQueue, live_server: LiveServer, tmp_path: Path, name: str
) -> None:
    (tmp_path / "source-1.png").write_bytes(source_images.png(source_images.source_image(1, 64, 64)))
    async with StubEngine(queue) as stub, open_page(browser, live_server.url, "/docs") as page:
        examples = route(page, name).locator("pre")
        await expect(examples).to_have_count(2)
        curl, python = await examples.all_text_contents()
        await run_curl(curl, tmp_path)
        await run_python(python, tmp_path)
        assert (tmp_path / "image-1.png").exists()
        assert stub.specs[0] == stub.specs[1]


@pytest.mark.parametrize("key", [None, "right"])
async def test_the_key_is_mentioned_only_if_required(browser: Browser, queue: JobQueue, key: str | None) -> None:
    server = LiveServer(queue, ServerSettings(api_key=key))  # type: ignore[arg-type]
    async with open_page(browser, server.url, "/docs") as page:
        models = route(page, "get/v1/models")
        await expect(models).to_be_visible()
        assert await models.get_by_text("Requires a key").count() == (0 if key is None else 1)
        code = await route(page, "post/v1/images/edits").locator("pre").first.text_content() or ""
        assert ("Authorization: Bearer" in code) == (key is not None)
    await server.stop()

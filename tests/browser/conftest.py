"""The pages in a headless Chromium, from a live server with a stub engine."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.conftest import _no_settings_from_outside as _no_settings_from_outside

NAMES = ("chromium", "chromium-browser", "google-chrome")  # as in `make browser`
ARGUMENTS = (
    "--no-sandbox",  # a container may not create one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_MS = 60_000

expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("Chromium is missing: run `make browser`")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, timeout=TIMEOUT_MS)
        yield browser
        await browser.close()


@pytest.fixture
async def live_server(queue: JobQueue) -> AsyncIterator[LiveServer]:
    server = LiveServer(queue, ServerSettings())  # type: ignore[call-arg]
    yield server
    await server.stop()


@asynccontextmanager
async def open_page(browser: Browser, url: str, path: str = "", **options: Any) -> AsyncIterator[Page]:
    """Open a page in its own profile; at the end, check that nothing failed and no other server was used.

    Args:
        url: of the server.
        path: of the page; by default the playground.
        options: of the profile: `viewport`, `color_scheme`, ...
    """
    context = await browser.new_context(**options)
    page = await context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(f"{error.name}: {error.message}"))
    page.on("console", lambda message: failures.append(message.text) if is_failure(message) else None)
    page.on("request", lambda request: None if is_same_server(request.url, url) else failures.append(request.url))
    await page.goto(url + path)
    yield page
    await context.close()
    assert failures == []


def is_failure(message: ConsoleMessage) -> bool:
    """Return whether a console message is a failure.

    The 4xx responses that some tests expect are not, nor that Swagger UI has no field of its own for a list of files.
    """
    expected = ("Failed to load resource", "Could not find component: JsonSchema_string_binary")
    return message.type in ("error", "warning") and not message.text.startswith(expected)


def is_same_server(address: str, url: str) -> bool:
    return address.removeprefix("blob:").startswith(url)


@pytest.fixture
async def page(browser: Browser, live_server: LiveServer) -> AsyncIterator[Page]:
    async with open_page(browser, live_server.url) as page:
        yield page

"""Our pages in a real Chromium, headless, before a live server with a stub engine behind it."""

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

NAMES = ("chromium", "chromium-browser", "google-chrome")  # as `make browser` looks for them
ARGUMENTS = (
    "--no-sandbox",  # a container has no rights to make one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 60_000

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium: `make browser` installs it, or says what to install")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=ARGUMENTS, timeout=PATIENCE_MS)
        yield browser
        await browser.close()


@pytest.fixture
async def live_server(queue: JobQueue) -> AsyncIterator[LiveServer]:
    server = LiveServer(queue, ServerSettings())  # type: ignore[call-arg]
    yield server
    await server.stop()


@asynccontextmanager
async def open_page(browser: Browser, url: str, path: str = "", **options: Any) -> AsyncIterator[Page]:
    """A page of the server at `url` in a profile of its own; at the end nothing may have failed in it, nor been asked
    of others.

    Args:
        path: of the page; the playground's by default.
        options: of the profile: `viewport`, `color_scheme`, ...
    """
    context = await browser.new_context(**options)
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(f"{error.name}: {error.message}"))
    page.on("console", lambda message: failures.append(message.text) if is_failure(message) else None)
    page.on("request", lambda request: None if is_own(request.url, url) else failures.append(request.url))
    await page.goto(url + path)
    yield page
    await context.close()
    assert failures == []


def is_failure(message: ConsoleMessage) -> bool:
    """Answers of 4xx are what some tests are about; the console names those as well."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def is_own(address: str, url: str) -> bool:
    return address.removeprefix("blob:").startswith(url)


@pytest.fixture
async def page(browser: Browser, live_server: LiveServer) -> AsyncIterator[Page]:
    async with open_page(browser, live_server.url) as page:
        yield page

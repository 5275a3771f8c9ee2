"""The API with a real Redis and a stub engine."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from server import redis_timeout
from server.admission import keys
from server.app import create_app
from server.processes.serving import DrainingServer, listen, url_of
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.stub_engine import StubEngine

MakeClient = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GLIMMER_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_wait_for_key_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "START_LOOKS", 0)


@pytest.fixture(autouse=True)
def _time_for_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 20.0)


@pytest.fixture
async def stub(queue: JobQueue) -> AsyncIterator[StubEngine]:
    async with StubEngine(queue) as engine:
        yield engine


@pytest.fixture
def make_client(queue: JobQueue) -> MakeClient:
    """Return a factory of clients for an app with the given settings, without a socket."""

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(ServerSettings(**settings), queue)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as c:
            yield c

    return make


@pytest.fixture
async def client(make_client: MakeClient) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client() as client:
        yield client


class LiveServer:
    """The app behind a real socket, as `glimmer api` runs it."""

    def __init__(self, queue: JobQueue, settings: ServerSettings, host: str = "127.0.0.1"):
        self.listener = listener = listen(host, 0)
        self.url, self.address = url_of(listener), listener.getsockname()
        self.server = DrainingServer(create_app(settings, queue), settings.grace_s, settings.drain_delay_s)
        self.task = asyncio.create_task(self.server.serve(sockets=[listener]))

    async def stop(self) -> None:
        self.server.drain()
        await self.task


@pytest.fixture
async def live_server(queue: JobQueue) -> AsyncIterator[LiveServer]:
    server = LiveServer(queue, ServerSettings(served_model_name="glm-image,zai-org/GLM-Image"))
    yield server  # its socket is listening already: early clients wait
    await server.stop()

"""Responses with large images: the same JSON, one image in memory, and complete or visibly cut."""

import asyncio
import base64
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest
import redis.asyncio
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import QueueUnavailable
from server.admission.keys import ANONYMOUS
from server.admission.memory_budget import MemoryBudget
from server.app import create_app
from server.responses import events, held_image
from server.responses.events import EventStream, to_event
from server.responses.held_image import PIECE_BYTES, HeldImage, ResultLost
from server.responses.pieces import encoded, length, split
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import LiveServer
from tests.server.events import parse
from tests.server.stub_engine import StubEngine
from tests.server.test_errors import error_of
from tests.server.test_jobs_api import ended, submitted
from tests.waiting import until

URL = "/v1/images/generations"
IMAGE_BYTES = 1_000_000


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bytes]:
    """Make the stub's images large; return them by seed."""

    def image(seed: int) -> bytes:
        return random.Random(seed).randbytes(IMAGE_BYTES)

    monkeypatch.setattr("tests.server.stub_engine.stub_image", lambda spec, seed, *_: image(seed))
    return image


def in_memory(data: bytes, budget: MemoryBudget) -> HeldImage:
    async def read() -> bytes:
        return data

    hold = budget.hold(ANONYMOUS)
    return HeldImage(read, len(data), hold.__enter__())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3 * PIECE_BYTES + 4), min_size=1, max_size=4),
    text=st.text(),
    small=st.booleans(),
)
def test_the_json_is_the_one_of_a_whole_body(sizes: list[int], text: str, small: bool) -> None:
    text = text.encode(errors="ignore").decode()
    data = [random.Random(size).randbytes(size) for size in sizes]
    budget = MemoryBudget(10**9)
    images = [base64.b64encode(image) if small else in_memory(image, budget) for image in data]

    def body(values: Sequence[str]) -> dict[str, Any]:
        return {"a": text, "data": [{"b64_json": value, "seed": index} for index, value in enumerate(values)]}

    async def made() -> list[bytes]:
        return [piece async for piece in encoded(parts)]

    parts = split(lambda mark: body([mark(index) for index in range(len(data))]), images)
    whole = orjson.dumps(body([base64.b64encode(image).decode() for image in data]))
    pieces = asyncio.run(made())
    assert b"".join(pieces) == whole
    assert length(parts) == len(whole)
    assert small or max(map(len, pieces)) <= max(len(text) * 6 + 1000, PIECE_BYTES * 4 // 3)
    assert budget.in_use == 0


@asynccontextmanager
async def open_app(queue: JobQueue, **options: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    app = create_app(ServerSettings(**options), queue)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        yield app, client


class StalledClient:
    """Takes the head and `pieces` pieces of a response, and then nothing."""

    def __init__(self, app: FastAPI, path: str, pieces: int) -> None:
        self.taken, self._pieces = 0, pieces
        self.reads_on = asyncio.Event()
        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"t")],
            "client": ("127.0.0.1", 1),
            "server": ("t", 80),
            "scheme": "http",
            "root_path": "",
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def _send(self, message: Any) -> None:
        if self.taken >= self._pieces:
            await self.reads_on.wait()
        self.taken += len(message.get("body", b"")) > 0


async def test_a_response_holds_one_image_and_none_while_the_client_stalls(
    queue: JobQueue, images: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    resize = MemoryBudget._resize

    def recorded(self: MemoryBudget, *arguments: Any) -> None:
        resize(self, *arguments)
        held.append(self.in_use)

    monkeypatch.setattr(MemoryBudget, "_resize", recorded)
    async with open_app(queue) as (app, client), StubEngine(queue):
        job = await submitted(client, n=5)
        whole = (await ended(client, job))["result"]["data"]
        held.clear()
        for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events"):
            stalled = [StalledClient(app, path, pieces=15) for _ in range(3)]
            await until(lambda clients=stalled: all(client.taken == 15 for client in clients))
            await until(lambda: app.state.services.memory.in_use == 0)
            for one in stalled:
                one.reads_on.set()
            await asyncio.wait([one.task for one in stalled], timeout=20)
            assert all(one.taken > 5 * IMAGE_BYTES / PIECE_BYTES for one in stalled)
        assert max(held) <= 3 * IMAGE_BYTES
        assert app.state.services.memory.in_use == 0
        assert len(whole) == 5


async def test_room_is_awaited_for_a_new_image_and_not_for_a_kept_one(
    queue: JobQueue, images: Callable[[int], bytes], redis_client: redis.asyncio.Redis
) -> None:
    async with open_app(queue) as (app, client), StubEngine(queue, step_s=0.01):
        job = await submitted(client)
        await ended(client, job)
        memory: MemoryBudget = app.state.services.memory
        with memory.hold(ANONYMOUS) as others:
            posted = asyncio.create_task(client.post(URL, json={"prompt": "y", "seed": 1}))
            await until(lambda: is_running(queue))
            others.resize(app.state.services.settings.max_inflight_bytes)
            refused = await client.get(f"/v1/jobs/{job}")
            assert (refused.status_code, error_of(refused)["code"]) == (503, "service_unavailable")
            assert int(refused.headers["retry-after"]) > 0
            await until(lambda: are_results(redis_client, 2))
            assert not posted.done()
        response = await asyncio.wait_for(posted, 20)
        assert base64.b64decode(response.json()["data"][0]["b64_json"]) == images(1)
        assert (await client.get(f"/v1/jobs/{job}")).status_code == 200


async def test_an_outage_in_the_middle_is_waited_out(
    queue: JobQueue, images: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = queue.result_image, 0

    async def flapping(job_id: str, index: int, key: str | None = None) -> bytes | None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise QueueUnavailable("planted")
        return await read(job_id, index)

    monkeypatch.setattr(queue, "result_image", flapping)
    monkeypatch.setattr("engine.jobs.connection.RETRY_INTERVAL_S", 0.01)
    async with open_app(queue) as (_, client), StubEngine(queue):
        response = await client.post(URL, json={"prompt": "x", "n": 3, "seed": 5})
    assert [base64.b64decode(image["b64_json"]) for image in response.json()["data"]] == [
        images(5),
        images(6),
        images(7),
    ]
    assert calls > 3


@pytest.mark.parametrize("path", ["/v1/jobs/{job}", "/v1/jobs/{job}/events"])
async def test_a_result_lost_in_the_middle_cuts_the_response(
    live_server: LiveServer,
    queue: JobQueue,
    images: Callable[[int], bytes],
    redis_client: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    read = queue.result_image

    async def losing(job_id: str, index: int, key: str | None = None) -> bytes | None:
        if index == 2:
            await redis_client.delete(f"glimmer:result:{job_id}")
        return await read(job_id, index)

    async with StubEngine(queue), httpx.AsyncClient(base_url=live_server.url) as client:
        job = await submitted(client, n=4)
        await until(lambda: has_result(redis_client, job))
        monkeypatch.setattr(queue, "result_image", losing)
        received = bytearray()
        with pytest.raises(httpx.RemoteProtocolError):
            await receive_all(client, path.format(job=job), received)
    assert len(received) > 2 * IMAGE_BYTES
    assert b"error" not in received[-1000:]
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(received.rpartition(b"data: ")[2])


async def receive_all(client: httpx.AsyncClient, path: str, received: bytearray) -> None:
    async with client.stream("GET", path) as response:
        assert response.status_code == 200
        async for chunk in response.aiter_bytes():
            received += chunk


async def is_running(queue: JobQueue) -> bool:
    return (await queue.stats()).running == 1


async def are_results(client: redis.asyncio.Redis, count: int) -> bool:
    return len(await client.keys("glimmer:result:*")) == count


async def has_result(client: redis.asyncio.Redis, job: str) -> bool:
    return bool(await client.exists(f"glimmer:result:{job}"))


async def test_pings_come_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING_INTERVAL_S", 0.002)
    image, sent = random.Random(1).randbytes(5 * PIECE_BYTES), b""

    async def stream() -> AsyncGenerator[events.Event]:
        for _ in range(5):
            yield to_event("completed", [b'{"b64_json":"', in_memory(image, MemoryBudget(10**9)), b'"}'])
            await asyncio.sleep(0.01)

    async def send(message: Any) -> None:
        nonlocal sent
        await asyncio.sleep(0.005)
        sent += message.get("body", b"")

    async def receive() -> Any:
        await asyncio.Event().wait()

    await EventStream(stream())({}, receive, send)
    parsed = parse(sent.decode())
    assert parsed.named == [("completed", {"b64_json": base64.b64encode(image).decode()})] * 5
    assert parsed.comments


async def test_a_slow_client_costs_few_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time until an image is dropped doubles."""
    monkeypatch.setattr(held_image, "UNREAD_S", 0.001)
    data, reads = bytes(40 * PIECE_BYTES), 0

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        return data

    with MemoryBudget(10**9).hold(ANONYMOUS) as held:
        async for _ in HeldImage(read, len(data), held).pieces():
            await asyncio.sleep(0.01)
    assert 1 < reads < 20


async def test_other_data_than_announced_is_not_sent() -> None:
    async def read() -> bytes:
        return b"short"

    with MemoryBudget(10**9).hold(ANONYMOUS) as held:
        with pytest.raises(ResultLost):
            await HeldImage(read, 10, held).load(patient=True)
        assert await HeldImage(read, 5, held).load(patient=True) == b"short"

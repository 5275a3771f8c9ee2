"""Probes and refusals: in time while Redis hangs, one read for many, and ids only for those who may see them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from engine.errors import QueueUnavailable
from server import redis_timeout
from server.app import create_app
from server.redis_timeout import MAX_ABANDONED, with_redis_timeout
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.waiting import until

URL = "/v1/images/generations"
QUEUE_READS = ("engines", "stats", "engine_metrics", "takes_writes")


class Hang:
    """Calls that swallow cancellations, as the Redis client can, until `end`."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()
        self.running = 0

    async def call(self, *_: Any, **__: Any) -> None:
        self.running += 1
        while not self._ended.is_set():
            with suppress(asyncio.CancelledError):
                await self._ended.wait()
        self.running -= 1

    async def end(self) -> None:
        self._ended.set()
        await until(lambda: self.running == 0)


@pytest.fixture
async def hang(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hang]:
    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.05)
    hang = Hang()
    yield hang
    await hang.end()


async def test_calls_that_cannot_be_cancelled_are_abandoned_and_bounded(hang: Hang) -> None:
    refused = await asyncio.wait_for(
        asyncio.gather(*(with_redis_timeout(hang.call()) for _ in range(MAX_ABANDONED)), return_exceptions=True), 20
    )
    assert {type(error) for error in refused} == {QueueUnavailable}
    for _ in range(100):
        with pytest.raises(QueueUnavailable, match="wait for a response"):
            await with_redis_timeout(hang.call())
    assert hang.running == MAX_ABANDONED
    await hang.end()
    await with_redis_timeout(asyncio.sleep(0))


async def test_a_caller_that_is_cancelled_leaves_the_call(hang: Hang) -> None:
    task = asyncio.create_task(with_redis_timeout(hang.call(), size=10**12))
    await until(lambda: hang.running == 1)
    task.cancel()
    await asyncio.wait([task], timeout=20)
    assert task.cancelled()


async def test_every_request_is_answered_while_each_call_hangs(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (await client.post(URL, json={"prompt": "x"}, headers={"prefer": "respond-async"})).json()["id"]
    for name in (*QUEUE_READS, "submit", "get", "cancel", "expire", "stored_result", "shared_file_info"):
        monkeypatch.setattr(queue, name, hang.call)
    paths = ("/health", f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", "/v1/files/x.png")
    requests = [client.get(path) for path in paths] + [client.delete(f"/v1/jobs/{job}")]
    requests += [client.post(URL, json={"prompt": "x"}, headers=headers) for headers in ({}, {"idempotency-key": "k"})]
    responses = await asyncio.wait_for(asyncio.gather(*requests), 20)
    assert [response.status_code for response in responses] == [503] * len(responses)
    assert "glimmer_redis_up 0.0" in (await client.get("/metrics")).text


async def test_many_probes_share_a_read(
    make_client: MakeClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their number, Redis gets one write."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        call = getattr(queue, name)

        async def count() -> Any:
            calls[name] += 1
            return await call()

        return count

    for name in QUEUE_READS:
        monkeypatch.setattr(queue, name, counted(name))
    monkeypatch.setattr("server.admission.queue_state.CACHE_TTL_S", 60)
    monkeypatch.setattr("server.admission.queue_state.WRITE_PROBE_TTL_S", 60)
    async with make_client() as client:
        for path in ("/health", "/metrics"):
            responses = await asyncio.gather(*(client.get(path) for _ in range(50)))
            assert {response.status_code for response in responses} == {200}
    assert calls == dict.fromkeys(QUEUE_READS, 1)


@pytest.mark.parametrize(
    ("settings", "peer", "key", "is_trusted"),
    [
        ({}, "127.0.0.1", None, True),
        ({}, "::1", None, True),
        ({}, "192.0.2.7", None, False),
        ({"api_key": "k"}, "127.0.0.1", None, False),
        ({"api_key": "k"}, "127.0.0.1", "wrong", False),
        ({"api_key": "k"}, "192.0.2.7", "k", True),
    ],
)
async def test_ids_of_engines_are_for_keys_and_for_this_machine(
    queue: JobQueue, stub: StubEngine, settings: dict[str, str], peer: str, key: str | None, is_trusted: bool
) -> None:
    app = create_app(ServerSettings(**settings), queue)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, client=(peer, 1))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        first, second = [(await client.get("/health", headers=headers)).json()["engines"] for _ in range(2)]
    assert first == second
    [engine] = first
    assert (engine["stage"], engine["state"]) == ("all", "ready")
    assert ((engine["id"], engine["pid"]) == (stub.info.id, stub.info.pid)) == is_trusted
    if not is_trusted:
        assert engine["pid"] is None
        assert stub.info.id not in engine["id"]


@pytest.mark.parametrize("path", ["/live", "/health", "/metrics", "/", "/docs", "/openapi.json", "/v1/models"])
async def test_head_is_a_get_without_a_body(client: httpx.AsyncClient, stub: StubEngine, path: str) -> None:
    got, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert (await client.head("/nothing")).status_code == 404
    assert (await client.head(URL)).status_code == 405

"""Jobs whose client waits at an API process name it, and only those; engines of different models are noticed."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
import redis.asyncio

from engine.jobs.job import EngineInfo
from server.admission.queue_state import QueueState
from tests.job_queue import JobQueue
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.waiting import until

BODY = {"prompt": "a red cube", "size": "96x64"}


async def apis_of(client: Any) -> list[bytes | None]:
    keys = sorted([key async for key in client.scan_iter("glimmer:job:*")])
    return [await client.hget(key, "api") for key in keys]


@pytest.mark.parametrize(
    ("headers", "stream", "attached"),
    [
        ({}, False, True),
        ({}, True, True),
        ({"prefer": "respond-async"}, False, False),
        ({"idempotency-key": "k"}, False, False),
        ({"idempotency-key": "k"}, True, False),
    ],
)
async def test_a_job_names_the_api_at_which_its_client_waits(
    queue: JobQueue,
    redis_client: redis.asyncio.Redis,
    client: httpx.AsyncClient,
    headers: dict[str, str],
    stream: bool,
    attached: bool,
) -> None:
    async with StubEngine(queue):
        await client.post("/v1/images/generations", json=BODY | {"stream": stream}, headers=headers)
    [api] = await apis_of(redis_client)
    assert (api is not None) == attached
    if api is not None:
        await until(lambda: redis_client.zscore("glimmer:apis", api))


async def test_every_api_process_has_its_own_name(make_client: MakeClient, redis_client: redis.asyncio.Redis) -> None:
    async with make_client(), make_client():
        await until(lambda: _is_two(redis_client))


async def _is_two(client: redis.asyncio.Redis) -> bool:
    return await client.zcard("glimmer:apis") == 2


@pytest.mark.parametrize("path", ["/v1/jobs/bad", "/v1/jobs/bad/events"])
async def test_a_damaged_job_is_an_error_of_its_own(
    queue: JobQueue, redis_client: Any, client: httpx.AsyncClient, path: str
) -> None:
    await redis_client.set("glimmer:job:bad", "text")
    response = await client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "job_unreadable")
    assert (await client.get("/v1/jobs/other")).status_code == 404


async def test_different_models_are_logged_once(
    queue: JobQueue, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, client: httpx.AsyncClient
) -> None:
    monkeypatch.setattr("server.admission.queue_state.CACHE_TTL_S", 0.0)
    state = QueueState(queue)

    async def see(**models: str) -> int:
        for engine, model in models.items():
            info = EngineInfo(engine, 1, "all", "ready", "m", "96x64", 128, 2048, fingerprint=model)
            await queue.heartbeat(info, "", 60)
        for _ in range(3):
            await state.engines.get()
            await asyncio.sleep(0.001)
        return sum("models_differ" in record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.ERROR, "glimmer.engines"):
        assert await see(a="one", b="one", c="") == 0
        assert await see(b="two") == 1
        assert await see(b="three") == 2
        assert await see(b="one") == 2
        await see(b="two")
        assert "glimmer_models 2.0" in (await client.get("/metrics")).text

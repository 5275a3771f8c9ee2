"""Admission: the limit of the queue, missing engines, Redis outages, and draining."""

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import QueueUnavailable
from engine.jobs import connection
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.follower import JobFollower
from engine.jobs.job import EngineInfo, JobRecord, JobSpec, SourceImages, Submitted
from server import redis_timeout
from server.admission import abandoned_jobs
from server.admission.admission import Admission
from server.admission.rate_limits import RateLimits
from server.admission.throughput import MAX_RETRY_S, Throughput
from server.app import create_app
from server.metrics import Metrics
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.jobs.helpers import kill
from tests.server.conftest import MakeClient
from tests.server.stub_engine import StubEngine
from tests.server.test_errors import error_of
from tests.waiting import until

URL = "/v1/images/generations"


async def test_over_the_cap_is_429_with_retry_after(make_client: MakeClient, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=10, slots=1), make_client(max_queue=2) as client:
        accepted = []
        for _ in range(3):  # one runs, two wait
            accepted.append(asyncio.create_task(client.post(URL, json={"prompt": "x", "timeout": 1})))
            await until(lambda: _jobs(queue, len(accepted)))
            await asyncio.sleep(0.05)
        await until(lambda: _stats_are(queue, 2, 1))
        started = time.monotonic()
        refused = await client.post(URL, json={"prompt": "x"})
        assert time.monotonic() - started < 0.5
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert {response.status_code for response in await asyncio.gather(*accepted)} == {504}


async def _jobs(queue: JobQueue, count: int) -> bool:
    stats = await queue.stats()
    return stats.waiting + stats.running == count


async def _stats_are(queue: JobQueue, waiting: int, running: int) -> bool:
    stats = await queue.stats()
    return (stats.waiting, stats.running) == (waiting, running)


async def test_the_cap_holds_for_a_burst(make_client: MakeClient, queue: JobQueue) -> None:
    async with make_client(max_queue=5) as client:
        # The engine is ready but claims nothing, so the queue fills.
        info = StubEngine(queue).info
        await queue.heartbeat(info, "", 10)
        posts = [client.post(URL, json={"prompt": "x", "timeout": 0.5}) for _ in range(40)]
        statuses = [response.status_code for response in await asyncio.gather(*posts)]
    assert (statuses.count(504), statuses.count(429)) == (5, 35)


@pytest.mark.parametrize("state", [None, "starting", "draining", "stuck"])
async def test_without_a_ready_engine_it_is_503(client: httpx.AsyncClient, queue: JobQueue, state: str | None) -> None:
    if state is not None:
        await queue.heartbeat(dataclasses.replace(StubEngine(queue).info, state=state), "", 10)
    response = await client.post(URL, json={"prompt": "x"})
    assert (response.status_code, error_of(response)["type"]) == (503, "server_error")
    assert int(response.headers["retry-after"]) > 0
    assert await _stats_are_zero(queue)


async def _stats_are_zero(queue: JobQueue) -> bool:
    return await _stats_are(queue, 0, 0)


@asynccontextmanager
async def client_of_own_redis(folder: Path) -> AsyncIterator[tuple[EmbeddedRedis, JobQueue, httpx.AsyncClient]]:
    with EmbeddedRedis(folder) as server:
        redis = connect(server.url)
        queue = JobQueue(redis)
        app = create_app(ServerSettings(), queue)
        transport = httpx.ASGITransport(app)
        async with (
            StubEngine(queue),
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            yield server, queue, client
        await queue.close()
        await redis.aclose()


async def test_stopped_redis_is_503_quickly_and_recovers(tmp_path: Path) -> None:
    async with client_of_own_redis(tmp_path) as (server, _, client):
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200
        kill(server)
        started = time.monotonic()
        for path in ("/health", "/metrics"):
            expected = 200 if path == "/metrics" else 503
            assert (await client.get(path)).status_code == expected
        response = await client.post(URL, json={"prompt": "x"})
        assert (response.status_code, error_of(response)["type"]) == (503, "server_error")
        assert int(response.headers["retry-after"]) > 0
        assert time.monotonic() - started < 5
        assert (await client.get("/live")).status_code == 200
        server.restart()
        await until(lambda: _is_ok(client))
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200


async def test_redis_dying_when_a_job_completes_only_delays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_of_own_redis(tmp_path) as (server, _, client):
        wait = JobFollower.wait

        async def wait_then_die(self: JobFollower) -> JobRecord:
            record = await wait(self)
            kill(server)
            return record

        monkeypatch.setattr(JobFollower, "wait", wait_then_die)
        posted = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await until(lambda: not server.alive)
        await asyncio.sleep(0.5)
        server.restart()
        assert (await posted).status_code == 200


async def test_concurrent_requests_share_the_wait_for_a_hanging_redis(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def hangs() -> list[EngineInfo]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(queue, "engines", hangs)
        started = time.monotonic()
        posts = [asyncio.create_task(client.post(URL, json={"prompt": "x"})) for _ in range(100)]
        await until(lambda: asked)
        posts.pop(0).cancel()  # cancel the request that started the call to Redis
        assert {response.status_code for response in await asyncio.gather(*posts)} == {503}
        assert time.monotonic() - started < 1.5
        assert asked == 1
    assert (await client.post(URL, json={"prompt": "x"})).status_code == 200


async def test_a_job_queued_without_a_response_is_discarded(
    client: httpx.AsyncClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, discard, attempts = queue.submit, queue.discard, 0

    async def no_answer(*args: Any, **kwargs: Any) -> None:
        await submit(*args, **kwargs)
        await asyncio.sleep(60)

    async def away_at_first(job_id: str) -> bool:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            assert await _stats_are(queue, 1, 0)
            raise QueueUnavailable("away")
        return await discard(job_id)

    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(connection, "RETRY_INTERVAL_S", 0.05)
    monkeypatch.setattr(queue, "submit", no_answer)
    monkeypatch.setattr(queue, "discard", away_at_first)
    await queue.heartbeat(StubEngine(queue).info, "", 10)  # ready, but claims nothing
    assert (await client.post(URL, json={"prompt": "x"})).status_code == 503
    await until(lambda: _stats_are_zero(queue))
    assert attempts == 2
    assert 'glimmer_api_jobs_total{state="cancelled"} 1.0' in (await client.get("/metrics")).text


async def test_a_cancelled_submit_is_discarded(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = queue.submit

    async def no_answer(*args: Any, **kwargs: Any) -> None:
        await submit(*args, **kwargs)
        await asyncio.sleep(60)

    monkeypatch.setattr(queue, "submit", no_answer)
    abandoned = abandoned_jobs.AbandonedJobs(queue, Metrics())
    admission = Admission(queue, RateLimits(queue), 10, abandoned)
    submitting = asyncio.create_task(admission.submit(JobSpec("x", 64, 64, 1), 60.0, "batch"))
    await until(lambda: _stats_are(queue, 1, 0))
    submitting.cancel()
    await asyncio.wait([submitting])
    await abandoned.close()  # waits for the discard, as in shutdown
    assert await _stats_are_zero(queue)


async def test_large_images_extend_the_timeout(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = queue.submit

    async def slow(*args: Any, **kwargs: Any) -> Submitted:
        await asyncio.sleep(0.3)
        return await submit(*args, **kwargs)

    monkeypatch.setattr(queue, "submit", slow)
    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(redis_timeout, "SOURCE_BYTES_PER_S", 1.0)
    abandoned = abandoned_jobs.AbandonedJobs(queue, Metrics())
    admission = Admission(queue, RateLimits(queue), 10, abandoned)
    edit = JobSpec("x", 64, 64, 1, num_sources=1)
    assert not (await admission.submit(edit, 60.0, "batch", source_images=SourceImages([b"an image"]))).attached
    with pytest.raises(QueueUnavailable, match=r"within 0\.1 s"):
        await admission.submit(JobSpec("x", 64, 64, 1), 60.0, "batch")
    await abandoned.close()


async def test_abandoned_jobs_do_not_delay_shutdown(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandoned_jobs, "CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(queue, "discard", lambda _: asyncio.sleep(60))
    abandoned = abandoned_jobs.AbandonedJobs(queue, Metrics())
    abandoned.discard("a")
    await asyncio.wait_for(abandoned.close(), 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _is_ok(client: httpx.AsyncClient) -> bool:
    return (await client.get("/health")).status_code == 200


async def test_an_unresponsive_redis_is_503_quickly(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.1)
    monkeypatch.setattr(queue, "submit", lambda *_, **__: asyncio.sleep(60))
    monkeypatch.setattr(queue, "stats", lambda: asyncio.sleep(60))
    assert (await client.post(URL, json={"prompt": "x"})).status_code == 503
    health = await client.get("/health")
    assert (health.status_code, health.json()["queue"]) == (503, None)
    assert "glimmer_redis_up 0.0" in (await client.get("/metrics")).text


async def test_draining_refuses_new_work_and_finishes_the_old(queue: JobQueue) -> None:
    app = create_app(ServerSettings(), queue)
    transport = httpx.ASGITransport(app)
    async with (
        StubEngine(queue, step_s=0.3),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t") as client,
    ):
        running = asyncio.create_task(client.post(URL, json={"prompt": "x", "num_inference_steps": 1}))
        await until(lambda: app.state.gate.inside == 1)
        app.state.gate.close()
        refused = await client.post(URL, json={"prompt": "x"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        health = await client.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, "This server is shutting down.")
        assert (await running).status_code == 200
        assert app.state.gate.inside == 0


async def test_engines_are_read_once_a_second(
    client: httpx.AsyncClient, stub: StubEngine, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    engines = queue.engines

    async def counted():
        nonlocal asked
        asked += 1
        return await engines()

    monkeypatch.setattr(queue, "engines", counted)
    await asyncio.gather(*(client.post(URL, json={"prompt": "x"}) for _ in range(10)))
    assert asked == 1


class TestThroughput:
    def test_without_ends_retry_after_is_within_bounds(self) -> None:
        assert Throughput().retry_after_s(1) == 1
        assert Throughput().retry_after_s(10**9) == MAX_RETRY_S

    def test_an_idle_hour_does_not_slow_the_estimate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: clock)
        throughput = Throughput()
        throughput.record_end(4.0)
        clock = 3600.0
        throughput.record_end(4.0)
        assert throughput.retry_after_s(100) == math.ceil(4.0 * 10)

    def test_parallel_jobs_end_more_often_than_they_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: clock)
        throughput = Throughput()
        for _ in range(200):
            clock += 0.5
            throughput.record_end(8.0)
        assert 5 <= throughput.retry_after_s(100) <= 6


async def test_a_job_id_is_never_used_twice(queue: JobQueue) -> None:
    spec = JobSpec("x", 64, 64, 1)
    admission = Admission(queue, RateLimits(queue), 10, abandoned_jobs.AbandonedJobs(queue, Metrics()))
    ids = {(await admission.submit(spec, 1.0, "batch")).job_id for _ in range(5)}
    assert len(ids) == 5


async def test_queue_unavailable_is_not_mistaken_for_a_timeout() -> None:
    async def away() -> None:
        raise QueueUnavailable("gone")

    with pytest.raises(QueueUnavailable, match="gone"):
        await redis_timeout.with_redis_timeout(away())

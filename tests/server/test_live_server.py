"""The API behind a real socket: clients that disconnect, and a drain. `tests/clients` has real clients."""

import asyncio
import socket

import httpx
import pytest
import redis.asyncio
from starlette.requests import ClientDisconnect

from engine.jobs.follower import JobFollower
from engine.jobs.job import JobRecord
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.admission import Admitted
from server.admission.keys import ANONYMOUS
from server.admission.memory_budget import MemoryBudget
from server.admission.throughput import Throughput
from server.metrics import Metrics
from server.processes import serving
from server.processes.serving import listen
from server.responses.job_wait import JobWait
from server.responses.outcomes import JobOutcomes
from server.settings import ServerSettings
from tests.job_queue import JobQueue
from tests.jobs.helpers import submit
from tests.server.conftest import LiveServer
from tests.server.stub_engine import StubEngine
from tests.waiting import until

URL = "/v1/images/generations"


async def test_a_disconnect_cancels_the_job(live_server: LiveServer, queue: JobQueue) -> None:
    async with StubEngine(queue, step_s=10, slots=1), httpx.AsyncClient(base_url=live_server.url) as client:
        posts = [asyncio.create_task(client.post(URL, json={"prompt": "x"}, timeout=60)) for _ in range(3)]
        await until(lambda: _stats_are(queue, waiting=2, running=1))
        for post in posts:
            post.cancel()
        await asyncio.wait(posts)
        await until(lambda: _stats_are(queue, waiting=0, running=0), seconds=1.0)
        metrics = (await client.get("/metrics")).text
    assert 'glimmer_api_jobs_total{state="cancelled"} 3.0' in metrics
    assert 'route="/v1/images/generations",status="499"} 3.0' in metrics


async def test_a_delivered_result_is_deleted_soon(
    live_server: LiveServer, stub: StubEngine, redis_client: redis.asyncio.Redis
) -> None:
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200
    (key,) = await redis_client.keys("glimmer:result:*")

    async def expires_soon() -> bool:
        return await redis_client.pttl(key) <= 5000

    await until(expires_soon)


async def test_the_result_of_a_disconnected_client_is_deleted(
    live_server: LiveServer, queue: JobQueue, redis_client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends before the disconnect is noticed."""

    wait = JobFollower.wait

    async def slow(follower: JobFollower) -> JobRecord:
        await asyncio.sleep(60)
        return await wait(follower)

    async def results() -> int:
        return len(await redis_client.keys("glimmer:result:*"))

    async def no_results() -> bool:
        return await results() == 0

    monkeypatch.setattr(JobFollower, "wait", slow)
    async with StubEngine(queue), httpx.AsyncClient(base_url=live_server.url) as client:
        posted = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await until(results)
        posted.cancel()
        await asyncio.wait([posted])
        await until(no_results)


async def _stats_are(queue: JobQueue, waiting: int, running: int) -> bool:
    stats = await queue.stats()
    return (stats.waiting, stats.running) == (waiting, running)


async def test_the_result_is_deleted_if_the_client_disconnects_on_completion(
    queue: JobQueue, stub: StubEngine, redis_client: redis.asyncio.Redis
) -> None:
    metrics = Metrics()
    abandoned_jobs = AbandonedJobs(queue, metrics)
    job = Admitted(await submit(queue))
    outcomes = JobOutcomes(queue, metrics, Throughput())

    async def wait_and_disconnect() -> None:
        wait = JobWait(queue, job, detached=False, abandoned_jobs=abandoned_jobs, outcomes=outcomes)
        with MemoryBudget(10**9).hold(ANONYMOUS) as held, wait as job_wait:
            await job_wait.end(held)
            assert await redis_client.keys("glimmer:result:*")
            raise ClientDisconnect

    with pytest.raises(ClientDisconnect):
        await wait_and_disconnect()
    await abandoned_jobs.close()
    assert not await redis_client.keys("glimmer:result:*")


async def test_a_disconnect_in_the_middle_of_the_body(live_server: LiveServer, queue: JobQueue) -> None:
    host, port = live_server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST " + URL.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with httpx.AsyncClient(base_url=live_server.url) as client:
        await until(lambda: _counts_a_disconnect(client))


async def _counts_a_disconnect(client: httpx.AsyncClient) -> bool:
    return 'status="499"} 1.0' in (await client.get("/metrics")).text


async def test_a_drain_finishes_running_requests(queue: JobQueue) -> None:
    server = LiveServer(queue, ServerSettings(grace_s=10))
    async with StubEngine(queue, step_s=0.5), httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        running = asyncio.create_task(client.post(URL, json={"prompt": "x", "num_inference_steps": 1}))
        await until(lambda: _stats_are(queue, waiting=0, running=1))
        server.server.drain()
        await until(lambda: server.server._gate.closed)
        refused = await client.post(URL, json={"prompt": "x"})
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
        assert refused.headers["connection"] == "close"
        assert (await running).status_code == 200
        await asyncio.wait_for(server.task, 3)


async def test_the_grace_period_bounds_the_drain(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LAST_BYTES_S", 1)
    server = LiveServer(queue, ServerSettings(grace_s=0.2))
    async with StubEngine(queue, step_s=60), httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        running = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await until(lambda: _stats_are(queue, waiting=0, running=1))
        await asyncio.wait_for(server.stop(), 5)
        await asyncio.wait([running])
        await until(lambda: _stats_are(queue, waiting=0, running=0))


def test_small_responses_do_not_wait_for_an_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

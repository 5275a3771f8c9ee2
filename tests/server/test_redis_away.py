"""A Redis that refuses, dies, or does not respond, seen over HTTP, with a worker and its engine.

In every case new requests are refused quickly, running jobs continue, and waiting clients get the image of an
undisturbed run once Redis is back.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import redis.asyncio

from engine.engine import Engine
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import QueueStats
from models.glm_image.model import GlmImage
from server import redis_timeout
from server.app import create_app
from server.settings import ServerSettings
from tests.checkpoints import small_engine
from tests.engine.test_worker import working
from tests.job_queue import JobQueue
from tests.jobs.helpers import kill, restart
from tests.jobs.test_faults import FAULTS, REPAIRS
from tests.proxy import Proxy
from tests.waiting import until

URL = "/v1/images/generations"
# A full Redis is seen by the watch of its memory, or by the write that it refuses: whichever comes first.
REFUSALS: dict[str, tuple[str, ...]] = dict.fromkeys(REPAIRS, ("The job queue does not accept jobs",))
REFUSALS["out of memory"] += ("The job queue is nearly out of memory",)
LONG = {"prompt": 'a poster "HELLO"', "size": "128x128", "seed": 3, "num_inference_steps": 100}


@dataclass
class Site:
    """API and engine, which share a link to their own Redis; `direct` is a separate connection to it."""

    server: EmbeddedRedis
    direct: redis.asyncio.Redis
    link: Proxy
    queue: JobQueue
    engine: Engine
    http: httpx.AsyncClient

    async def begin(self, trouble: str) -> None:
        if trouble == "killed":
            kill(self.server)
        elif trouble == "silent":
            self.link.stall()
        else:
            await FAULTS[trouble](self.server, self.direct)

    async def end(self, trouble: str) -> None:
        if trouble == "killed":
            restart(self.server)
        elif trouble == "silent":
            self.link.resume()
        else:
            await REPAIRS[trouble](self.direct)

    async def post(self, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(URL, json=body, timeout=60)


@pytest.fixture
async def site(tmp_path: Path, model: GlmImage) -> AsyncIterator[Site]:
    engine = small_engine(model)
    with EmbeddedRedis(tmp_path) as server:
        async with Proxy(Path(unquote(server.url.removeprefix("unix://")))) as link:
            direct, client = connect(server.url), connect(link.url)
            queue = JobQueue(client)
            app = create_app(ServerSettings(), queue)
            async with (
                working(queue, engine, plan_cache_s=0),
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as http,
            ):
                async with asyncio.timeout(10):
                    while (await http.get("/health")).status_code != 200:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                yield Site(server, direct, link, queue, engine, http)
            for closing in (queue.close(), client.aclose(), direct.aclose()):
                await closing


@pytest.mark.parametrize("trouble", ["killed", "silent", *REPAIRS])
async def test_new_jobs_are_refused_and_running_jobs_complete(
    site: Site, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.5)
    undisturbed = await site.post(LONG)
    assert undisturbed.status_code == 200, undisturbed.text
    posted = asyncio.create_task(site.post(LONG))
    await until(lambda: not site.engine.is_idle, seconds=20)
    await site.begin(trouble)
    refused = await asyncio.wait_for(site.post({"prompt": "another"}), 20)
    assert refused.status_code == 503, refused.text
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "service_unavailable")
    assert error["message"].startswith(REFUSALS.get(trouble, "The job queue cannot be reached")), error
    expected = "refuses writes" if trouble in REPAIRS else "cannot be reached"
    # A probe may see the state of 2 s ago, and that of the memory before that of the writes.
    await until(lambda: _health_names(site, expected), seconds=20)
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    await until(lambda: site.engine.is_idle, seconds=60)  # the job went on
    assert not posted.done()
    await site.end(trouble)
    response = await asyncio.wait_for(posted, 60)
    assert response.status_code == 200, response.text
    assert response.json()["data"] == undisturbed.json()["data"]
    await _accepts_jobs_again(site)
    assert await site.queue.stats() == QueueStats(0, 0)


async def _accepts_jobs_again(site: Site) -> None:
    async with asyncio.timeout(60):
        while (response := await site.post({"prompt": "later", "num_inference_steps": 1})).status_code == 503:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert response.status_code == 200, response.text


async def test_a_slow_redis_only_delays(site: Site) -> None:
    undisturbed = await site.post(LONG)
    site.link.delay_s = 0.03
    slow = await site.post(LONG)
    assert slow.status_code == 200, slow.text
    assert slow.json()["data"] == undisturbed.json()["data"]


async def test_a_submit_that_times_out_leaves_no_job(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client will retry."""
    await site.post({"prompt": "x", "num_inference_steps": 1})
    monkeypatch.setattr(redis_timeout, "REDIS_TIMEOUT_S", 0.2)
    site.link.delay_s = 0.3
    refused = await site.post(LONG)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    site.link.delay_s = 0.0
    await _accepts_jobs_again(site)
    async with asyncio.timeout(20):
        while await site.queue.stats() != QueueStats(0, 0):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await until(lambda: site.engine.is_idle, seconds=20)


async def _health_names(site: Site, reason: str) -> bool:
    health = (await site.http.get("/health")).json()
    return health["status"] == "unavailable" and reason in health["reason"]


async def test_a_job_on_too_few_replicas_is_refused_and_discarded(
    redis_client: redis.asyncio.Redis, queue: JobQueue, model: GlmImage
) -> None:
    """This Redis has no replica."""
    app = create_app(ServerSettings(), JobQueue(redis_client, min_replicas=1))  # type: ignore[call-arg]
    transport = httpx.ASGITransport(app)
    async with (
        working(queue, small_engine(model)),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as http,
    ):
        await until(lambda: _has_engine(queue))
        refused = await http.post(URL, json={"prompt": "x", "size": "64x64"})
        assert refused.status_code == 503
        assert float(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["message"].startswith("The job queue does not accept jobs")
        await until(lambda: _is_empty(queue))


async def _has_engine(queue: JobQueue) -> bool:
    return bool(await queue.engines())


async def _is_empty(queue: JobQueue) -> bool:
    stats = await queue.stats()
    return not stats.waiting and not stats.running

"""The queue at a master that changes: behind Sentinels, and in a cluster."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from redis.crc import key_slot

from engine.errors import QueueFull, QueueUnavailable, StartError
from engine.jobs.connection import connect
from engine.jobs.job import JobState, SourceImages
from engine.jobs.masters import CLUSTER_PREFIX
from engine.jobs.redis_check import check_redis
from engine.jobs.results import ImageResult, JobResult, PartialImage
from server.admission.keys import Caller
from server.admission.rate_limits import RateLimits
from tests.failover import ClusterRedis, FailoverRedis, SentinelRedis
from tests.job_queue import JobQueue
from tests.jobs.helpers import RESULT, ROOMY, claim, submit
from tests.waiting import until

KILLS, JOBS_BETWEEN = 2, 40
LIMIT_S = 120.0  # for a busy machine: elections are repeated, Sentinels pause for 30 s after they were stopped
LEASE_MS = 1000

WAITING_ENGINE = replace(ROOMY, idle=True)  # takes suspects, too

numbers = itertools.count()


@pytest.fixture(scope="module", params=[SentinelRedis, ClusterRedis])
def failover(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailoverRedis]:
    with request.param(tmp_path_factory.mktemp("failover") / "servers") as servers:
        yield servers


@pytest.fixture(autouse=True)
def _clear(failover: FailoverRedis) -> None:
    failover.clear()


@asynccontextmanager
async def opened(url: str, **options: int) -> AsyncIterator[JobQueue]:
    client = connect(url)
    queue = JobQueue(client, lease_ms=LEASE_MS, **options)
    try:
        yield queue
    finally:
        await queue.close()
        await client.aclose()


def image(seed: int) -> JobResult:
    """Return a result that follows from the job."""
    return JobResult([ImageResult(seed.to_bytes(4), seed=seed)], prompt_tokens=1, plan_tokens=1)


class Traffic:
    """Clients that submit jobs and engines that end them, until they are stopped."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, int] = {}  # seed by id
        self.ended = 0
        self.submits = self.runs = True  # the Redis client can swallow a cancellation

    async def submit(self, queue: JobQueue) -> None:
        while self.submits:
            seed = next(numbers)
            with suppress(QueueUnavailable, QueueFull):
                job_id = await submit(queue, job_id=f"failover-{seed}", seed=seed, timeout_s=600, max_queue=50)
                self.acknowledged[job_id] = seed
                await asyncio.sleep(0.01)
                continue
            await asyncio.sleep(0.05)

    async def run(self, queue: JobQueue, name: str) -> None:
        while self.runs:
            with suppress(QueueUnavailable):
                claimed = await queue.claim(name, WAITING_ENGINE)
                if claimed is not None:
                    self.ended += await queue.commit(claimed, image(claimed.spec.seed))
                    continue
            await asyncio.sleep(0.02)

    async def goes_on(self) -> None:
        """Return when more jobs have been acknowledged, and more have ended."""
        acknowledged, ended = len(self.acknowledged) + JOBS_BETWEEN, self.ended + JOBS_BETWEEN
        await until(lambda: len(self.acknowledged) > acknowledged and self.ended > ended, LIMIT_S)


async def test_a_url_of_another_kind_of_server_ends_the_start(failover: FailoverRedis) -> None:
    port, login = failover.servers[0].port, failover.url.partition("://")[2].partition("@")[0]
    urls = {f"redis://{login}@127.0.0.1:{port}": "is a cluster; write redis\\+cluster:// for redis://"}
    if isinstance(failover, SentinelRedis):
        urls = {
            f"redis://:of-sentinels@127.0.0.1:{failover.sentinels[0]}": "is a Sentinel",
            f"redis+sentinel://{login}@127.0.0.1:{port}/m": "refuses the user or password",
            f"redis+cluster://{login}@127.0.0.1:{port}": "is not a cluster",
            failover.url.replace("sentinel_password=", "sentinel_password=not-"): "refuses the user or password",
        }
    for url, problem in urls.items():
        with pytest.raises(StartError, match=problem):
            await check_redis(url)
    await check_redis(failover.url)


async def test_a_former_master_that_still_answers_acknowledges_nothing(failover: FailoverRedis) -> None:
    """Frozen or cut off until another was elected, it takes the calls of open connections; what it takes is lost."""
    async with opened(failover.url, min_replicas=1) as queue:
        before = await submit(queue, timeout_s=600)
        waiting = asyncio.create_task(queue.wait(before))
        master = await asyncio.to_thread(failover.replace_master)
        async with asyncio.timeout(LIMIT_S):
            for job_id in (before, await retried(queue)):
                assert await asyncio.to_thread(failover.has_job, master, job_id)
            while not waiting.done():  # its subscription was to the former master
                with suppress(QueueUnavailable):
                    if claimed := await queue.claim("engine-1", WAITING_ENGINE):
                        await queue.commit(claimed, RESULT)
                await asyncio.sleep(0.02)
        assert (await waiting).state == JobState.SUCCEEDED


async def retried(queue: JobQueue) -> str:
    while True:
        with suppress(QueueUnavailable):
            return await submit(queue, timeout_s=600)
        await asyncio.sleep(0.1)


async def test_all_keys_of_a_queue_are_in_one_slot(failover: FailoverRedis) -> None:
    """Every key that a story of edits, partial images, files and limits makes; without slots they have their names."""
    async with opened(failover.url) as queue:
        sources = SourceImages([b"an image"])
        job_id = await submit(queue, source_images=sources, owner="{a}", idempotency_key="{b}", fingerprint="f")
        await submit(queue, priority="batch")
        limits = RateLimits(queue)
        await limits.charge(Caller("alice", requests_per_minute=9, pixel_steps_per_day=9**9), 9)
        claimed = await claim(queue)
        await queue.renew("engine-1", [claimed])
        assert claimed.job_id == job_id
        await queue.partial_image(claimed, PartialImage(0, 0, b"partial", {"rows": 1, "cols": 1, "tokens": [1]}))
        await queue.progress(claimed, {"phase": "rendering"})
        await queue.api_heartbeat("api")
        assert await queue.takes_writes()
        assert await queue.commit(claimed, RESULT)
        await queue.share_file(job_id, "{token}", b"data", "image/png")
        assert await queue.shared_file("{token}") == b"data"
        assert (await queue.result(job_id)) == RESULT
        keys = [key async for key in queue.client.scan_iter(count=1000)]
    assert len({key.split(b":")[1] for key in keys}) > 12
    prefix = CLUSTER_PREFIX if isinstance(failover, ClusterRedis) else "glimmer"
    assert all(key.startswith(f"{prefix}:".encode()) for key in keys)
    if isinstance(failover, ClusterRedis):
        assert {key_slot(key) for key in keys} == {key_slot(CLUSTER_PREFIX.encode())}


async def test_a_job_without_replicas_is_not_acknowledged_by_whatever_reply(failover: FailoverRedis) -> None:
    """A repeated submit writes nothing, and perhaps comes over a connection that wrote nothing before."""
    key = {"idempotency_key": "a-key", "fingerprint": "same", "timeout_s": 600}
    replicas = await asyncio.to_thread(failover.replicas_of_queue)
    async with opened(failover.url, min_replicas=1) as queue, opened(failover.url, min_replicas=1) as other:
        await queue.ping()
        try:
            for replica in replicas:
                replica.signal(signal.SIGSTOP)
            with pytest.raises(QueueUnavailable, match="0 of 1 replicas have the job"):
                await submit(queue, job_id="first", **key)
            for again in ("first", "second"):  # known, and attached to the first
                with pytest.raises(QueueUnavailable, match="0 of 1 replicas"):
                    await submit(other, job_id=again, **key)
            assert await submit(other, dry_run=True, job_id="asked-only") == "asked-only"
        finally:
            for replica in replicas:
                replica.signal(signal.SIGCONT)
        async with asyncio.timeout(LIMIT_S):
            while True:
                with suppress(QueueUnavailable):
                    assert await submit(other, job_id="second", **key) == "first"
                    break
        await other.discard("first")


async def has_succeeded(queue: JobQueue, job_id: str) -> bool:
    record = await queue.get(job_id)
    assert record is not None, f"{job_id} is lost"
    return record.state == JobState.SUCCEEDED


async def test_no_acknowledged_job_is_lost_with_the_master(failover: FailoverRedis) -> None:
    traffic = Traffic()
    async with opened(failover.url, min_replicas=1) as producer, opened(failover.url) as consumer:
        clients = [asyncio.create_task(traffic.submit(producer)) for _ in range(4)]
        engines = [asyncio.create_task(traffic.run(consumer, f"engine-{n}")) for n in range(2)]
        for _ in range(KILLS):
            await traffic.goes_on()
            killed = await asyncio.to_thread(failover.kill_master)
            await traffic.goes_on()
            killed.start()
            await asyncio.to_thread(failover.await_replica, killed)
        traffic.submits = False
        await asyncio.gather(*clients)
        for job_id, seed in traffic.acknowledged.items():
            await until(lambda job_id=job_id: has_succeeded(producer, job_id), LIMIT_S)
            assert await producer.result(job_id) == image(seed)
        traffic.runs = False
        await asyncio.gather(*engines)

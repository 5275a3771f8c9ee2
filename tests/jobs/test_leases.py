"""Engines die, freeze or leave: which may run a job, and which writes take effect."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis.asyncio

from engine.jobs.job import Claim, JobError, JobState, Plan, QueueStats
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, claim, submit

LEASE_MS = 150

WRITES: dict[str, Callable[[JobQueue, Claim], Awaitable[bool]]] = {
    "progress": lambda queue, stale: queue.progress(stale, {"step": 1}),
    "checkpoint_plan": lambda queue, stale: queue.checkpoint_plan(stale, 0, Plan(1, 1, [1])),
    "commit": lambda queue, stale: queue.commit(stale, RESULT),
    "fail": lambda queue, stale: queue.fail(stale, JobError("stale")),
    "requeue": lambda queue, stale: queue.requeue("engine-1", stale),
}


@pytest.fixture
async def short_lease(redis_client: redis.asyncio.Redis) -> AsyncIterator[JobQueue]:
    """Return a queue with a lease short enough to wait for."""
    queue = JobQueue(redis_client, lease_ms=LEASE_MS)
    yield queue
    await queue.close()


async def lapse() -> None:
    await asyncio.sleep(LEASE_MS / 1000 * 1.1)


async def snapshot(client: redis.asyncio.Redis, job_id: str) -> list[object]:
    """Read everything stored about a job."""
    keys = [f"glimmer:{kind}:{job_id}" for kind in ("job", "plans", "result")]
    pending = await client.xpending("glimmer:queue:interactive", "engines")
    return [*[await client.hgetall(key) for key in keys], pending["pending"], pending["consumers"]]


async def test_a_lapsed_lease_is_taken_over_and_not_before(short_lease: JobQueue):
    job_id = await submit(short_lease)
    first = await claim(short_lease, "engine-1")
    assert await short_lease.claim("engine-2", IDLE) is None
    await lapse()
    second = await claim(short_lease, "engine-2", IDLE)
    assert (second.job_id, second.epoch, second.runs) == (job_id, first.epoch + 1, 2)
    assert await short_lease.stats() == QueueStats(waiting=0, running=1)
    assert await short_lease.claim("engine-3", IDLE) is None


async def test_lapsed_jobs_come_before_new_ones(short_lease: JobQueue):
    lapsed = await submit(short_lease)
    await claim(short_lease, "engine-1")
    await submit(short_lease)
    await lapse()
    assert (await claim(short_lease, "engine-2", IDLE)).job_id == lapsed


async def test_renewing_keeps_a_lease(short_lease: JobQueue):
    await submit(short_lease)
    granted = await claim(short_lease, "engine-1")
    for _ in range(4):
        await asyncio.sleep(LEASE_MS / 1000 / 2)
        assert await short_lease.renew("engine-1", [granted]) == []
        assert await short_lease.claim("engine-2", IDLE) is None
    await lapse()
    assert await short_lease.claim("engine-2", IDLE) is not None


async def test_renew_returns_the_lost_claims(short_lease: JobQueue):
    for _ in range(3):
        await submit(short_lease)
    kept, cancelled, taken = [await claim(short_lease, "engine-1") for _ in range(3)]
    await short_lease.cancel(cancelled.job_id)
    await lapse()
    assert await short_lease.renew("engine-1", [kept]) == []
    assert (await claim(short_lease, "engine-2", IDLE)).job_id == taken.job_id
    assert await short_lease.renew("engine-1", [kept, cancelled, taken]) == [cancelled, taken]
    assert await short_lease.renew("engine-1", []) == []


async def test_another_engine_cannot_renew_a_claim(short_lease: JobQueue):
    await submit(short_lease)
    granted = await claim(short_lease, "engine-1")
    await asyncio.sleep(LEASE_MS / 1000 * 0.7)
    assert await short_lease.renew("engine-2", [granted]) == [granted]
    await asyncio.sleep(LEASE_MS / 1000 * 0.5)
    assert await short_lease.claim("engine-3", IDLE) is not None


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("by", ["another engine", "the same engine"])
async def test_stale_writes_are_refused(short_lease: JobQueue, redis_client: redis.asyncio.Redis, write: str, by: str):
    """A frozen engine continues after its job was taken over."""
    job_id = await submit(short_lease)
    stale = await claim(short_lease, "engine-1")
    await lapse()
    current = await claim(short_lease, "engine-2" if by == "another engine" else "engine-1", IDLE)
    before = await snapshot(redis_client, job_id)
    assert not await WRITES[write](short_lease, stale)
    assert await snapshot(redis_client, job_id) == before
    assert await short_lease.commit(current, RESULT)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("end", ["commit", "fail", "cancel", "requeue", "requeue_all"])
async def test_writes_after_the_claim_ended_are_refused(
    queue: JobQueue, redis_client: redis.asyncio.Redis, write: str, end: str
):
    job_id = await submit(queue)
    granted = await claim(queue, "engine-1")
    if end == "cancel":
        assert await queue.cancel(job_id)
    elif end == "requeue_all":
        assert await queue.requeue_all("engine-1", blame=False) == 1
    else:
        assert await WRITES[end](queue, granted)
    before = await snapshot(redis_client, job_id)
    assert not await WRITES[write](queue, granted)
    assert await queue.renew("engine-1", [granted]) == [granted]
    assert await snapshot(redis_client, job_id) == before


async def test_a_lapsed_claim_that_was_not_taken_over_still_holds(short_lease: JobQueue):
    await submit(short_lease)
    granted = await claim(short_lease, "engine-1")
    await lapse()
    assert await short_lease.commit(granted, RESULT)
    assert await short_lease.claim("engine-2", IDLE) is None


async def test_a_requeued_job_keeps_its_place_and_its_run_does_not_count(queue: JobQueue):
    first, second = await submit(queue), await submit(queue)
    for _ in range(5):
        granted = await claim(queue, "engine-1")
        assert (granted.job_id, granted.runs) == (first, 1)
        await queue.progress(granted, {"step": 1})
        assert not await queue.requeue("engine-2", granted)
        assert await queue.requeue("engine-1", granted)
        assert await queue.stats() == QueueStats(waiting=2, running=0)
        record = await queue.get(first)
        assert record is not None
        assert (record.state, record.runs, record.progress) == (JobState.QUEUED, 0, {})
    assert [(await claim(queue, "engine-2")).job_id for _ in range(2)] == [first, second]


@pytest.mark.parametrize("end", ["cancel", "expire"])
async def test_a_requeued_job_can_be_ended(queue: JobQueue, redis_client: redis.asyncio.Redis, end: str):
    job_id = await submit(queue, timeout_s=0.05)
    await queue.requeue("engine-1", await claim(queue, "engine-1"))
    if end == "expire":
        await asyncio.sleep(0.06)
    assert await (queue.cancel(job_id) if end == "cancel" else queue.expire(job_id))
    assert await queue.stats() == QueueStats(0, 0)
    assert await redis_client.xlen("glimmer:queue:interactive") == 0
    assert (await redis_client.xpending("glimmer:queue:interactive", "engines"))["pending"] == 0


async def test_requeue_all_leaves_the_jobs_of_other_engines(queue: JobQueue, redis_client: redis.asyncio.Redis):
    dead = {await submit(queue), await submit(queue, priority="batch")}
    assert {(await claim(queue, "dead")).job_id for _ in range(2)} == dead
    await submit(queue)
    alive = await claim(queue, "alive")
    assert await queue.requeue_all("dead") == 2
    assert await queue.stats() == QueueStats(waiting=2, running=1)
    assert await queue.renew("alive", [alive]) == []
    again = [await claim(queue, "alive", IDLE) for _ in range(2)]
    assert ({granted.job_id for granted in again}, {granted.runs for granted in again}) == (dead, {2})
    assert await queue.requeue_all("dead") == 0
    for stream in ("interactive", "batch"):
        consumers = await redis_client.xinfo_consumers(f"glimmer:queue:{stream}", "engines")
        assert b"dead" not in {consumer["name"] for consumer in consumers}

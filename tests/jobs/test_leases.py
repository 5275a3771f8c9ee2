"""Engines that die, freeze or leave: who may run a job, and whose word counts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis.asyncio

from engine.jobs.job import Claim, JobError, JobState, Plan, QueueStats
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, ROOMY, claim, submit

LEASE_MS = 150

WRITES: dict[str, Callable[[JobQueue, Claim], Awaitable[bool]]] = {
    "progress": lambda queue, stale: queue.progress(stale, {"step": 1}),
    "checkpoint_plan": lambda queue, stale: queue.checkpoint_plan(stale, 0, Plan(1, 1, [1])),
    "commit": lambda queue, stale: queue.commit(stale, RESULT),
    "fail": lambda queue, stale: queue.fail(stale, JobError("stale")),
    "release": lambda queue, stale: queue.requeue("engine-1", stale),
}


@pytest.fixture
async def hasty(redis_client: redis.asyncio.Redis) -> AsyncIterator[JobQueue]:
    """A queue with a lease short enough to wait for."""
    queue = JobQueue(redis_client, lease_ms=LEASE_MS)
    yield queue
    await queue.close()


async def lapse() -> None:
    await asyncio.sleep(LEASE_MS / 1000 * 1.1)


async def snapshot(client: redis.asyncio.Redis, job_id: str) -> list[object]:
    """All that is stored about a job."""
    keys = [f"glimmer:{kind}:{job_id}" for kind in ("job", "plans", "result")]
    pending = await client.xpending("glimmer:queue:interactive", "engines")
    return [*[await client.hgetall(key) for key in keys], pending["pending"], pending["consumers"]]


async def test_a_lapsed_lease_is_taken_over_and_not_before(hasty: JobQueue):
    job_id = await submit(hasty)
    first = await claim(hasty, "engine-1")
    assert await hasty.claim("engine-2", IDLE) is None
    await lapse()
    second = await claim(hasty, "engine-2")
    assert (second.job_id, second.epoch, second.runs) == (job_id, first.epoch + 1, 2)
    assert await hasty.stats() == QueueStats(waiting=0, running=1)
    assert await hasty.claim("engine-3", IDLE) is None


async def test_lapsed_jobs_come_before_new_ones(hasty: JobQueue):
    lapsed = await submit(hasty)
    await claim(hasty, "engine-1")
    await submit(hasty)
    await lapse()
    assert (await claim(hasty, "engine-2")).job_id == lapsed


async def test_renewing_keeps_a_lease(hasty: JobQueue):
    await submit(hasty)
    granted = await claim(hasty, "engine-1")
    for _ in range(4):
        await asyncio.sleep(LEASE_MS / 1000 / 2)
        assert await hasty.renew("engine-1", [granted]) == []
        assert await hasty.claim("engine-2", IDLE) is None
    await lapse()
    assert await hasty.claim("engine-2", IDLE) is not None


async def test_renew_tells_which_claims_are_lost(hasty: JobQueue):
    for _ in range(3):
        await submit(hasty)
    kept, cancelled, taken = [await claim(hasty, "engine-1") for _ in range(3)]
    await hasty.cancel(cancelled.job_id)
    await lapse()
    assert await hasty.renew("engine-1", [kept]) == []
    assert (await claim(hasty, "engine-2")).job_id == taken.job_id
    assert await hasty.renew("engine-1", [kept, cancelled, taken]) == [cancelled, taken]
    assert await hasty.renew("engine-1", []) == []


async def test_nobody_else_can_renew_a_claim(hasty: JobQueue):
    await submit(hasty)
    granted = await claim(hasty, "engine-1")
    await asyncio.sleep(LEASE_MS / 1000 * 0.7)
    assert await hasty.renew("engine-2", [granted]) == [granted]
    await asyncio.sleep(LEASE_MS / 1000 * 0.5)
    assert await hasty.claim("engine-3", IDLE) is not None


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("by", ["another engine", "the same engine"])
async def test_stale_writes_are_refused(hasty: JobQueue, redis_client: redis.asyncio.Redis, write: str, by: str):
    """A frozen engine wakes up after its job was taken over."""
    job_id = await submit(hasty)
    stale = await claim(hasty, "engine-1")
    await lapse()
    current = await claim(hasty, "engine-2" if by == "another engine" else "engine-1")
    before = await snapshot(redis_client, job_id)
    assert not await WRITES[write](hasty, stale)
    assert await snapshot(redis_client, job_id) == before
    assert await hasty.commit(current, RESULT)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("end", ["commit", "fail", "cancel", "release", "surrender"])
async def test_writes_after_the_claim_ended_are_refused(
    queue: JobQueue, redis_client: redis.asyncio.Redis, write: str, end: str
):
    job_id = await submit(queue)
    granted = await claim(queue, "engine-1")
    if end == "cancel":
        assert await queue.cancel(job_id)
    elif end == "surrender":
        assert await queue.requeue_all("engine-1") == 1
    else:
        assert await WRITES[end](queue, granted)
    before = await snapshot(redis_client, job_id)
    assert not await WRITES[write](queue, granted)
    assert await queue.renew("engine-1", [granted]) == [granted]
    assert await snapshot(redis_client, job_id) == before


async def test_a_lapsed_claim_nobody_took_still_counts(hasty: JobQueue):
    await submit(hasty)
    granted = await claim(hasty, "engine-1")
    await lapse()
    assert await hasty.commit(granted, RESULT)
    assert await hasty.claim("engine-2", IDLE) is None


async def test_a_job_that_brings_engines_down_runs_alone_and_is_given_up(queue: JobQueue):
    poison, neighbour = await submit(queue), await submit(queue)
    for runs in (1, 2):
        granted = await claim(queue, "engine-1", ROOMY)
        assert (granted.job_id, granted.runs, granted.quarantined) == (poison, runs, False)
        await queue.requeue_all("engine-1")
    assert await queue.claim("engine-1", ROOMY) is None, "a suspect needs an idle engine, and is not passed over"
    granted = await claim(queue, "engine-1", IDLE)
    assert (granted.job_id, granted.runs, granted.quarantined) == (poison, 3, True)
    await queue.requeue_all("engine-1")

    assert (await claim(queue, "engine-1", ROOMY)).job_id == neighbour
    record = await queue.get(poison)
    assert record is not None
    assert (record.state, record.runs) == (JobState.FAILED, 3)
    assert record.error is not None
    assert (record.error.type, "3 times" in record.error.message) == ("server_error", True)
    assert (await queue.stats()).dead_lettered == 1


async def test_a_suspect_that_was_only_a_neighbour_succeeds(queue: JobQueue):
    await submit(queue)
    for _ in range(2):
        await claim(queue, "engine-1", ROOMY)
        await queue.requeue_all("engine-1")
    granted = await claim(queue, "engine-1", IDLE)
    assert granted.quarantined
    assert await queue.commit(granted, RESULT)


async def test_a_released_job_is_back_in_its_place_and_unblamed(queue: JobQueue):
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
async def test_a_released_job_can_be_ended(queue: JobQueue, redis_client: redis.asyncio.Redis, end: str):
    job_id = await submit(queue, timeout_s=0.05)
    await queue.requeue("engine-1", await claim(queue, "engine-1"))
    if end == "expire":
        await asyncio.sleep(0.06)
    assert await (queue.cancel(job_id) if end == "cancel" else queue.expire(job_id))
    assert await queue.stats() == QueueStats(0, 0)
    assert await redis_client.xlen("glimmer:queue:interactive") == 0
    assert (await redis_client.xpending("glimmer:queue:interactive", "engines"))["pending"] == 0


async def test_surrender_hands_back_only_the_dead_engines_jobs(queue: JobQueue, redis_client: redis.asyncio.Redis):
    dead = {await submit(queue), await submit(queue, priority="batch")}
    assert {(await claim(queue, "dead")).job_id for _ in range(2)} == dead
    await submit(queue)
    alive = await claim(queue, "alive")
    assert await queue.requeue_all("dead") == 2
    assert await queue.stats() == QueueStats(waiting=2, running=1)
    assert await queue.renew("alive", [alive]) == []
    again = [await claim(queue, "alive") for _ in range(2)]
    assert ({granted.job_id for granted in again}, {granted.runs for granted in again}) == (dead, {2})
    assert await queue.requeue_all("dead") == 0
    for stream in ("interactive", "batch"):
        consumers = await redis_client.xinfo_consumers(f"glimmer:queue:{stream}", "engines")
        assert b"dead" not in {consumer["name"] for consumer in consumers}

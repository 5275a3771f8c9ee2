"""Which jobs are admitted to the queue, and which is claimed next."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import redis.asyncio

from engine.errors import KeyReused, QueueFull, SourcesFull, TooManyJobs
from engine.jobs.job import FreeCapacity, JobState, Priority, QueueStats, SourceImages
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, ROOMY, claim, pass_deadline, spec, submit


async def test_max_queue_is_exact(queue: JobQueue):
    """It counts waiting jobs of both priorities; claimed, cancelled and expired jobs leave room at once."""
    first = await submit(queue, max_queue=3)
    second = await submit(queue, max_queue=3, priority="batch", timeout_s=0.02)
    await submit(queue, max_queue=3)
    with pytest.raises(QueueFull):
        await submit(queue, job_id="refused", max_queue=3)
    assert await queue.get("refused") is None

    await queue.cancel(first)
    await submit(queue, max_queue=3)
    with pytest.raises(QueueFull):
        await submit(queue, max_queue=3)

    await asyncio.sleep(0.03)
    await queue.expire(second)
    await submit(queue, max_queue=3)
    with pytest.raises(QueueFull):
        await submit(queue, max_queue=3)

    await claim(queue)
    await submit(queue, max_queue=3)
    with pytest.raises(QueueFull):
        await submit(queue, max_queue=3)
    assert await queue.stats() == QueueStats(waiting=3, running=1)


async def test_max_queue_holds_for_concurrent_submits(queue: JobQueue):
    answers = await asyncio.gather(*(submit(queue, max_queue=7) for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(answer, QueueFull) for answer in answers) == 43
    assert (await queue.stats()).waiting == 7


async def test_a_job_is_claimed_only_if_it_fits(queue: JobQueue):
    job_id = await submit(queue, n=2)
    kv_tokens = spec(n=2).plan_tokens + spec(n=2).prompt_tokens_bound
    assert (
        await queue.claim("engine-1", FreeCapacity(images=1, kv_tokens=kv_tokens, source_tokens=0, idle=False)) is None
    )
    assert (
        await queue.claim("engine-1", FreeCapacity(images=2, kv_tokens=kv_tokens - 1, source_tokens=0, idle=False))
        is None
    )
    assert (await queue.stats()).waiting == 1
    granted = await claim(queue, free=FreeCapacity(images=2, kv_tokens=kv_tokens, source_tokens=0, idle=False))
    assert granted.job_id == job_id


async def test_an_edit_is_claimed_only_if_its_source_images_fit(queue: JobQueue):
    edit = await submit(queue, source_images=SourceImages([b"x"]), source_tokens=24)
    behind = await submit(queue)
    assert await queue.claim("engine-1", replace(ROOMY, source_tokens=23)) is None
    assert (await claim(queue, free=replace(ROOMY, source_tokens=24))).job_id == edit
    assert (await claim(queue, free=replace(ROOMY, source_tokens=0))).job_id == behind


async def test_an_idle_engine_claims_any_job(queue: JobQueue):
    job_id = await submit(queue, n=10, width=2048, height=2048, source_images=SourceImages([b"x"]), source_tokens=10**9)
    assert (await claim(queue, free=IDLE)).job_id == job_id


@pytest.mark.parametrize("small_priority", ["interactive", "batch"])
async def test_a_large_job_is_not_overtaken(queue: JobQueue, small_priority):
    large = await submit(queue, n=10)
    small = await submit(queue, n=1, priority=small_priority)
    narrow = FreeCapacity(images=4, kv_tokens=10**9, source_tokens=0, idle=False)
    assert await queue.claim("engine-1", narrow) is None
    assert (await claim(queue, "engine-2", ROOMY)).job_id == large
    assert (await claim(queue, "engine-1", narrow)).job_id == small


async def test_interactive_jobs_go_first_and_batch_jobs_do_not_starve(queue: JobQueue):
    for _ in range(20):
        await submit(queue, priority="batch", seed=1)
    for _ in range(20):
        await submit(queue, priority="interactive", seed=0)
    claimed = [(await claim(queue)).spec.seed for _ in range(40)]
    assert claimed[:24] == [0, 0, 0, 1] * 6
    assert sum(claimed[:27]) == 7, "without interactive jobs, batch jobs get every turn"
    assert claimed[27:] == [1] * 13


@pytest.mark.parametrize("claims_before", range(4))
async def test_a_batch_job_starts_within_four_claims_of_any_engines(queue: JobQueue, claims_before: int):
    """For any number of interactive jobs, at any time, and after a requeue."""
    await submit(queue)
    for number in range(claims_before):
        await submit(queue)
        await claim(queue, f"engine-{number % 2}")
    batch = await submit(queue, priority="batch")
    for _ in range(2):
        for claims in range(1, 5):
            for _ in range(2):
                await submit(queue)
            granted = await claim(queue, f"engine-{claims % 2}")
            if granted.job_id == batch:
                break
        else:
            pytest.fail("overtaken four times")
        await queue.requeue(f"engine-{claims % 2}", granted)


@pytest.mark.parametrize("priority", ["interactive", "batch"])
@pytest.mark.parametrize("state", ["new", "requeued", "engine died"])
@pytest.mark.parametrize("alone", [True, False])
async def test_no_job_starts_after_its_deadline(queue: JobQueue, priority: Priority, state: str, alone: bool):
    late = await submit(queue, priority=priority)
    if state == "requeued":
        await queue.requeue("engine-1", await claim(queue))
    elif state == "engine died":
        await claim(queue)
        await queue.requeue_all("engine-1")
    other = None if alone else await submit(queue)
    await pass_deadline(queue, late)
    granted = await queue.claim("engine-2", IDLE)
    assert (granted.job_id if granted else None) == other
    assert await queue.claim("engine-2", IDLE) is None
    record = await queue.get(late)
    assert record is not None
    assert (record.state, record.runs) == (JobState.EXPIRED, int(state == "engine died"))


async def test_cancelled_jobs_leave_no_entries(queue: JobQueue, redis_client: redis.asyncio.Redis):
    """Claims would have to skip them."""
    first = await submit(queue)
    for _ in range(20):
        await queue.cancel(await submit(queue))
    assert await redis_client.xlen("glimmer:queue:interactive") == 1
    assert (await claim(queue)).job_id == first


async def test_expired_jobs_do_not_hide_the_next_job(queue: JobQueue, redis_client: redis.asyncio.Redis):
    for _ in range(200):
        await pass_deadline(queue, await submit(queue, max_queue=1000))
    job_id = await submit(queue, max_queue=1000)
    granted = await claim(queue)
    assert granted.job_id == job_id
    assert await redis_client.xlen("glimmer:queue:interactive") == 1


async def test_an_entry_of_an_earlier_job_with_the_same_id_is_stale(redis_client: redis.asyncio.Redis):
    queue = JobQueue(redis_client, result_ttl_s=1)
    await submit(queue, job_id="a")
    await redis_client.delete("glimmer:job:a")  # an older process ended it and left the entry
    await redis_client.zrem("glimmer:waiting", "a")
    await submit(queue, job_id="a")
    assert (await claim(queue)).job_id == "a"
    assert await queue.claim("engine-2", IDLE) is None
    assert await redis_client.xlen("glimmer:queue:interactive") == 1


async def test_a_dry_run_answers_as_a_submit_and_queues_nothing(
    queue: JobQueue, redis_client: redis.asyncio.Redis
) -> None:
    sources = SourceImages([b"x" * 9])
    refusals: list[tuple[type[Exception], dict[str, Any]]] = [
        (QueueFull, {"max_queue": 1}),
        (SourcesFull, {"source_images": sources, "max_source_bytes": 9}),
        (TooManyJobs, {"owner": "alice", "max_owned": 1}),
        (KeyReused, {"idempotency_key": "once", "fingerprint": "f2"}),
    ]
    first = await submit(queue, owner="alice", source_images=sources, idempotency_key="once", fingerprint="f1")
    before = await redis_client.dbsize(), await queue.stats(), await redis_client.xlen("glimmer:queue:interactive")
    for dry_run in (True, False):
        for error, options in refusals:
            with pytest.raises(error):
                await submit(queue, dry_run=dry_run, **options)
    known = {"idempotency_key": "once", "fingerprint": "f1", "max_queue": 0}
    assert await submit(queue, dry_run=True, **known) == first
    assert await submit(queue, dry_run=True, job_id="new", owner="bob", idempotency_key="other") == "new"
    assert await queue.get("new") is None
    assert before == (
        await redis_client.dbsize(),
        await queue.stats(),
        await redis_client.xlen("glimmer:queue:interactive"),
    )

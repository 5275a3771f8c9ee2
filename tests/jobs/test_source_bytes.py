"""The limit on the memory of source images in Redis, which every end of a job frees."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis.asyncio

from engine.errors import QueueFull, SourcesFull
from engine.jobs.job import JobError, SourceImages
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, claim, pass_deadline, submit

SOURCES = SourceImages([b"x" * 600, b"y" * 300], b"z" * 100)
LEASE_MS = 1


@pytest.fixture
def short_lease(redis_client: redis.asyncio.Redis) -> JobQueue:
    return JobQueue(redis_client, lease_ms=LEASE_MS)


async def held(queue: JobQueue) -> int:
    return (await queue.stats()).source_bytes


async def test_max_source_bytes_is_exact(queue: JobQueue) -> None:
    first = await submit(queue, source_images=SOURCES, max_source_bytes=2000)
    await submit(queue, source_images=SOURCES, max_source_bytes=2000)
    assert await held(queue) == 2000
    with pytest.raises(SourcesFull, match="bytes of sources"):
        await submit(queue, job_id="refused", source_images=SourceImages([b"1"]), max_source_bytes=2000)
    assert await queue.get("refused") is None
    assert await held(queue) == 2000
    await submit(queue, max_source_bytes=2000)  # without source images
    await queue.cancel(first)
    await submit(queue, source_images=SOURCES, max_source_bytes=2000)


async def test_max_source_bytes_holds_for_concurrent_submits(queue: JobQueue) -> None:
    answers = await asyncio.gather(
        *(submit(queue, source_images=SOURCES, max_source_bytes=5999) for _ in range(30)), return_exceptions=True
    )
    assert sum(isinstance(answer, SourcesFull) for answer in answers) == 25
    assert await held(queue) == 5000


async def test_one_edit_always_fits(queue: JobQueue) -> None:
    """Otherwise it would be refused for ever."""
    large = await submit(queue, source_images=SOURCES, max_source_bytes=10)
    with pytest.raises(SourcesFull):
        await submit(queue, source_images=SourceImages([b"1"]), max_source_bytes=10)
    await queue.cancel(large)
    await submit(queue, source_images=SOURCES, max_source_bytes=10)


async def test_max_queue_is_checked_before_max_source_bytes(queue: JobQueue) -> None:
    await submit(queue, source_images=SOURCES)
    with pytest.raises(QueueFull) as caught:
        await submit(queue, source_images=SOURCES, max_queue=1, max_source_bytes=10)
    assert not isinstance(caught.value, SourcesFull)


async def test_source_images_count_once(queue: JobQueue) -> None:
    """A repeated submit, by id or by idempotency key, adds none."""
    for job_id in ("a", "a", "b"):
        assert await submit(queue, job_id=job_id, source_images=SOURCES, idempotency_key="k", fingerprint="f") == "a"
    assert await held(queue) == 1000


async def test_a_requeued_job_keeps_its_source_images(queue: JobQueue) -> None:
    await submit(queue, source_images=SOURCES)
    assert await queue.requeue("engine-1", await claim(queue))
    assert await held(queue) == 1000
    await claim(queue)
    await queue.requeue_all("engine-1")
    assert await held(queue) == 1000
    assert await queue.source_images(await claim(queue, free=IDLE)) == SOURCES


async def _claim_late(queue: JobQueue, job_id: str) -> object:
    await pass_deadline(queue, job_id)
    await asyncio.sleep(3 * LEASE_MS / 1000)
    return await queue.claim("engine-2", IDLE)


async def _dead_letter(queue: JobQueue, job_id: str) -> None:
    for _ in range(5):
        await asyncio.sleep(3 * LEASE_MS / 1000)
        await queue.claim("engine-2", IDLE)


ENDS: dict[str, Callable[[JobQueue, str], Awaitable[object]]] = {
    "cancelled": lambda queue, job_id: queue.cancel(job_id),
    "discarded": lambda queue, job_id: queue.discard(job_id),
    "expired by a claim": _claim_late,
    "dead-lettered": _dead_letter,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", ["queued", "running"])
async def test_every_end_frees_the_memory(short_lease: JobQueue, state: str, end: str) -> None:
    job_id = await submit(short_lease, source_images=SOURCES)
    if state == "running":
        await claim(short_lease)
    assert await held(short_lease) == 1000
    await ENDS[end](short_lease, job_id)
    await _assert_all_is_freed(short_lease, job_id)


@pytest.mark.parametrize("end", ["done", "failed", "expired by renew", "expired by wait"])
async def test_the_end_of_a_run_frees_the_memory_once(queue: JobQueue, end: str) -> None:
    job_id = await submit(queue, source_images=SOURCES)
    granted = await claim(queue)
    if "expired" in end:
        await pass_deadline(queue, job_id)
        await (queue.renew("engine-1", [granted]) if "renew" in end else queue.wait(job_id))
    for _ in range(2):  # calls after the end have no effect
        await (queue.commit(granted, RESULT) if end == "done" else queue.fail(granted, JobError("no")))
        await queue.cancel(job_id)
    await _assert_all_is_freed(queue, job_id)


async def _assert_all_is_freed(queue: JobQueue, job_id: str) -> None:
    record = await queue.get(job_id)
    assert record is not None
    assert record.state.is_terminal
    assert await held(queue) == 0
    assert not await queue.client.exists(f"glimmer:sources:{job_id}")

"""The memory that the pictures of edits take in Redis: how much there may be, and that every end gives it back."""

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
def hasty(redis_client: redis.asyncio.Redis) -> JobQueue:
    return JobQueue(redis_client, lease_ms=LEASE_MS)


async def held(queue: JobQueue) -> int:
    return (await queue.stats()).source_bytes


async def test_the_cap_is_exact_and_says_what_is_full(queue: JobQueue) -> None:
    first = await submit(queue, source_images=SOURCES, max_source_bytes=2000)
    await submit(queue, source_images=SOURCES, max_source_bytes=2000)
    assert await held(queue) == 2000
    with pytest.raises(SourcesFull, match="bytes of sources"):
        await submit(queue, job_id="refused", source_images=SourceImages([b"1"]), max_source_bytes=2000)
    assert await queue.get("refused") is None
    assert await held(queue) == 2000
    await submit(queue, max_source_bytes=2000)  # one without pictures
    await queue.cancel(first)
    await submit(queue, source_images=SOURCES, max_source_bytes=2000)


async def test_the_cap_holds_when_all_come_at_once(queue: JobQueue) -> None:
    answers = await asyncio.gather(
        *(submit(queue, source_images=SOURCES, max_source_bytes=5999) for _ in range(30)), return_exceptions=True
    )
    assert sum(isinstance(answer, SourcesFull) for answer in answers) == 25
    assert await held(queue) == 5000


async def test_one_edit_always_finds_room(queue: JobQueue) -> None:
    """Otherwise it would be told for ever to come back later."""
    large = await submit(queue, source_images=SOURCES, max_source_bytes=10)
    with pytest.raises(SourcesFull):
        await submit(queue, source_images=SourceImages([b"1"]), max_source_bytes=10)
    await queue.cancel(large)
    await submit(queue, source_images=SOURCES, max_source_bytes=10)


async def test_a_full_queue_comes_first(queue: JobQueue) -> None:
    await submit(queue, source_images=SOURCES)
    with pytest.raises(QueueFull) as caught:
        await submit(queue, source_images=SOURCES, max_queue=1, max_source_bytes=10)
    assert not isinstance(caught.value, SourcesFull)


async def test_pictures_count_once(queue: JobQueue) -> None:
    """A submit that is repeated, or led to the job of an earlier one by its key, brings none of its own."""
    for job_id in ("a", "a", "b"):
        assert await submit(queue, job_id=job_id, source_images=SOURCES, idempotency_key="k", fingerprint="f") == "a"
    assert await held(queue) == 1000


async def test_a_job_that_is_handed_back_keeps_its_pictures(queue: JobQueue) -> None:
    await submit(queue, source_images=SOURCES)
    assert await queue.requeue("engine-1", await claim(queue))
    assert await held(queue) == 1000
    await claim(queue)
    await queue.requeue_all("engine-1")
    assert await held(queue) == 1000
    assert await queue.source_images(await claim(queue)) == SOURCES


async def _run_out(queue: JobQueue, job_id: str) -> object:
    await pass_deadline(queue, job_id)
    await asyncio.sleep(3 * LEASE_MS / 1000)
    return await queue.claim("engine-2", IDLE)


async def _give_up(queue: JobQueue, job_id: str) -> None:
    for _ in range(4):
        await asyncio.sleep(3 * LEASE_MS / 1000)
        await queue.claim("engine-2", IDLE)


ENDS: dict[str, Callable[[JobQueue, str], Awaitable[object]]] = {
    "cancelled": lambda queue, job_id: queue.cancel(job_id),
    "withdrawn": lambda queue, job_id: queue.discard(job_id),
    "expired where an engine meets it": _run_out,
    "given up": _give_up,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", ["queued", "running"])
async def test_every_end_gives_the_memory_back(hasty: JobQueue, state: str, end: str) -> None:
    job_id = await submit(hasty, source_images=SOURCES)
    if state == "running":
        await claim(hasty)
    assert await held(hasty) == 1000
    await ENDS[end](hasty, job_id)
    await _all_is_given_back(hasty, job_id)


@pytest.mark.parametrize("end", ["done", "failed", "expired while it is renewed", "expired while it is waited for"])
async def test_the_end_of_a_run_gives_the_memory_back_once(queue: JobQueue, end: str) -> None:
    job_id = await submit(queue, source_images=SOURCES)
    granted = await claim(queue)
    if "expired" in end:
        await pass_deadline(queue, job_id)
        await (queue.renew("engine-1", [granted]) if "renewed" in end else queue.wait(job_id))
    for _ in range(2):  # what comes after the end changes nothing
        await (queue.commit(granted, RESULT) if end == "done" else queue.fail(granted, JobError("no")))
        await queue.cancel(job_id)
    await _all_is_given_back(queue, job_id)


async def _all_is_given_back(queue: JobQueue, job_id: str) -> None:
    record = await queue.get(job_id)
    assert record is not None
    assert record.state.is_terminal
    assert await held(queue) == 0
    assert not await queue.client.exists(f"glimmer:sources:{job_id}")

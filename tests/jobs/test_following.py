"""Source images, notes, partial images and shared files of jobs, and their followers."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
import redis.asyncio

from engine.errors import KeyReused, QueueUnavailable, TooManyJobs
from engine.jobs.job import JobRecord, JobState, SourceImages
from engine.jobs.results import PartialImage
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, claim, submit

SOURCES = SourceImages([b"\x89PNG one", b"\x89PNG two"], b"overlay")


async def test_source_images_live_as_long_as_the_job(queue: JobQueue, redis_client: redis.asyncio.Redis) -> None:
    await submit(queue, source_images=SOURCES)
    held = await claim(queue)
    assert await queue.source_images(held) == SOURCES
    await queue.commit(held, RESULT)
    assert await queue.source_images(held) is None
    assert not await redis_client.keys("*sources*")


async def test_owner_and_notes_are_in_the_record(queue: JobQueue) -> None:
    await submit(queue, job_id="a", owner="me", notes={"quality": "low"})
    record = await queue.get("a")
    assert record is not None
    assert (record.owner, record.notes) == ("me", {"quality": "low"})


async def test_the_position_counts_the_jobs_before(queue: JobQueue) -> None:
    for job_id in "abc":
        await submit(queue, job_id=job_id)
    await claim(queue)
    records = [await queue.get(job_id) for job_id in "abc"]
    assert [record and record.position for record in records] == [None, 0, 1]


async def test_a_job_is_followed_from_the_queue_to_its_end(queue: JobQueue) -> None:
    await submit(queue, job_id="a", partial_images=2)
    updates: list[JobRecord | PartialImage] = []

    async def follow() -> None:
        updates.extend([update async for update in queue.follow("a")])

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.1)
    held = await claim(queue)
    partials = [PartialImage(0, index, b"%d" % index, {"rows": 1, "cols": 1, "tokens": [index]}) for index in (0, 1)]
    await queue.partial_image(held, partials[0])
    await queue.progress(held, {"phase": "rendering", "step": 1, "steps": 2})
    await asyncio.sleep(0.1)
    await queue.partial_image(held, partials[1])
    await queue.commit(held, RESULT)
    await asyncio.wait_for(following, 10)
    records = [update for update in updates if isinstance(update, JobRecord)]
    assert [update for update in updates if isinstance(update, PartialImage)] == partials
    assert records[0].state is JobState.QUEUED
    assert records[-1].state is JobState.SUCCEEDED
    assert {"phase": "rendering", "step": 1, "steps": 2} in [record.progress for record in records]
    assert updates[-1] is records[-1]


async def test_partial_images_of_a_lost_claim_are_refused(queue: JobQueue) -> None:
    await submit(queue, job_id="a", partial_images=2)
    stale = await claim(queue)
    await queue.requeue_all("engine-1")
    held = await claim(queue, "engine-2", IDLE)
    assert not await queue.partial_image(stale, PartialImage(0, 0, b"stale"))
    assert await queue.partial_image(held, PartialImage(0, 0, b"good"))
    await queue.commit(held, RESULT)
    assert [p.data async for p in queue.follow("a") if isinstance(p, PartialImage)] == [b"good"]


async def test_following_ends_at_the_deadline(queue: JobQueue) -> None:
    await submit(queue, job_id="a", timeout_s=0.2)
    async with asyncio.timeout(10):
        updates = [update async for update in queue.follow("a")]
    assert isinstance(updates[-1], JobRecord)
    assert updates[-1].state is JobState.EXPIRED


async def test_an_unknown_job_cannot_be_followed(queue: JobQueue) -> None:
    with pytest.raises(QueueUnavailable):
        await anext(queue.follow("none"))


async def test_a_closed_follower_leaves_no_waiter(queue: JobQueue) -> None:
    await submit(queue, job_id="a", partial_images=2)
    async with aclosing(queue.follow("a")) as updates:
        await anext(updates)
        assert queue.events._change_waiters
    assert not queue.events._change_waiters


async def test_a_discarded_job_leaves_nothing(queue: JobQueue, redis_client: redis.asyncio.Redis) -> None:
    await submit(queue, job_id="a", source_images=SOURCES, owner="me")
    held = await claim(queue)
    await queue.partial_image(held, PartialImage(0, 0, b"x"))
    await queue.discard("a")
    keys: list[Any] = await redis_client.keys("*")
    left = {key.decode().split(":")[1] for key in keys}
    assert left <= {"job", "counters", "queue", "attempt"}


async def test_shared_files(queue: JobQueue, redis_client: redis.asyncio.Redis) -> None:
    await queue.share_file("job", "token", b"image", "image/png")
    await queue.share_file("job", "token", b"another", "image/webp")  # the first stays
    assert await queue.shared_file("token") == b"image"
    assert await queue.shared_file_info("token") == ("image/png", len(b"image"))
    assert await queue.shared_file("other") is None
    assert await queue.shared_file_info("other") == (None, 0)
    [stored] = await redis_client.keys("*file*")
    assert 0 < await redis_client.pttl(stored) <= 1000 * queue.result_ttl_s


async def test_an_idempotency_key_returns_its_first_job(queue: JobQueue) -> None:
    key: dict[str, Any] = {"idempotency_key": "k", "fingerprint": "f"}
    assert await submit(queue, job_id="a", **key) == "a"
    assert await submit(queue, job_id="b", **key, max_queue=0) == "a"
    with pytest.raises(KeyReused):
        await submit(queue, job_id="c", idempotency_key="k", fingerprint="g")
    held = await claim(queue)
    assert await submit(queue, job_id="d", **key) == "a"
    await queue.commit(held, RESULT)
    assert await submit(queue, job_id="e", **key) == "a"
    await queue.discard("a")
    assert await submit(queue, job_id="f", **key) == "f"


async def test_max_owned_limits_the_jobs_of_an_owner(queue: JobQueue) -> None:
    mine: dict[str, Any] = {"owner": "me", "max_owned": 2}
    for job_id in "ab":
        await submit(queue, job_id=job_id, **mine)
    with pytest.raises(TooManyJobs):
        await submit(queue, job_id="c", **mine)
    await submit(queue, job_id="d", owner="you", max_owned=1)
    held = await claim(queue)
    with pytest.raises(TooManyJobs):
        await submit(queue, job_id="e", **mine)
    await queue.commit(held, RESULT)
    assert await submit(queue, job_id="f", **mine) == "f"

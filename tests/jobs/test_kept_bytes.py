"""What jobs keep in Redis is bounded in all and by owner, and counted until it is gone."""

import os
from io import BytesIO
from typing import Any, cast

import pytest
import redis.asyncio
from PIL import Image

from engine.errors import ResultsFull, TooMuchKept
from engine.jobs.job import JobState, OutputFormat, Plan, SourceImages
from engine.jobs.result_size import max_result_size
from engine.jobs.results import ImageResult, JobResult, PartialImage
from server.admission.redis_memory import RedisMemory
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, RESULT, claim, pass_deadline, spec, submit

LIMIT = 1_000_000
LARGE = JobResult([ImageResult(bytes(300_000), 7)], prompt_tokens=5, plan_tokens=260)


async def kept(queue: JobQueue) -> int:
    return (await queue.stats()).result_bytes


async def ended(queue: JobQueue, result: JobResult = LARGE, **options: Any) -> str:
    job_id = await submit(queue, **options)
    assert await queue.commit(await claim(queue), result)
    return job_id


async def test_results_are_bounded(queue: JobQueue) -> None:
    for _ in range(3):
        await ended(queue, max_result_bytes=LIMIT)
    assert 900_000 < await kept(queue) < LIMIT
    with pytest.raises(ResultsFull):
        await submit(queue, job_id="refused", max_result_bytes=LIMIT, width=512, height=512)
    assert await queue.get("refused") is None


async def test_jobs_count_with_what_they_may_come_to(queue: JobQueue) -> None:
    last = await submit(queue, max_result_bytes=LIMIT, width=300, height=300)
    for _ in range(2):
        await submit(queue, max_result_bytes=LIMIT, width=300, height=300)
    with pytest.raises(ResultsFull):
        await submit(queue, max_result_bytes=LIMIT, width=300, height=300)
    await queue.cancel(last)
    await submit(queue, max_result_bytes=LIMIT, width=300, height=300)


async def test_an_owner_may_keep_its_part_only(queue: JobQueue) -> None:
    limits: dict[str, Any] = {"max_result_bytes": LIMIT, "owner_parts": 2}
    await ended(queue, owner="anna", **limits)
    with pytest.raises(TooMuchKept):
        await submit(queue, owner="anna", width=300, height=300, **limits)
    await submit(queue, owner="bob", width=300, height=300, **limits)


async def test_an_owner_may_send_its_part_of_the_source_images_only(queue: JobQueue) -> None:
    images = SourceImages([b"x" * 400])
    limits: dict[str, Any] = {"max_source_bytes": 1000, "owner_parts": 2}
    first = await submit(queue, owner="anna", source_images=images, **limits)
    with pytest.raises(TooMuchKept):
        await submit(queue, owner="anna", source_images=images, **limits)
    await submit(queue, owner="anna", **limits)  # without source images
    await submit(queue, owner="bob", source_images=images, **limits)
    await queue.cancel(first)
    await submit(queue, owner="anna", source_images=images, **limits)


async def test_results_and_source_images_are_bounded_together(queue: JobQueue) -> None:
    await submit(queue, source_images=SourceImages([b"x" * 900_000]), max_kept_bytes=LIMIT)
    with pytest.raises(ResultsFull):
        await submit(queue, max_kept_bytes=LIMIT, width=300, height=300)


async def test_any_job_fits_where_little_is_kept(queue: JobQueue) -> None:
    """Otherwise it would be refused for ever."""
    await queue.cancel(await submit(queue, owner="anna", max_result_bytes=LIMIT, owner_parts=2))
    await submit(queue, owner="anna", max_result_bytes=LIMIT, owner_parts=2, width=2048, height=2048)


async def test_a_loop_of_submit_and_cancel_is_bounded(queue: JobQueue) -> None:
    limits: dict[str, Any] = {"max_result_bytes": LIMIT, "owner_parts": 2, "fingerprint": "f"}

    async def loop() -> None:
        for number in range(1000):
            key, prompt = f"key-{number}", "\1" * 30_000
            await queue.cancel(await submit(queue, owner="anna", prompt=prompt, idempotency_key=key, **limits))

    with pytest.raises(TooMuchKept):
        await loop()
    used = 0
    async for key in queue.client.scan_iter():
        used += await queue.client.memory_usage(key, samples=0) or 0
    assert used < LIMIT
    await submit(queue, owner="bob", **limits)


@pytest.mark.parametrize("end", ["cancel", "commit", "discard", "shorten"])
async def test_what_has_expired_counts_no_longer(redis_client: redis.asyncio.Redis, end: str) -> None:
    queue = JobQueue(redis_client, result_ttl_s=600)
    if end == "cancel":
        job_id = await submit(queue, owner="anna")
        await queue.cancel(job_id)
    else:
        job_id = await ended(queue, owner="anna")
        if end == "shorten":
            await queue.shorten_ttl(job_id)
        elif end == "discard":
            await queue.discard(job_id)
    await _pass_ttl(queue, job_id)
    next_id = await submit(queue, owner="anna")
    await queue.cancel(next_id)
    assert await _counted(queue) == {next_id}


async def _pass_ttl(queue: JobQueue, job_id: str) -> None:
    left = await queue.client.pttl(f"glimmer:job:{job_id}")
    until, now = await queue.client.zscore("glimmer:counters:kept_until", job_id), await queue.client.time()
    assert until is not None
    assert abs(until - 1000 * now[0] - left) < 2000, "it counts as long as it lives"
    await queue.client.delete(*(f"glimmer:{name}:{job_id}" for name in ("job", "result", "partials")))
    await _look_at(queue, job_id)


async def _look_at(queue: JobQueue, job_id: str) -> None:
    """Let the next submit look at a job."""
    await queue.client.zadd("glimmer:counters:kept_until", {job_id: 1})


async def _counted(queue: JobQueue) -> set[str]:
    return {job_id.decode() for job_id in await queue.client.hkeys("glimmer:counters:kept")}  # type: ignore[misc]


async def test_a_job_that_an_older_process_ended_is_counted_until_it_is_gone(queue: JobQueue) -> None:
    job_id = await submit(queue, width=2048, height=2048)
    estimate = await kept(queue)
    await queue.client.hset(f"glimmer:job:{job_id}", "state", "cancelled")  # type: ignore[misc]
    await queue.client.pexpire(f"glimmer:job:{job_id}", 600_000)
    await _look_at(queue, job_id)
    await queue.cancel(await submit(queue))
    assert job_id in await _counted(queue)
    assert await kept(queue) < estimate / 100


async def test_a_submit_ends_jobs_that_nothing_ended(queue: JobQueue) -> None:
    """Their API has died, and no engine runs."""
    late = await submit(queue, max_queue=1)
    await pass_deadline(queue, late)
    await _look_at(queue, late)
    await submit(queue, max_queue=1)
    record = await queue.get(late)
    assert record is not None
    assert record.state is JobState.EXPIRED


async def test_a_submit_passes_a_damaged_record(queue: JobQueue) -> None:
    job_id = await submit(queue)
    await queue.client.set(f"glimmer:job:{job_id}", "damaged")
    await _look_at(queue, job_id)
    await submit(queue)
    assert (await queue.stats()).waiting == 1


async def test_files_count_as_long_as_they_are_served(queue: JobQueue) -> None:
    job_id = await ended(queue, url_copies=True)
    both = await kept(queue)
    assert both > 600_000
    await queue.share_file(job_id, "token", LARGE.images[0].data, "image/png")
    await queue.shorten_ttl(job_id)
    assert 300_000 < await kept(queue) < 310_000
    until, file_ttl = await queue.client.zscore("glimmer:counters:kept_until", job_id), 600_000
    assert until is not None
    assert until - 1000 * (await queue.client.time())[0] > file_ttl - 5000
    await queue.discard(job_id)
    assert 300_000 < await kept(queue) < 310_000


async def test_a_discarded_result_no_longer_counts(queue: JobQueue) -> None:
    job_id = await ended(queue)
    await queue.discard(job_id)
    assert await kept(queue) < 10_000


async def test_the_counts_expire_with_the_last_data(redis_client: redis.asyncio.Redis) -> None:
    queue = JobQueue(redis_client, result_ttl_s=600)
    names = [f"glimmer:counters:{name}" for name in ("kept", "kept_until", "kept_total")]
    await ended(queue)
    assert all([await redis_client.pttl(name) > 590_000 for name in names])
    await submit(queue)
    assert all([await redis_client.pttl(name) == -1 for name in names])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_no_result_takes_more_than_was_counted_before(queue: JobQueue, output_format: OutputFormat) -> None:
    """Noise at the highest quality takes most."""
    file = BytesIO()
    Image.frombytes("RGB", (256, 128), os.urandom(256 * 128 * 3)).save(file, output_format, quality=100)
    options: dict[str, Any] = {"output_format": output_format, "width": 256, "height": 128, "n": 3, "partial_images": 2}
    job_id = await submit(queue, **options)
    estimate, granted = await kept(queue), await claim(queue, free=IDLE)
    for image in range(3):
        for index in range(2):
            await queue.partial_image(granted, PartialImage(image, index, file.getvalue(), {"tokens": [9999] * 32}))
    await queue.commit(granted, JobResult([ImageResult(file.getvalue(), 2**63 - 1)] * 3, 5, 260))
    assert await queue.result(job_id) is not None
    assert await kept(queue) <= estimate


def test_256_waiting_images_fit_the_default() -> None:
    from server.settings import ServerSettings

    size = max_result_size(spec(width=1024, height=1024)) + 4096
    assert 256 * size < ServerSettings().result_bytes / 2


async def test_an_idempotency_key_lives_as_long_as_its_record(queue: JobQueue) -> None:
    job_id = await submit(queue, timeout_s=3600, idempotency_key="k", fingerprint="f")
    assert await queue.client.pttl("glimmer:idempotency:k") > 3600_000
    await queue.cancel(job_id)
    assert 599_000 < await queue.client.pttl("glimmer:idempotency:k") <= 600_000


async def test_a_small_result_frees_what_was_counted_for_it(queue: JobQueue) -> None:
    await ended(queue, RESULT, width=2048, height=2048, n=10)
    assert await kept(queue) < 10_000


async def test_cached_plans_are_bounded(queue: JobQueue) -> None:
    plan = Plan(1000, 700, [16383] * 700_000)
    for number in range(20):
        await queue.cache_plan(f"key-{number}", plan, ttl_s=60)
    found = await queue.cached_plans([f"key-{number}" for number in range(20)])
    count = sum(cached is not None for cached in found)
    assert 10 < count < 20
    assert found == [None] * (20 - count) + [plan] * count, "the oldest gave way"
    assert int(await queue.client.get("glimmer:counters:plan_bytes") or 0) <= 2**26


async def test_an_expired_plan_counts_no_longer(queue: JobQueue) -> None:
    await queue.cache_plan("a", Plan(1, 1, [1] * 1000), ttl_s=60)
    await queue.cache_plan("a", Plan(1, 1, [1] * 1000), ttl_s=60)
    [member] = cast(list[bytes], await queue.client.zrange("glimmer:counters:plans", 0, -1))
    await queue.client.zadd("glimmer:counters:plans", {member: 1})
    await queue.cache_plan("b", Plan(1, 1, [1]), ttl_s=60)
    assert int(await queue.client.get("glimmer:counters:plan_bytes") or 0) < 1000


async def used(queue: JobQueue) -> int:
    return (await queue.memory_use()).used


@pytest.mark.parametrize("tokens", [1, 100, 2000])
async def test_cached_plans_count_with_all_they_take(queue: JobQueue, tokens: int) -> None:
    plan, before = Plan(1, 1, [9999] * tokens), await used(queue)
    for number in range(2000):
        await queue.cache_plan(f"{number:064}", plan, ttl_s=60)
    taken = await used(queue) - before
    assert 0.8 * taken < int(await queue.client.get("glimmer:counters:plan_bytes") or 0) < 2 * taken


async def test_cached_plans_take_a_part_of_little_memory_which_jobs_do_not_get(queue: JobQueue) -> None:
    maximum = 2**24 + await used(queue)
    await queue.client.config_set("maxmemory", maximum)
    try:
        for number in range(1500):
            await queue.cache_plan(f"{number:064}", Plan(1, 1, [9999] * 200), ttl_s=60)
        taken = int(await queue.client.get("glimmer:counters:plan_bytes") or 0)
        assert 0.9 * maximum / 16 < taken <= maximum / 16
        allowed = await RedisMemory(queue).max_kept_bytes()
        assert allowed is not None
        assert allowed + maximum / 16 <= 0.8 * maximum + 1
    finally:
        await queue.client.config_set("maxmemory", 0)


@pytest.mark.parametrize("calls", [["discard"] * 3, ["shorten_ttl"] * 3, ["discard", "shorten_ttl"] * 2])
async def test_repeated_calls_count_files_as_long_as_they_are_there(queue: JobQueue, calls: list[str]) -> None:
    job_id = await ended(queue, url_copies=True, owner="anna")
    await queue.share_file(job_id, "token", LARGE.images[0].data, "image/png")
    until = await queue.client.zscore("glimmer:counters:kept_until", job_id)
    for call in calls:
        await getattr(queue, call)(job_id)
        assert 300_000 < await kept(queue) < 310_000
        assert await queue.client.zscore("glimmer:counters:kept_until", job_id) == until

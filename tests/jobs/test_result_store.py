"""Images of results in object storage: what is written when, and what is left."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import StartError, StoreMissing, StoreUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, JobSpec, JobState
from engine.jobs.producer import JobProducer
from engine.jobs.result_store import ResultStore
from engine.jobs.result_store_url import check_result_store
from engine.jobs.results import ImageResult, JobResult, StoredObject
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE, claim, submit
from tests.object_storage import ObjectStorage

DATA = bytes(range(256)) * 4


def images(count: int = 2) -> list[ImageResult]:
    return [ImageResult(DATA + bytes([index]), seed=index, plan={"rows": index}) for index in range(count)]


async def store_and_commit(queue: JobQueue, granted: Claim) -> bool:
    stored = await queue.store_images(granted, images())
    if not await queue.commit(granted, JobResult(stored, prompt_tokens=5, plan_tokens=260)):
        await queue.drop_images(stored)
        return False
    return True


@pytest.mark.parametrize(
    "url",
    ["s3:/bucket", "http://bucket", "s3://", "s3://b", "s3://Bucket/x", "s3://bucket//x", "s3://bucket/a b"],
)
def test_urls_that_are_not_of_a_bucket_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        check_result_store(url)


def test_a_store_can_be_left_out_or_be_a_whole_bucket() -> None:
    assert check_result_store("") is None
    assert check_result_store("s3://glimmer.images/") == "s3://glimmer.images/"


async def test_a_bucket_that_is_not_there_is_an_error_at_the_start(bucket: str) -> None:
    with pytest.raises(StartError, match="needs an existing bucket"):
        await ResultStore(f"s3://{bucket}-2").check()
    await ResultStore(f"s3://{bucket}").check()


@pytest.mark.parametrize("endpoint", ["minio:9000", "https://", "http://a b", "s3://x"])
def test_an_endpoint_that_is_no_url_is_an_error_at_the_start(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(StartError, match="AWS_ENDPOINT_URL_S3: write it like https://"):
        ResultStore("s3://images")


async def test_redis_has_only_where_the_images_are(
    storing_queue: JobQueue, redis_client: redis.asyncio.Redis, bucket: str, object_storage: ObjectStorage
) -> None:
    job_id = await submit(storing_queue)
    granted = await claim(storing_queue)
    assert await store_and_commit(storing_queue, granted)
    assert await redis_client.hkeys(f"glimmer:result:{job_id}") == [b"meta"]  # type: ignore[misc]
    result = await storing_queue.stored_result(job_id, max_bytes=2**20)
    assert result is not None
    assert [(image.size, image.seed, image.plan, image.data) for image in result.images] == [
        (len(DATA) + 1, index, {"rows": index}, None) for index in (0, 1)
    ]
    for index, image in enumerate(result.images):
        assert await storing_queue.result_image(job_id, index, image.key) == DATA + bytes([index])
        async with httpx.AsyncClient() as browser:
            link = await browser.get(await storing_queue.image_link(image.key or ""))
        assert (link.content, link.headers["content-type"]) == (DATA + bytes([index]), "image/png")
    assert object_storage.keys(bucket) == {f"results/{image.key}" for image in result.images}


async def test_an_object_that_is_gone_is_none(storing_queue: JobQueue) -> None:
    assert await storing_queue.result_image("job", 0, "job/1-0.png") is None


async def test_links_lead_to_the_public_endpoint(bucket: str) -> None:
    store = ResultStore(f"s3://{bucket}/p", "https://images.example.org")
    stored = await store.put("a.png", DATA, "image/png")
    link = await store.link(stored.key, 600)
    assert link.startswith(f"https://images.example.org/{bucket}/p/a.png?")
    assert "X-Amz-Expires=600" in link
    assert await store.get("a.png") == DATA


async def test_an_api_without_the_setting_says_which(
    storing_queue: JobQueue, redis_client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = await submit(storing_queue)
    await store_and_commit(storing_queue, await claim(storing_queue))
    other = JobProducer(redis_client)
    result = await other.stored_result(job_id, max_bytes=2**20)
    assert result is not None
    with pytest.raises(StoreMissing, match="GLIMMER_RESULT_STORE"):
        await other.result_image(job_id, 0, result.images[0].key)
    assert "result_store_missing setting=GLIMMER_RESULT_STORE" in caplog.text
    await other.close()


async def test_engines_without_the_setting_keep_images_in_redis(storing_queue: JobQueue, queue: JobQueue) -> None:
    job_id = await submit(storing_queue)
    assert await store_and_commit(queue, await claim(queue))
    result = await storing_queue.result(job_id)
    assert result is not None
    assert [image.data for image in result.images] == [image.data for image in images()]


async def test_images_in_object_storage_take_no_room_in_redis(storing_queue: JobQueue, queue: JobQueue) -> None:
    limits: dict[str, Any] = {"timeout_s": 60, "priority": "interactive", "max_queue": 9, "max_result_bytes": 2**20}
    spec = JobSpec("x", 1024, 1024, seed=1)
    for number in range(8):
        await storing_queue.submit(spec, job_id=f"j{number}", **limits)


class FaultyStore(ResultStore):
    """Fails as planned: "refused" stores nothing, "unanswered" stores the object, but says that it failed; "lost" is a
    claim that another engine takes over meanwhile.
    """

    def __init__(self, url: str, faults: Sequence[str], take_over: Any):
        super().__init__(url)
        self._faults, self._take_over = itertools.chain(faults, itertools.repeat("")), take_over

    async def put(self, key: str, data: bytes, media_type: str) -> StoredObject:
        fault = next(self._faults)
        if fault == "refused":
            raise StoreUnavailable("planted")
        stored = await super().put(key, data, media_type)
        if fault == "unanswered":
            raise StoreUnavailable("planted")
        if fault == "lost":
            await self._take_over()
        return stored


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["", "refused", "unanswered", "lost"]), max_size=8), st.booleans())
def test_a_result_never_refers_to_an_object_that_is_not_there(
    redis_server: EmbeddedRedis, object_storage: ObjectStorage, faults: list[str], is_cancelled: bool
) -> None:
    """An engine may fail to store, and lose its claim between an object and its commit to one that commits first."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_storage.environment.items():
            patch.setenv(name, value)
        object_storage.make_bucket("faulty")
        asyncio.run(_run_with_faults(redis_server.url, faults, is_cancelled))


async def _run_with_faults(url: str, faults: list[str], is_cancelled: bool) -> None:
    client = connect(url)
    rescuer = JobQueue(client, lease_ms=0, result_store=ResultStore("s3://faulty"))
    committed = 0

    async def take_over() -> None:
        nonlocal committed
        if is_cancelled:
            await rescuer.cancel(job_id)
        elif again := await rescuer.claim("rescuer", IDLE):
            has_committed = await store_and_commit(rescuer, again)
            committed += has_committed

    engine = JobQueue(client, result_store=FaultyStore("s3://faulty", faults, take_over))
    job_id = await submit(engine)
    granted = await claim(engine)
    for _ in range(9):  # as long as the store may fail
        try:
            has_committed = await store_and_commit(engine, granted)
            committed += has_committed
            break
        except StoreUnavailable:
            pass
    record, result = await engine.get(job_id), await engine.stored_result(job_id, max_bytes=0)
    assert record is not None
    assert record.state is (JobState.SUCCEEDED if committed else JobState.CANCELLED)
    assert committed == (result is not None) <= 1
    for index, image in enumerate(result.images if result else ()):
        assert await engine.result_image(job_id, index, image.key) == images()[index].data
    await client.flushdb()
    for queue in (engine, rescuer):
        await queue.close()
    await client.aclose()

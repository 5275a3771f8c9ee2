"""A worker with object storage for its results, which fails and comes back."""

import asyncio
import time
from dataclasses import replace

import pytest

from engine.jobs.job import JobState
from engine.worker import job_runner
from engine.worker.encoding import encode, metadata
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.test_worker import SPEC, submit, working
from tests.job_queue import JobQueue
from tests.object_storage import MORTAL_BUCKET, ObjectStorage
from tests.waiting import until


async def image_of(queue: JobQueue, job_id: str) -> bytes | None:
    record, result = await queue.wait(job_id), await queue.stored_result(job_id, max_bytes=0)
    assert record.state is JobState.SUCCEEDED, record.error
    assert result is not None
    return await queue.result_image(job_id, 0, result.images[0].key)


async def test_objects_have_the_bytes_that_redis_would(storing_queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    [[pixels]] = engine.generate([SPEC])
    async with working(storing_queue, engine):
        await submit(storing_queue, SPEC, "j")
        assert await image_of(storing_queue, "j") == encode(pixels, "png", 100, metadata(SPEC, SPEC.seed))


async def test_an_outage_delays_jobs_and_nothing_else(
    mortal_queue: JobQueue, mortal_storage: ObjectStorage, model: GlmImage
) -> None:
    engine = small_engine(model)
    mortal_storage.kill()
    async with working(mortal_queue, engine):
        for number in range(3):
            await submit(mortal_queue, replace(SPEC, seed=number), f"j{number}")
        await until(lambda: engine.metrics.result_store_failures._value.get() >= 3, 60)
        began = time.monotonic()
        while time.monotonic() - began < 1.5:  # heartbeats and leases go on
            assert await mortal_queue.engines()
            await asyncio.sleep(0.1)
        assert not (await mortal_queue.ended_among(["j0", "j1", "j2"])).get("j0")
        mortal_storage.start()
        mortal_storage.make_bucket(MORTAL_BUCKET)
        assert all([await image_of(mortal_queue, f"j{number}") for number in range(3)])


async def test_a_long_outage_fails_its_jobs_only(
    mortal_queue: JobQueue, mortal_storage: ObjectStorage, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "STORE_TIMEOUT_S", 0.2)
    mortal_storage.kill()
    async with working(mortal_queue, small_engine(model)):
        await submit(mortal_queue, SPEC, "in the outage")
        record = await mortal_queue.wait("in the outage")
        assert record.state is JobState.FAILED
        assert record.error is not None
        assert (record.error.type, record.error.code) == ("server_error", "result_store_unavailable")
        mortal_storage.start()
        mortal_storage.make_bucket(MORTAL_BUCKET)
        await submit(mortal_queue, SPEC, "after it")
        assert await image_of(mortal_queue, "after it")


async def test_a_job_that_was_cancelled_meanwhile_leaves_no_object(
    storing_queue: JobQueue,
    bucket: str,
    object_storage: ObjectStorage,
    model: GlmImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = storing_queue.result_store
    assert store is not None
    put = store.put

    async def cancelling(*of: str) -> object:
        stored = await put(*of)  # type: ignore[arg-type]
        await storing_queue.cancel("j")
        return stored

    monkeypatch.setattr(store, "put", cancelling)
    async with working(storing_queue, small_engine(model)):
        await submit(storing_queue, SPEC, "j")
        assert (await storing_queue.wait("j")).state is JobState.CANCELLED
        await until(lambda: not object_storage.keys(bucket), 20)

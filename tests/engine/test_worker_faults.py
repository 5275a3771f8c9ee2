"""A failure before or after the engine's work ends only its job."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.connection import connect
from engine.jobs.embedded import EmbeddedRedis
from engine.jobs.job import Claim, JobSpec, JobState, OutputFormat, SourceImages
from engine.jobs.results import JobResult
from engine.worker import encoding, job_runner
from engine.worker.encoding import encode, metadata
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.test_worker import submit, working
from tests.job_queue import JobQueue
from tests.jobs.helpers import pass_deadline
from tests.source_images import source_image, source_images

GOOD = JobSpec('a poster "HELLO"', 64, 64, seed=1, num_inference_steps=3)
VICTIM = replace(GOOD, seed=9, output_format="webp")
EDIT = JobSpec("make it 'RED'", 64, 64, seed=2, num_inference_steps=3, num_sources=1)


@pytest.fixture
async def isolated_queue(tmp_path: Path) -> AsyncIterator[JobQueue]:
    """Yield a queue with a Redis server of its own, whose limits a test can change."""
    with EmbeddedRedis(tmp_path, fsync="no") as server:
        client = connect(server.url)
        queue = JobQueue(client)
        yield queue
        await queue.close()
        await client.aclose()


def expected(engine: Engine) -> bytes:
    [[pixels]] = engine.generate([GOOD])
    return encode(pixels, "png", 100, metadata(GOOD, GOOD.seed))


async def image_of(queue: JobQueue, job_id: str) -> bytes:
    record, result = await queue.wait(job_id), await queue.result(job_id)
    assert record.state is JobState.SUCCEEDED, record.error
    assert result is not None
    return result.images[0].data


async def error_code(queue: JobQueue, job_id: str) -> str | None:
    record = await queue.wait(job_id)
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error.type == "server_error"
    return record.error.code


@pytest.mark.parametrize(
    ("stage", "planted", "code"),
    [
        ("preprocess_images", MemoryError(), "out_of_memory"),
        ("preprocess_images", RuntimeError("planted"), "engine_error"),
        ("encode", OSError("planted"), "engine_error"),
        ("apply_overlay", ValueError("planted"), "engine_error"),
    ],
)
async def test_a_failure_outside_the_engine_ends_only_its_job(
    queue: JobQueue, model: GlmImage, stage: str, planted: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail an edit with an overlay, as a WebP, between two other jobs."""
    engine = small_engine(model)
    target = engine if stage == "preprocess_images" else encoding
    real = getattr(target, stage)

    def fails_for_the_victim(given: Any, *rest: Any) -> Any:
        if stage != "encode" or rest[0] == "webp":
            raise planted
        return real(given, *rest)

    want = expected(engine)
    monkeypatch.setattr(target, stage, fails_for_the_victim)
    async with working(queue, engine):
        await submit(queue, GOOD, "before")
        await queue.submit(
            replace(EDIT, output_format="webp"),
            job_id="victim",
            timeout_s=60,
            priority="interactive",
            max_queue=9,
            source_images=source_images(source_image(1, 64, 64), overlay=source_image(2, 64, 64).convert("RGBA")),
        )
        await submit(queue, GOOD, "after")
        assert await error_code(queue, "victim") == code
        assert [await image_of(queue, job_id) for job_id in ("before", "after")] == [want, want]


async def test_a_failing_partial_image_does_not_fail_its_job(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("planted")

    engine = small_engine(model)
    want = expected(engine)
    monkeypatch.setattr(encoding, "resize", broken)
    async with working(queue, engine):
        await submit(queue, replace(GOOD, partial_images=2), "j")
        assert await image_of(queue, "j") == want
    assert engine.metrics.partial_images._value.get() == 2


async def test_a_result_refused_once_is_written_later(
    isolated_queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, attempts = isolated_queue.commit, 0

    async def commit(claim: Claim, result: JobResult) -> bool:
        nonlocal attempts
        attempts += 1
        await isolated_queue.client.config_set("maxmemory", 1 if attempts == 1 else 0)
        try:
            return await real(claim, result)
        finally:
            await isolated_queue.client.config_set("maxmemory", 0)

    engine = small_engine(model)
    want = expected(engine)
    monkeypatch.setattr(isolated_queue, "commit", commit)
    async with working(isolated_queue, engine):
        await submit(isolated_queue, GOOD, "j")
        assert await image_of(isolated_queue, "j") == want
    assert attempts == 2


async def _limit_value_size(queue: JobQueue) -> None:
    await queue.client.config_set("proto-max-bulk-len", 1 << 20)


async def _limit_memory(queue: JobQueue) -> None:
    await queue.client.config_set("maxmemory", (await queue.client.info("memory"))["used_memory"] + (6 << 20))


@pytest.mark.parametrize("limit", [_limit_value_size, _limit_memory])
async def test_a_result_too_large_for_redis_fails_only_its_job(
    isolated_queue: JobQueue, model: GlmImage, limit: Callable[[JobQueue], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write the results of other jobs between its attempts."""

    def large(pixels: Any, output_format: OutputFormat, *rest: Any) -> bytes:
        return bytes(8 << 20) if output_format == "webp" else encode(pixels, output_format, *rest)

    engine = small_engine(model)
    want = expected(engine)
    monkeypatch.setattr(encoding, "encode", large)
    monkeypatch.setattr(job_runner, "MAX_WRITE_ATTEMPTS", 2)
    async with working(isolated_queue, engine):
        await limit(isolated_queue)
        await submit(isolated_queue, VICTIM, "victim")
        await submit(isolated_queue, GOOD, "good")
        assert await image_of(isolated_queue, "good") == want
        assert await error_code(isolated_queue, "victim") == "result_too_large"
        assert await isolated_queue.result("victim") is None
        await _submit_when_there_is_room(isolated_queue, "later")
        assert await image_of(isolated_queue, "later") == want
    assert (await isolated_queue.stats()).running == 0


async def _submit_when_there_is_room(queue: JobQueue, job_id: str) -> None:
    """Submit with retries: the last attempt's buffer takes memory in Redis for a second or two."""
    async with asyncio.timeout(20):
        while True:
            with suppress(QueueUnavailable):
                return await submit(queue, GOOD, job_id)
            await asyncio.sleep(0.2)


async def test_a_job_whose_deadline_passes_during_preprocessing_is_not_started(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expire it long before its lease is renewed, which would end it, too."""
    engine, loop, seen, left = small_engine(model), asyncio.get_running_loop(), list[object](), list[float]()

    def too_late(given: SourceImages) -> list[Any]:
        [job] = worker._jobs.values()
        left.append(job.request.deadline_at - time.monotonic())
        asyncio.run_coroutine_threadsafe(pass_deadline(queue, "late"), loop).result(20)
        job.request.deadline_at = time.monotonic()
        return [model.preprocessor.read(file) for file in given.files]

    monkeypatch.setattr(engine, "preprocess_images", too_late)
    monkeypatch.setattr(model, "encode_source", seen.append)
    async with working(queue, engine, lease_s=300.0) as worker:
        given = source_images(source_image(1, 64, 64))
        await queue.submit(EDIT, job_id="late", timeout_s=600, priority="interactive", max_queue=9, source_images=given)
        async with asyncio.timeout(20):
            while (record := await queue.get("late")) is None or not record.state.is_terminal:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    assert (record.state, record.runs) == (JobState.EXPIRED, 1)
    assert not seen
    assert engine.metrics.jobs.labels("expired")._value.get() == 1
    assert 500 < left[0] <= 600, "by the clock of Redis"

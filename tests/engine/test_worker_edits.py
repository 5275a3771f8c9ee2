"""Edits with a real queue and a real engine: source images come from the queue, an overlay covers the result."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.jobs.job import JobSpec, JobState, QueueStats, SourceImages
from engine.worker.encoding import apply_overlay, encode, metadata
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.test_worker import until_running, working
from tests.job_queue import JobQueue
from tests.source_images import png, source_image, source_images

SPEC = JobSpec("make it 'RED'", 100, 64, seed=1, num_inference_steps=3, num_sources=1)


def mask(width: int, height: int) -> Image.Image:
    """Return an overlay that is opaque on the left, half transparent in the middle, and transparent on the right."""
    alpha = np.zeros((height, width), np.uint8)
    alpha[:, : width // 3] = 255
    alpha[:, width // 3 : width // 2] = 128
    overlay = source_image(50, width, height).convert("RGBA")
    overlay.putalpha(Image.fromarray(alpha))
    return overlay


async def submit(queue: JobQueue, spec: JobSpec, job_id: str, given: SourceImages | None) -> None:
    await queue.submit(spec, job_id=job_id, timeout_s=60, priority="interactive", max_queue=100, source_images=given)


async def test_results_hold_the_engine_s_images(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    given = source_images(source_image(1, 96, 64), source_image(2, 64, 128))
    spec = JobSpec("both", 64, 96, seed=4, n=2, num_inference_steps=2, num_sources=2, return_plan=True)
    [expected] = engine.generate([spec], [given])
    async with working(queue, engine):
        await submit(queue, spec, "edit", given)
        await submit(queue, JobSpec("no edit", 64, 64, seed=1, num_inference_steps=2), "generation", None)
        assert (await queue.wait("edit")).state is JobState.SUCCEEDED
        assert (await queue.wait("generation")).state is JobState.SUCCEEDED
        result, other = await queue.result("edit"), await queue.result("generation")
    assert result is not None
    assert other is not None
    assert [image.data for image in result.images] == [
        encode(pixels, "png", 100, metadata(spec, spec.seed + index)) for index, pixels in enumerate(expected)
    ]
    assert all(image.plan is not None and "preview" not in image.plan for image in result.images)
    assert result.source_tokens == 6 + 8
    assert result.prompt_tokens == len(model.prompts.encode("both", 96, 64, num_sources=2)) - 2 + 14
    assert result.plan_tokens == 2 * 6
    assert other.source_tokens == 0


async def test_an_overlay_covers_the_result(queue: JobQueue, model: GlmImage) -> None:
    engine, overlay = small_engine(model), mask(100, 64)
    given = source_images(source_image(1, 96, 64), overlay=overlay)
    [[made]] = engine.generate([SPEC], [given])
    async with working(queue, engine):
        await submit(queue, SPEC, "j", given)
        assert (await queue.wait("j")).state is JobState.SUCCEEDED
        result = await queue.result("j")
    assert result is not None
    assert result.images[0].data == encode(apply_overlay(made, png(overlay)), "png", 100, metadata(SPEC, SPEC.seed))


def test_opaque_pixels_of_an_overlay_are_kept_exactly() -> None:
    made, overlay = torch.from_numpy(np.array(source_image(3, 99, 64))), mask(99, 64)
    got, kept = apply_overlay(made, png(overlay)).numpy(), np.array(overlay)[:, :, :3]
    assert np.array_equal(got[:, :33], kept[:, :33])
    assert np.array_equal(got[:, 49:], made[:, 49:].numpy())
    between = (kept[:, 33:49].astype(float) * 128 + made[:, 33:49].numpy() * 127.0) / 255
    assert np.abs(got[:, 33:49] - between).max() <= 1


async def test_an_invalid_source_image_fails_only_its_job(queue: JobQueue, model: GlmImage) -> None:
    async with working(queue, small_engine(model)):
        await submit(queue, SPEC, "bad", SourceImages([b"not an image"]))
        await submit(queue, SPEC, "good", source_images(source_image(1, 96, 64)))
        bad = await queue.wait("bad")
        assert bad.state is JobState.FAILED
        assert bad.error is not None
        assert (bad.error.type, bad.error.param, bad.error.code) == (
            "invalid_request_error",
            "image",
            "invalid_image_file",
        )
        assert (await queue.wait("good")).state is JobState.SUCCEEDED


async def test_an_edit_cancelled_during_preprocessing_is_not_rendered(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, started, proceed = small_engine(model), asyncio.Event(), asyncio.Event()
    loop, real = asyncio.get_running_loop(), engine.preprocess_images

    def slowly(given: SourceImages):
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(proceed.wait(), loop).result(20)
        return real(given)

    monkeypatch.setattr(engine, "preprocess_images", slowly)
    async with working(queue, engine):
        await submit(queue, SPEC, "gone", source_images(source_image(1, 96, 64)))
        await asyncio.wait_for(started.wait(), 20)
        assert await queue.cancel("gone")
        proceed.set()
    assert engine.metrics.images._value.get() == 0
    record = await queue.get("gone")
    assert record is not None
    assert record.state is JobState.CANCELLED


async def test_an_edit_whose_source_images_do_not_fit_stays_in_the_queue(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model, source_patches=30)
    spec = replace(SPEC, num_inference_steps=40, source_tokens=6)  # 24 patches
    async with working(queue, engine):
        for number in range(3):
            await submit(queue, replace(spec, seed=number), f"j{number}", source_images(source_image(number, 96, 64)))
        await until_running(queue, "j0")
        while (stats := await queue.stats()) != QueueStats(0, 0):
            assert stats.running <= 1
            await asyncio.sleep(0.02)
        for number in range(3):
            assert (await queue.wait(f"j{number}")).state is JobState.SUCCEEDED


async def test_a_bound_on_source_tokens_counts_only_until_preprocessing(queue: JobQueue, model: GlmImage) -> None:
    """Run both edits, which fit together although their bounds do not."""
    engine = small_engine(model, source_patches=70)
    spec = replace(SPEC, num_inference_steps=200, source_tokens=10)
    async with working(queue, engine):
        for number in range(2):
            await submit(queue, replace(spec, seed=number), f"j{number}", source_images(source_image(number, 96, 64)))
        for number in range(2):
            await until_running(queue, f"j{number}")
        assert (await queue.stats()).running == 2
        for number in range(2):
            await queue.cancel(f"j{number}")


async def test_the_cached_plan_of_an_edit_serves_only_the_same_source_images(queue: JobQueue, model: GlmImage) -> None:
    engine, one, two = small_engine(model), source_image(1, 96, 64), source_image(2, 96, 64)
    spec = replace(SPEC, num_sources=2)
    again = replace(spec, num_inference_steps=2)
    pairs = [source_images(one, two), source_images(one, two), source_images(two, one)]
    expected = engine.generate([spec, again, again], pairs)
    written, hits = (
        engine.metrics.planner_tokens._value,
        engine.metrics.plan_cache_hits._value,
    )
    async with working(queue, engine):
        for number, (requested, given, cached) in enumerate(zip([spec, again, again], pairs, [0, 1, 1], strict=True)):
            before = written.get()
            await submit(queue, requested, f"j{number}", given)
            assert (await queue.wait(f"j{number}")).state is JobState.SUCCEEDED
            result = await queue.result(f"j{number}")
            assert result is not None
            assert result.images[0].data == encode(expected[number][0], "png", 100, metadata(requested, requested.seed))
            assert hits.get() == cached
            assert written.get() == before + (0 if number == 1 else spec.image_plan_tokens)

"""The worker with a real queue and a real engine."""

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image as PillowImage

from engine.config import EXIT_STUCK, EngineSettings
from engine.engine import Engine
from engine.errors import QueueUnavailable
from engine.jobs.job import EngineInfo, FreeCapacity, JobRecord, JobSpec, JobState, Plan
from engine.jobs.results import PartialImage
from engine.observability.tracing import Tracing
from engine.request import Planned, Request
from engine.worker import watchdog
from engine.worker.encoding import encode, metadata
from engine.worker.worker import Worker
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.job_queue import JobQueue
from tests.source_images import source_image, source_images
from tests.waiting import until

SPEC = JobSpec('a poster "HELLO"', 64, 64, seed=1, num_inference_steps=3)


@asynccontextmanager
async def working(
    queue: JobQueue, engine: Engine, tracing: Tracing = Tracing(), **settings: float
) -> AsyncIterator[Worker]:
    """Run a worker; drain it at the end."""
    config = EngineSettings(redis_url="", engine_id=f"engine-{time.monotonic_ns()}", **settings)  # type: ignore[arg-type]
    info = EngineInfo(config.engine_id, 1, "all", "ready", "m", "64x64", 512, 2048)
    worker = Worker(engine, queue, info, config, tracing)
    running = asyncio.ensure_future(worker.run())
    try:
        yield worker
    finally:
        worker.drain()
        await running
        engine.step()  # takes in the last cancellations
        assert engine.is_idle
        engine.check_integrity()


async def submit(queue: JobQueue, spec: JobSpec, job_id: str, timeout_s: float = 60) -> None:
    await queue.submit(spec, job_id=job_id, timeout_s=timeout_s, priority="interactive", max_queue=100)


async def until_running(queue: JobQueue, job_id: str) -> JobRecord:
    async with asyncio.timeout(20):
        while True:
            record = await queue.get(job_id)
            if record is not None and record.progress:
                return record
            await asyncio.sleep(0.02)


async def test_results_hold_the_engine_s_images(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    specs = [
        replace(SPEC, n=2, return_plan=True),
        replace(SPEC, seed=9, output_format="jpeg", output_compression=70),
        replace(SPEC, seed=8, output_format="webp"),
    ]
    expected = engine.generate(specs)
    async with working(queue, engine):
        for number, spec in enumerate(specs):
            await submit(queue, spec, f"j{number}")
        for number, spec in enumerate(specs):
            assert (await queue.wait(f"j{number}")).state is JobState.SUCCEEDED
            result = await queue.result(f"j{number}")
            assert result is not None
            for index, image in enumerate(result.images):
                assert image.data == _file(expected[number][index], spec, index)
                assert image.seed == spec.seed + index
                assert (image.plan is not None) == spec.return_plan
            assert result.plan_tokens == spec.plan_tokens
            assert result.prompt_tokens == len(model.prompts.encode(spec.prompt, 64, 64))
    assert engine.metrics.jobs.labels("succeeded")._value.get() == 3


async def test_an_invalid_request_fails_alone(queue: JobQueue, model: GlmImage) -> None:
    async with working(queue, small_engine(model)):
        await submit(queue, replace(SPEC, prompt="a <|image|>"), "bad")
        await submit(queue, SPEC, "good")
        bad = await queue.wait("bad")
        assert bad.state is JobState.FAILED
        assert bad.error is not None
        assert (bad.error.type, bad.error.param) == ("invalid_request_error", "prompt")
        assert (await queue.wait("good")).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("planted", "code"), [(torch.OutOfMemoryError("planted"), "out_of_memory"), (ValueError("secret"), "engine_error")]
)
async def test_an_internal_failure_is_reported_without_its_text(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch, planted: Exception, code: str
) -> None:
    engine = small_engine(model)

    def broken(image):
        raise planted

    monkeypatch.setattr(engine.renderer.runner, "prepare", broken)
    async with working(queue, engine):
        await submit(queue, SPEC, "j")
        record = await queue.wait("j")
    assert record.error is not None
    assert (record.error.type, record.error.code) == ("server_error", code)
    assert str(planted) not in record.error.message


async def test_a_failing_encoder_fails_only_its_job(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pixels, output_format, *_):
        if output_format == "webp":
            raise OSError("planted")
        return b"png"

    monkeypatch.setattr("engine.worker.encoding.encode", broken)
    async with working(queue, small_engine(model)):
        await submit(queue, replace(SPEC, output_format="webp"), "bad")
        await submit(queue, SPEC, "good")
        assert (await queue.wait("bad")).state is JobState.FAILED
        assert (await queue.wait("good")).state is JobState.SUCCEEDED


async def test_a_cancelled_job_frees_the_engine_at_once(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    async with working(queue, engine, lease_s=300):  # not at the next renewal
        await submit(queue, replace(SPEC, num_inference_steps=200, width=256, height=256, n=4), "long")
        await until_running(queue, "long")
        assert await queue.cancel("long")
        await until(lambda: engine.is_idle, seconds=3)  # a step of this engine takes far less than a second
        assert engine.metrics.images._value.get() == 0
        assert engine.planner.scheduler.allocator.used == 0


async def test_a_job_past_its_deadline_expires(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    async with working(queue, engine):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=512, height=512, n=4), "late", timeout_s=1.0)
        assert (await queue.wait("late")).state is JobState.EXPIRED
        await until(lambda: engine.is_idle, seconds=3)


async def test_a_second_run_starts_from_the_plans_of_the_first(queue: JobQueue, model: GlmImage) -> None:
    """Lose the first engine after planning; the second renders the same bytes without planning."""
    engine = small_engine(model)
    [[expected]] = engine.generate([replace(SPEC, num_inference_steps=30)])
    await submit(queue, replace(SPEC, num_inference_steps=30), "j")
    claim = await queue.claim("first", FreeCapacity(8, 100_000, 0, True))
    assert claim is not None
    assert not claim.plans
    [plan] = _plans(engine, claim.spec)
    assert await queue.checkpoint_plan(claim, 0, plan)
    await queue.requeue_all("first")
    written = engine.metrics.planner_tokens._value.get()
    async with working(queue, engine):
        assert (await queue.wait("j")).state is JobState.SUCCEEDED
        result = await queue.result("j")
    assert result is not None
    assert result.images[0].data == _file(expected, SPEC)
    assert engine.metrics.planner_tokens._value.get() == written


def _file(pixels: torch.Tensor, spec: JobSpec, index: int = 0) -> bytes:
    """Return the file a worker makes of an image."""
    return encode(pixels, spec.output_format, spec.output_compression, metadata(spec, spec.seed + index))


def _plans(engine: Engine, spec: JobSpec) -> list[Plan]:
    engine.submit(Request("plan-only", spec))
    plans: list[Plan] = []
    while not plans:
        plans = [event.plan for event in engine.step() if isinstance(event, Planned)]
    engine.cancel("plan-only")
    engine.step()
    return plans


async def test_a_worker_checkpoints_plans(queue: JobQueue, model: GlmImage) -> None:
    async with working(queue, small_engine(model), grace_s=0.0):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=256, height=256), "j")
        async with asyncio.timeout(30):
            while (await until_running(queue, "j")).progress["phase"] != "rendering":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    claim = await queue.claim("second", FreeCapacity(8, 100_000, 0, True))
    assert claim is not None
    assert list(claim.plans) == [0]


async def test_a_drain_finishes_running_jobs_and_claims_no_more(queue: JobQueue, model: GlmImage) -> None:
    async with working(queue, small_engine(model)) as worker:
        await submit(queue, replace(SPEC, num_inference_steps=20), "running", timeout_s=20)
        await until_running(queue, "running")
        worker.drain()
        await submit(queue, SPEC, "later")
        assert (await queue.wait("running")).state is JobState.SUCCEEDED
    later = await queue.get("later")
    assert later is not None
    assert (later.state, later.runs) == (JobState.QUEUED, 0)
    assert await queue.engines() == []


async def test_after_the_grace_period_jobs_are_requeued_and_the_run_does_not_count(
    queue: JobQueue, model: GlmImage
) -> None:
    async with working(queue, small_engine(model), grace_s=0.1):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=512, height=512), "long")
        await until_running(queue, "long")
    record = await queue.get("long")
    assert record is not None
    assert (record.state, record.runs) == (JobState.QUEUED, 0)


async def test_a_second_drain_requeues_at_once(queue: JobQueue, model: GlmImage) -> None:
    async with working(queue, small_engine(model), grace_s=300.0) as worker:
        await submit(queue, replace(SPEC, num_inference_steps=200, width=512, height=512), "long")
        await until_running(queue, "long")
        worker.drain()
    record = await queue.get("long")
    assert record is not None
    assert (record.state, record.runs) == (JobState.QUEUED, 0)


@pytest.mark.parametrize("blinks", [{"requeue": 1}, {"requeue": 1, "requeue_all": 2}])
async def test_a_drain_blames_no_job_though_redis_blinks(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch, blinks: dict[str, int]
) -> None:
    def flaky(name: str, real: Any) -> Any:
        async def call(*arguments: Any) -> Any:
            if blinks[name]:
                blinks[name] -= 1
                raise QueueUnavailable("planted")
            return await real(*arguments)

        return call

    for name in blinks:
        monkeypatch.setattr(queue, name, flaky(name, getattr(queue, name)))
    async with working(queue, small_engine(model), grace_s=0.1):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=512, height=512), "long")
        await until_running(queue, "long")
    assert not any(blinks.values())
    record = await queue.get("long")
    assert record is not None
    assert (record.state, record.runs) == (JobState.QUEUED, 0)


async def test_heartbeats_report_the_engine_s_load(queue: JobQueue, model: GlmImage) -> None:
    async with working(queue, small_engine(model)):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=256, height=256, n=3), "j")
        async with asyncio.timeout(10):
            while True:
                engines = await queue.engines()
                if engines and engines[0].images_running == 3:
                    break
                await asyncio.sleep(0.1)
        assert engines[0].state == "ready"
        [metrics] = (await queue.engine_metrics()).values()
        assert "glimmer_kv_blocks " in metrics
        await queue.cancel("j")


async def test_a_lost_device_ends_the_worker_and_requeues_its_jobs(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)

    def lost(items: list) -> None:
        raise torch.AcceleratorError("device lost")

    monkeypatch.setattr(engine.renderer.runner, "advance", lost)
    config = EngineSettings(redis_url="", engine_id="doomed")
    worker = Worker(engine, queue, EngineInfo("doomed", 1, "all", "ready", "m", "64x64", 512, 2048), config)
    await submit(queue, SPEC, "j")
    with pytest.raises(torch.AcceleratorError):
        await worker.run()
    record = await queue.get("j")
    assert record is not None
    assert (record.state, record.runs) == (JobState.QUEUED, 1)  # the run counts: the job may be the cause


async def test_a_step_that_hangs_ends_the_process_and_requeues_its_jobs(
    queue: JobQueue, model: GlmImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, over, codes = small_engine(model), threading.Event(), list[int]()

    def end_process(code: int) -> None:
        codes.append(code)
        over.set()  # a thread cannot be killed in a test either
        raise RuntimeError("the process ends")

    monkeypatch.setattr(engine.renderer.runner, "advance", lambda items: over.wait())
    monkeypatch.setattr(watchdog, "STEP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(watchdog, "CPU_TIMEOUT_PER_MEGAPIXEL_S", 0.0)
    monkeypatch.setattr(watchdog, "TICK_S", 0.1)
    monkeypatch.setattr(watchdog.os, "_exit", end_process)
    info = EngineInfo("hung", 1, "all", "ready", "m", "64x64", 512, 2048)
    worker = Worker(engine, queue, info, EngineSettings(redis_url="", engine_id="hung"))
    await submit(queue, SPEC, "j")
    with pytest.raises(RuntimeError, match="the process ends"):
        await worker.run()
    assert codes == [EXIT_STUCK]
    record = await queue.get("j")
    assert record is not None
    assert (record.state, record.runs) == (JobState.QUEUED, 1)


async def test_jobs_beyond_the_capacity_stay_in_the_queue(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model, max_images=2)
    async with working(queue, engine):
        for number in range(5):
            await submit(queue, replace(SPEC, num_inference_steps=60, width=128, height=128), f"j{number}")
        await until_running(queue, "j1")
        assert (await queue.stats()).running <= 2
        for number in range(5):
            assert (await queue.wait(f"j{number}")).state is JobState.SUCCEEDED


async def test_a_job_taken_over_by_another_engine_is_dropped(queue: JobQueue, redis_client, model: GlmImage) -> None:
    """Take the job over: the worker neither finishes nor commits it."""
    engine = small_engine(model)
    async with working(queue, engine, lease_s=1.0):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=512, height=512, n=4), "j")
        await until_running(queue, "j")
        other = JobQueue(redis_client, lease_ms=0)
        claim = await other.claim("other", FreeCapacity(8, 100_000, 0, True))
        assert claim is not None
        await until(lambda: engine.is_idle, seconds=5)
        assert engine.metrics.images._value.get() == 0
        record = await queue.get("j")
        assert record is not None
        assert record.state is JobState.RUNNING
        assert await queue.requeue("other", claim)
        await queue.cancel("j")
        await other.close()


@pytest.mark.parametrize("damage", ["spec", "sources", "plans"])
async def test_a_damaged_job_fails_alone(queue: JobQueue, redis_client: Any, model: GlmImage, damage: str) -> None:
    sources = source_images(source_image(1, 64, 64))
    edit = replace(SPEC, num_sources=1, source_tokens=64)
    await queue.submit(edit, job_id="bad", timeout_s=60, priority="interactive", max_queue=9, source_images=sources)
    if damage == "spec":
        await redis_client.hset("glimmer:job:bad", "spec", '{"prompt":5}')
    else:
        await redis_client.delete(f"glimmer:{damage}:bad")
        await redis_client.set(f"glimmer:{damage}:bad", "text")
    await submit(queue, SPEC, "good")
    async with working(queue, small_engine(model)):
        assert (await queue.wait("good")).state is JobState.SUCCEEDED
        await until(lambda: _has_failed(redis_client, "bad"), seconds=20)


async def _has_failed(client: Any, job_id: str) -> bool:
    state, error = await client.hmget(f"glimmer:job:{job_id}", "state", "error")
    return state == b"failed" and b"job_unreadable" in error


async def test_an_engine_survives_errors_of_redis(queue: JobQueue, redis_client: Any, model: GlmImage) -> None:
    """An error of a kind that no list names, for the calls beside a running job."""
    async with working(queue, small_engine(model), lease_s=1.0):
        await submit(queue, replace(SPEC, num_inference_steps=200, width=128, height=128), "running")
        await until_running(queue, "running")
        await redis_client.delete("glimmer:engines")
        await redis_client.set("glimmer:engines", "text")  # for heartbeats
        await redis_client.rename("glimmer:queue:batch", "glimmer:batch")
        await redis_client.set("glimmer:queue:batch", "text")  # for claims
        await asyncio.sleep(1.5)
        await redis_client.delete("glimmer:engines", "glimmer:queue:batch")
        await redis_client.rename("glimmer:batch", "glimmer:queue:batch")
        assert (await queue.wait("running")).state is JobState.SUCCEEDED
        await submit(queue, SPEC, "next")
        assert (await queue.wait("next")).state is JobState.SUCCEEDED


async def test_partial_images_reach_the_job_s_followers(queue: JobQueue, model: GlmImage) -> None:
    spec = replace(SPEC, width=96, height=128, partial_images=2, output_format="jpeg")
    received: list[JobRecord | PartialImage] = []
    async with working(queue, small_engine(model)):
        await submit(queue, spec, "j")
        async for event in queue.follow("j"):
            received.append(event)
    partials = [event for event in received if isinstance(event, PartialImage)]
    assert [(p.image, p.index) for p in partials] == [(0, 0), (0, 1)]
    assert all(PillowImage.open(io.BytesIO(p.data)).size == (96, 128) for p in partials)
    assert isinstance(received[-1], JobRecord)
    assert received[-1].state is JobState.SUCCEEDED


async def test_a_cached_plan_serves_every_request_with_the_same_plan(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    again = [replace(SPEC, num_inference_steps=5, guidance_scale=3.0), replace(SPEC, seed=0, n=2)]
    expected = engine.generate([SPEC, *again])
    written, hits = (
        engine.metrics.planner_tokens._value,
        engine.metrics.plan_cache_hits._value,
    )
    before, tokens = written.get(), SPEC.image_plan_tokens
    async with working(queue, engine):
        for number, (spec, new) in enumerate(zip([SPEC, *again], [1, 0, 1], strict=True)):
            await submit(queue, spec, f"j{number}")
            assert (await queue.wait(f"j{number}")).state is JobState.SUCCEEDED
            result = await queue.result(f"j{number}")
            assert result is not None
            assert [i.data for i in result.images] == [_file(p, spec, i) for i, p in enumerate(expected[number])]
            assert written.get() == before + new * tokens
            before = written.get()
    assert hits.get() == 2


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.3}, {"seed": 2}, {"width": 96}, {"prompt": "b"}])
async def test_a_request_with_another_plan_is_planned(queue: JobQueue, model: GlmImage, change: dict[str, Any]) -> None:
    engine = small_engine(model)
    async with working(queue, engine):
        for number, spec in enumerate([SPEC, replace(SPEC, **change)]):
            await submit(queue, spec, f"j{number}")
            assert (await queue.wait(f"j{number}")).state is JobState.SUCCEEDED
    assert engine.metrics.plan_cache_hits._value.get() == 0


async def test_the_plan_cache_can_be_disabled(queue: JobQueue, model: GlmImage) -> None:
    engine = small_engine(model)
    async with working(queue, engine, plan_cache_s=0):
        for number in range(2):
            await submit(queue, SPEC, f"j{number}")
            await queue.wait(f"j{number}")
    assert engine.metrics.plan_cache_hits._value.get() == 0

"""Planner and renderer in engines of their own: the same bytes, and what goes between them."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import redis.asyncio
import torch
from torch import nn

from engine.engine import Engine
from engine.jobs.job import JobSpec, JobState, Plan, SourceImages, Stage
from engine.jobs.results import JobResult, PartialImage
from engine.limits import EngineLimits
from models.glm_image.model import GlmImage
from tests.checkpoints import small_engine
from tests.engine.test_worker import SPEC, working
from tests.job_queue import JobQueue
from tests.jobs.helpers import IDLE
from tests.source_images import source_image, source_images
from tests.waiting import until

SOURCES = source_images(source_image(1, 64, 96), source_image(2, 96, 64))
EDIT = replace(SPEC, num_sources=2, source_tokens=64, return_plan=True, seed=9)
LARGE = replace(  # more work than its preview, which an image does not wait for
    SPEC, n=2, seed=30, width=256, height=256, num_inference_steps=20, partial_images=3
)
CASES: dict[str, tuple[JobSpec, SourceImages | None]] = {
    "generation": (replace(SPEC, return_plan=True), None),
    "three images": (replace(SPEC, n=3, seed=20, width=96, guidance_scale=1.0), None),
    "partial images": (LARGE, None),
    "edit": (EDIT, SOURCES),
    "edit with partial images": (replace(EDIT, n=2, partial_images=2, num_inference_steps=5), SOURCES),
    "equal plan": (replace(SPEC, guidance_scale=3.0), None),
    "edit with an equal plan": (replace(EDIT, guidance_scale=3.0), SOURCES),
    "greedy": (replace(SPEC, seed=40, temperature=0.0, output_format="jpeg"), None),
}
Outcome = tuple[JobResult | None, dict[tuple[int, int], PartialImage]]


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> dict[Stage, GlmImage]:
    stages: tuple[Stage, ...] = ("plan", "render")
    return {stage: GlmImage.load(str(checkpoint), torch.device("cpu"), torch.float32, stage) for stage in stages}


@pytest.fixture(scope="module")
def engines(models: dict[Stage, GlmImage]) -> dict[Stage, Engine]:
    return {stage: small_engine(model) for stage, model in models.items()}


@asynccontextmanager
async def fleet(client: redis.asyncio.Redis, *engines: Engine) -> AsyncIterator[JobQueue]:
    """Run a worker for each engine; yield a queue for clients."""
    async with AsyncExitStack() as stack:
        for engine in engines:
            queue = JobQueue(client, stage=engine.model.stage)
            stack.push_async_callback(queue.close)
            await stack.enter_async_context(working(queue, engine))
        clients = JobQueue(client)
        stack.push_async_callback(clients.close)
        yield clients


async def outcome(queue: JobQueue, name: str, spec: JobSpec, sources: SourceImages | None) -> Outcome:
    """Submit a job and return its result and its partial images."""
    options: dict[str, Any] = {"timeout_s": 60, "priority": "interactive", "max_queue": 100}
    await queue.submit(spec, job_id=name, source_images=sources, **options)
    partials = {}
    async for update in queue.follow(name):
        if isinstance(update, PartialImage):
            partials[update.image, update.index] = update
    return await queue.result(name), partials


async def outcomes(queue: JobQueue, cases: dict[str, tuple[JobSpec, SourceImages | None]]) -> dict[str, Outcome]:
    """Run jobs side by side; those with a plan that is known then come after the others."""
    found: dict[str, Outcome] = {}
    for known in (False, True):
        names = [name for name in cases if ("equal" in name) == known]
        found |= zip(names, await asyncio.gather(*(outcome(queue, name, *cases[name]) for name in names)), strict=True)
    return found


def test_weights_of_the_other_stage_are_not_loaded(model: GlmImage, models: dict[Stage, GlmImage]) -> None:
    networks = {
        "plan": ("vision", "planner"),
        "render": ("renderer", "glyphs.encoder", "autoencoder.vae"),
    }
    for stage, loaded in models.items():
        for owner, names in networks.items():
            for name in names:
                network = loaded
                for part in name.split("."):
                    network = getattr(network, part)
                devices = {tensor.device.type for tensor in cast(nn.Module, network).parameters()}
                assert devices == {"cpu" if stage == owner else "meta"}, (stage, name)
    _, planner, renderer = model.fingerprints()
    assert models["plan"].fingerprints() == ("", planner, "")
    assert models["render"].fingerprints() == ("", "", renderer)
    assert models["plan"].planning_fingerprint() == model.planning_fingerprint()
    assert EngineLimits.choose(models["render"]).kv_tokens == 0


async def test_stages_apart_give_the_bytes_of_one_engine(
    redis_client: redis.asyncio.Redis, model: GlmImage, engines: dict[Stage, Engine]
) -> None:
    """Images, plans, token counts and partial images of every kind of request; also those with a plan of a client."""
    async with fleet(redis_client, small_engine(model)) as queue:
        expected = await outcomes(queue, CASES)
        plans = {name: result.images[0].plan for name, (result, _) in expected.items() if result}
        given = {
            f"{name}, given": (replace(spec, plan=plans[name]), sources)
            for name, (spec, sources) in CASES.items()
            if plans[name]
        }
        assert len(given) == 4
        expected |= await outcomes(queue, given)
    await redis_client.flushdb()
    async with fleet(redis_client, *engines.values()) as queue:
        found = await outcomes(queue, CASES) | await outcomes(queue, given)
    for name in expected:
        assert found[name] == expected[name], name
    assert len(expected["partial images"][1]) == 6
    assert engines["plan"].metrics.images._value.get() == 0
    assert engines["render"].metrics.planner_tokens._value.get() == 0
    assert engines["plan"].metrics.plan_cache_hits._value.get() == 2
    handed_over = engines["plan"].metrics.handed_over._value.get()
    assert handed_over == len(CASES) + len(given)


async def test_an_engine_of_all_stages_works_beside_both(
    redis_client: redis.asyncio.Redis, model: GlmImage, engines: dict[Stage, Engine]
) -> None:
    cases = {name: (replace(spec, seed=spec.seed + 1), sources) for name, (spec, sources) in CASES.items()}
    async with fleet(redis_client, small_engine(model)) as queue:
        expected = await outcomes(queue, cases)
    await redis_client.flushdb()
    async with fleet(redis_client, *engines.values(), small_engine(model, max_images=4)) as queue:
        assert await outcomes(queue, cases) == expected


async def test_a_preview_comes_while_its_job_is_planned(
    redis_client: redis.asyncio.Redis, engines: dict[Stage, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop the planner until the client has the previews."""
    planner, shown = engines["plan"].planner, threading.Event()
    real = planner.runner.decode

    def decode(sequences: list[Any]) -> Any:
        if all(sequence.image.preview for sequence in sequences):
            shown.wait(8)
        return real(sequences)

    monkeypatch.setattr(planner.runner, "decode", decode)
    async with fleet(redis_client, *engines.values()) as queue:
        await queue.submit(LARGE, job_id="j", timeout_s=60, priority="interactive", max_queue=9)
        early = []
        async for update in queue.follow("j"):
            if isinstance(update, PartialImage) and not shown.is_set():
                early.append((update.image, update.index))
                if len(early) == LARGE.n:
                    shown.set()
        assert (await queue.wait("j")).state is JobState.SUCCEEDED
    assert sorted(early) == [(0, 0), (1, 0)]


async def test_no_preview_runs_beside_a_suspect(
    redis_client: redis.asyncio.Redis, engines: dict[Stage, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is it offered for one."""
    runner = engines["render"].renderer.runner
    together, over, real = list[int](), threading.Event(), runner.advance

    def advance(renderings: list[Any]) -> None:
        together.append(len({rendering.request.id for rendering in renderings}))
        over.wait(8)
        real(renderings)

    monkeypatch.setattr(runner, "advance", advance)
    planner = JobQueue(redis_client, stage="plan")
    await planner.submit(SPEC, job_id="suspect", timeout_s=60, priority="interactive", max_queue=9)
    dead = await planner.claim("dead", IDLE)
    assert dead is not None
    await planner.requeue_all("dead")
    async with fleet(redis_client, *engines.values()) as queue:
        await until(lambda: bool(together), 20)
        spec = replace(SPEC, partial_images=1, num_inference_steps=2)
        for number in range(2):
            other = replace(spec, seed=100 + number)  # or its plan is known, and has no preview of its own
            await queue.submit(other, job_id=f"j{number}", timeout_s=60, priority="interactive", max_queue=9)
        await until(lambda: _has_previews(redis_client, 2), 5)
        await asyncio.sleep(0.7)  # longer than a poll
        assert set(together) == {1}
        over.set()
        for job_id in ("suspect", "j0", "j1"):
            assert (await queue.wait(job_id)).state is JobState.SUCCEEDED
    await planner.close()


async def _has_previews(client: Any, count: int) -> bool:
    return await client.llen("glimmer:previews") == count


async def test_a_job_is_cancelled_in_either_stage(
    redis_client: redis.asyncio.Redis, engines: dict[Stage, Engine]
) -> None:
    spec = replace(SPEC, num_inference_steps=200, width=512, height=512)
    planner, renderer = engines["plan"], engines["render"]
    async with fleet(redis_client, planner) as queue:
        await queue.submit(spec, job_id="planned", timeout_s=60, priority="interactive", max_queue=9)
        await until(lambda: not planner.is_idle, 20)
        assert await queue.cancel("planned")
        await until(lambda: planner.is_idle, 20)
        await queue.submit(replace(spec, seed=2), job_id="waits", timeout_s=60, priority="interactive", max_queue=9)
        await until(lambda: _backlog(queue, 1), 20)
        assert await queue.cancel("waits")
        await queue.submit(replace(spec, seed=3), job_id="rendered", timeout_s=60, priority="interactive", max_queue=9)
        await until(lambda: _backlog(queue, 1), 20)
    async with fleet(redis_client, renderer) as queue:
        await until(lambda: not renderer.is_idle, 20)
        assert await queue.cancel("rendered")
        await until(lambda: renderer.is_idle, 20)


async def _backlog(queue: JobQueue, to_render: int) -> bool:
    stats = await queue.stats()
    return stats.to_plan == 0 and stats.to_render == to_render


@pytest.mark.parametrize("field", ["handed_over", "0"])
async def test_a_renderer_fails_a_job_whose_plan_is_lost(
    redis_client: Any, engines: dict[Stage, Engine], field: str
) -> None:
    planner = JobQueue(redis_client, stage="plan")
    await planner.submit(SPEC, job_id="j", timeout_s=60, priority="interactive", max_queue=9)
    granted = await planner.claim("planner", IDLE)
    assert granted is not None
    await planner.hand_over("planner", granted, {0: Plan(2, 2, [1] * 4)}, 3, [])
    await redis_client.hdel("glimmer:plans:j", field)
    async with fleet(redis_client, engines["render"]) as queue:
        record = await queue.wait("j")
    assert record.error is not None
    assert record.error.code == "job_unreadable"
    await planner.close()

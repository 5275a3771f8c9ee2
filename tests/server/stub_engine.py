"""An engine without a model, for the real queue. An image follows from the prompt, the seed and the source images."""

import asyncio
import hashlib
import io
import os
from contextlib import suppress
from typing import Self

from PIL import Image

from engine.errors import QueueUnavailable
from engine.geometry import Grid
from engine.jobs.job import Claim, EngineInfo, FreeCapacity, JobError, JobSpec, Plan, SourceImages, TokenGrid
from engine.jobs.results import ImageResult, JobResult, PartialImage
from tests.job_queue import JobQueue

CODEBOOK_SIZE = 128
DEFAULT_SIZE = "96x64"
HEARTBEAT_TTL_S = 2.0


def stub_image(spec: JobSpec, seed: int, sources: SourceImages | None = None, stage: str = "") -> bytes:
    """Return the stub's image: one colour per request, below the overlay of an edit.

    Args:
        stage: of a partial image, which has its own colour.
    """
    digest = hashlib.sha256(f"{spec.prompt}|{seed}|{stage}".encode())
    for source in sources.files if sources else ():
        digest.update(source)
    red, green, blue = digest.digest()[:3]
    image, buffer = Image.new("RGB", (spec.width, spec.height), (red, green, blue)), io.BytesIO()
    if sources and sources.overlay:
        overlay = Image.open(io.BytesIO(sources.overlay))
        image.paste(overlay, mask=overlay.getchannel("A"))
    image.save(buffer, spec.output_format)
    return buffer.getvalue()


def _tokens(grid: Grid, seed: int) -> TokenGrid:
    return TokenGrid(grid.rows, grid.cols, [(seed + index) % CODEBOOK_SIZE for index in range(grid.tokens)])


def plan_for(spec: JobSpec, seed: int) -> Plan:
    """Return the stub's plan, which counts up from the seed."""
    *preview, plan = (_tokens(grid, seed) for grid in spec.grids)
    return Plan(plan.rows, plan.cols, plan.tokens, preview[0] if preview else None)


def partial_image(spec: JobSpec, image: int, index: int, sources: SourceImages | None = None) -> PartialImage:
    """Return a partial image: the first of the first grid the planner writes, the others of the plan."""
    seed = spec.seed + image
    grid = _tokens(spec.grids[0 if index == 0 else -1], seed)
    return PartialImage(image, index, stub_image(spec, seed, sources, f"partial {index}"), grid.to_dict())


class StubEngine:
    """Runs up to `slots` jobs at once, with `step_s` seconds per denoising step.

    `failures` maps a prompt to the error with which its jobs fail, after their partial images; `specs` and `sources`
    collect what was claimed.
    """

    def __init__(self, queue: JobQueue, *, step_s: float = 0.0, slots: int = 8, metrics: str = ""):
        self.info = EngineInfo("stub-engine", os.getpid(), "all", "ready", "stub", DEFAULT_SIZE, CODEBOOK_SIZE, 2048)
        self.failures: dict[str, JobError] = {}
        self.specs: list[JobSpec] = []
        self.sources: list[SourceImages | None] = []
        self._queue, self._step_s, self._slots, self._metrics = queue, step_s, slots, metrics
        self._running: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._queue.heartbeat(self.info, self._metrics, HEARTBEAT_TTL_S)
        self._loops = [asyncio.create_task(loop()) for loop in (self._beat, self._claim, self._drop_ended)]
        return self

    async def __aexit__(self, *raised: object) -> None:
        pending: set[asyncio.Task[None]] = {*self._loops, *self._running.values()}
        while pending:  # repeatedly: Python 3.11's `wait_for`, which the Redis client uses, can lose a cancellation
            for task in pending:
                task.cancel()
            _ended, pending = await asyncio.wait(pending, timeout=0.05)

    async def _beat(self) -> None:
        while True:
            with suppress(QueueUnavailable):
                await self._queue.heartbeat(self.info, self._metrics, HEARTBEAT_TTL_S)
            await asyncio.sleep(HEARTBEAT_TTL_S / 4)

    async def _claim(self) -> None:
        while True:
            free = self._slots - len(self._running)
            try:
                capacity = FreeCapacity(free, 10**9, 10**9, not self._running)
                claim = await self._queue.claim(self.info.id, capacity) if free else None
            except QueueUnavailable:
                claim = None
            if claim is None:
                await self._queue.wait_for_work(0.02)
                continue
            self.specs.append(claim.spec)
            task = asyncio.create_task(self._run(claim))
            self._running[claim.job_id] = task
            task.add_done_callback(lambda _, job_id=claim.job_id: self._running.pop(job_id, None))

    async def _drop_ended(self) -> None:
        async for job_id in self._queue.ended():
            if job_id in self._running:
                self._running[job_id].cancel()

    async def _run(self, claim: Claim) -> None:
        spec = claim.spec
        sources = await self._queue.source_images(claim) if spec.num_sources else None
        self.sources.append(sources)
        pause = self._step_s * spec.num_inference_steps / (spec.partial_images + 1)
        for index in range(spec.partial_images):
            await asyncio.sleep(pause)
            for image in range(spec.n):
                await self._queue.partial_image(claim, partial_image(spec, image, index, sources))
            await self._queue.progress(claim, {"phase": "rendering", "step": index, "steps": spec.num_inference_steps})
        await asyncio.sleep(pause)
        if spec.prompt in self.failures:
            await self._queue.fail(claim, self.failures[spec.prompt])
            return
        images = [self._image(spec, spec.seed + index, sources) for index in range(spec.n)]
        prompt_tokens = len(spec.prompt.split()) + spec.source_tokens
        images = await self._queue.store_images(claim, images)
        result = JobResult(images, prompt_tokens, spec.plan_tokens, source_tokens=spec.source_tokens)
        await self._queue.commit(claim, result)

    @staticmethod
    def _image(spec: JobSpec, seed: int, sources: SourceImages | None) -> ImageResult:
        plan = spec.plan or plan_for(spec, seed).to_dict()
        return ImageResult(stub_image(spec, seed, sources), seed, plan if spec.return_plan else None)

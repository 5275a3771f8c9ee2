"""An engine process: takes jobs from the queue, runs them on the engine, commits what comes out.

The engine has a thread of its own and does nothing else. Everything that waits is here, on an event loop: claiming,
renewing leases, encoding, committing, heartbeats. Every job has one task (`_run_job`) that sees it to its end, so that
a failure is that job's alone.
"""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import torch

from engine.config import EXIT_STUCK, EngineSettings
from engine.engine import Engine
from engine.errors import DeadlinePassed, QueueUnavailable, RequestError, WriteRefused
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import Claim, EngineInfo, FreeCapacity, ImageResult, JobResult, JobState, PartialImage
from engine.observability.logs import bind, event, where
from engine.observability.tracing import Span, Tracing
from engine.request import Event, Failed, Finished, Image, Partial, Planned, Progress, Rendered, Request
from engine.worker.encoding import covered, encode, metadata, resized
from engine.worker.job_errors import to_job_error
from engine.worker.plan_cache import PlanCache

HEARTBEAT_S, HEARTBEAT_TTL_S = 1.0, 5.0
CLAIM_POLL_INTERVAL_S = 0.5  # should a wake-up have been lost
REDIS_RETRY_S = 0.3
MAX_WRITE_ATTEMPTS = 10  # of one write, with small ones taken in between: more would not help
STUCK_AFTER_S = 11.0  # a step that takes longer than this is taken for a hang,
CPU_PATIENCE_S = 15.0  # on a CPU so much longer for each megapixel under way: there a step may take that long

logger = logging.getLogger("glimmer.engine")
T = TypeVar("T")


@dataclass(frozen=True)
class Lost:
    """The job was cancelled, expired, or taken over."""


@dataclass(eq=False)
class RunningJob:
    claim: Claim
    request: Request
    span: Span
    started: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[Event | Lost] = field(default_factory=asyncio.Queue)
    results: dict[int, asyncio.Task[ImageResult]] = field(default_factory=dict)
    partials: list[asyncio.Task[None]] = field(default_factory=list)
    progress: dict[str, str | int] = field(default_factory=dict)  # last told
    error_code: str | None = None  # filled when it fails

    @property
    def source_tokens(self) -> int:
        """Of its pictures to edit: a bound until they have been read."""
        return self.request.source_tokens or self.claim.spec.source_tokens


class Worker:
    """Between the queue and the engine, until SIGTERM.

    Args:
        engine: driven by this worker's thread alone.
        info: what the heartbeats say; `info.id` is the consumer's name in the queue.
    """

    def __init__(
        self,
        engine: Engine,
        queue: JobConsumer,
        info: EngineInfo,
        settings: EngineSettings,
        tracing: Tracing = Tracing(),
    ):
        self._tracing = tracing
        self._engine, self._queue, self._info, self._settings = engine, queue, info, settings
        planner = engine.model.planning_fingerprint() if settings.plan_cache_s else ""
        self._plan_cache = PlanCache(queue, planner, settings.plan_cache_s)
        self._jobs: dict[str, RunningJob] = {}  # by the request's id, which is new with every claim
        self._job_tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()  # room was made, or the drain began
        self._draining = asyncio.Event()
        self._hand_back = asyncio.Event()  # the grace period is over
        self._stopping = threading.Event()
        self._work = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._stepped_at = time.monotonic()
        self._renewed_at = time.monotonic()
        self._redis_was_away = False

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT, then drain.

        Raises:
            Exception: what broke the engine's thread; the process cannot go on.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.drain)
        thread = asyncio.ensure_future(asyncio.to_thread(self._engine_loop))
        loops = [asyncio.ensure_future(loop()) for loop in (self._renew, self._watch_ends, self._heartbeat)]
        claiming = asyncio.ensure_future(self._claim())
        try:
            await asyncio.wait({thread, claiming, *loops}, return_when=asyncio.FIRST_COMPLETED)
            for task in (thread, claiming, *loops):
                if task.done():
                    task.result()
            await self._finish_jobs(thread)
        finally:
            self._stopping.set()
            self._work.set()
            for task in (claiming, *loops, *self._job_tasks):
                task.cancel()
            await asyncio.gather(claiming, *loops, *self._job_tasks, return_exceptions=True)
            with suppress(QueueUnavailable):
                await self._queue.deregister(self._info.id)
                await self._queue.requeue_all(self._info.id)  # only after a crash is there anything left to surrender
        await thread

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _engine_loop(self) -> None:
        while not self._stopping.is_set():
            self._stepped_at = time.monotonic()
            if self._engine.is_idle:
                self._work.wait(HEARTBEAT_S)
                self._work.clear()
            if events := self._engine.step():
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for happened in events:
            if happened.request.id in self._jobs:
                self._jobs[happened.request.id].events.put_nowait(happened)

    # --- loops --------------------------------------------------------------------------------------------------------

    async def _claim(self) -> None:
        """Take what the engine can admit, and nothing else: what waits here could be running elsewhere."""
        while not self._draining.is_set():
            self._changed.clear()
            claim = await self._next_claim()
            if claim is not None:
                self._start(claim)
                continue
            waits: set[asyncio.Task] = {
                asyncio.create_task(self._queue.wait_for_work(CLAIM_POLL_INTERVAL_S)),
                asyncio.create_task(self._changed.wait()),
            }
            _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()

    async def _next_claim(self) -> Claim | None:
        try:
            if self._redis_was_away or time.monotonic() - self._renewed_at > self._settings.lease_s / 2:
                await self._wait_for_lease_renewals()
            budget = self._budget()
            if budget.images <= 0 or self._draining.is_set() or self._is_stuck:
                return None
            if any(job.claim.quarantined for job in self._jobs.values()):
                return None
            return await self._queue.claim(self._info.id, budget)
        except QueueUnavailable as error:
            self._redis_was_away = True
            event(logger, "queue_unavailable", logging.WARNING, reason=str(error))
            await asyncio.sleep(REDIS_RETRY_S)
            return None

    async def _wait_for_lease_renewals(self) -> None:
        """After an outage every lease may have lapsed. We would be handed our own jobs as new ones, and those of living
        engines, each of which renews within this time."""
        await self._queue.ping()
        await self._renew_leases()
        self._redis_was_away = False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.lease_s / 4 + REDIS_RETRY_S):
                await self._draining.wait()

    # Loops look at `_stopping` themselves, because a cancellation can get lost inside a call to Redis.

    async def _renew(self) -> None:
        while not self._stopping.is_set():
            await asyncio.sleep(self._settings.lease_s / 4)
            if self._is_stuck:
                continue  # the leases run out, should `_give_up` not reach Redis
            with suppress(QueueUnavailable):
                await self._renew_leases()

    async def _renew_leases(self) -> None:
        for claim in await self._queue.renew(self._info.id, [job.claim for job in self._jobs.values()]):
            self._drop(_request_id(claim))
        self._renewed_at = time.monotonic()

    async def _watch_ends(self) -> None:
        async for job_id in self._queue.ended():
            for job in [job for job in self._jobs.values() if job.claim.job_id == job_id]:
                self._drop(job.request.id)

    async def _heartbeat(self) -> None:
        stuck_in: float | None = None  # the step, by when it began, that was taken for a hang last time
        while not self._stopping.is_set():
            if self._is_stuck and self._stepped_at == stuck_in:  # twice: a process that was frozen may just go on
                await self._give_up()
            stuck_in = self._stepped_at if self._is_stuck else None
            state = "stuck" if self._is_stuck else "draining" if self._draining.is_set() else "ready"
            images = sum(job.claim.spec.n for job in self._jobs.values())
            info = replace(self._info, state=state, images_running=images)
            with suppress(QueueUnavailable):
                await self._queue.heartbeat(info, self._engine.metrics.exposition(), HEARTBEAT_TTL_S)
            await asyncio.sleep(HEARTBEAT_S)

    async def _give_up(self) -> NoReturn:
        """End the process: a thread in a device call that hangs cannot be ended. Whoever watches over it starts
        another, and the jobs go to engines that move."""
        seconds = time.monotonic() - self._stepped_at
        event(logger, "engine_stuck", logging.CRITICAL, jobs=len(self._jobs), seconds=seconds)
        with suppress(QueueUnavailable):
            await self._queue.requeue_all(self._info.id)
        os._exit(EXIT_STUCK)

    # --- one job ------------------------------------------------------------------------------------------------------

    def _start(self, claim: Claim) -> None:
        deadline_at = time.monotonic() + (claim.deadline_ms - claim.claimed_at) / 1000
        request = Request(_request_id(claim), claim.spec, deadline_at, plans=dict(claim.plans))
        self._engine.metrics.plans_resumed.inc(len(claim.plans))
        self._engine.metrics.queued.observe((claim.claimed_at - claim.submitted_at) / 1000)
        job = self._jobs[request.id] = RunningJob(claim, request, self._tracing.run(claim, self._info.id))
        conductor = asyncio.ensure_future(self._run_job(job))
        self._job_tasks.add(conductor)
        conductor.add_done_callback(self._job_tasks.discard)

    async def _run_job(self, job: RunningJob) -> None:
        """See a job to its end."""
        claim, state = job.claim, None
        bind(**_ids(claim))
        event(logger, "job_claimed", run=claim.runs, images=claim.spec.n, plans_known=len(claim.plans))
        try:
            await self._load_inputs(job)
            self._engine.submit(job.request)
            self._work.set()
            state = await self._handle_events(job)
        except Exception as error:
            state = await self._fail(job, error)
        finally:
            self._engine.cancel(job.request.id)
            del self._jobs[job.request.id]
            self._changed.set()
            ended = state.value if state else "lost"
            job.span.end(error=job.error_code, attributes={"glimmer.state": ended})
        if state is not None:
            self._engine.metrics.jobs.labels(state.value).inc()
        event(logger, "job_ended", state=ended, seconds=time.monotonic() - job.started)

    async def _load_inputs(self, job: RunningJob) -> None:
        """Fetch what is kept beside the job: an edit's pictures, and plans of earlier requests that were the same."""
        claim, request = job.claim, job.request
        if claim.spec.num_sources:
            request.source_images = await self._write_with_retry(job, lambda: self._queue.source_images(claim))
        if request.source_images is not None:  # otherwise the job has ended, or is no edit
            request.preprocessed = await asyncio.to_thread(self._engine.preprocess_images, request.source_images)
            self._changed.set()  # they may be smaller than was thought
        with suppress(QueueUnavailable):
            kept = await self._plan_cache.known(claim.spec, request.source_images)
            self._engine.metrics.plan_cache_hits.inc(len(kept.keys() - claim.plans.keys()))
            request.plans = kept | request.plans

    async def _handle_events(self, job: RunningJob) -> JobState | None:
        """Act on what the engine tells of the job. Returns the state it ended in; None if it was lost."""
        while True:
            match happened := await job.events.get():
                case Planned(index=index, plan=plan):
                    image = job.request.images[index]
                    job.span.child("plan", image.admitted_at, image.planned_at or None, index)
                    await self._write_with_retry(
                        job, lambda i=index, p=plan: self._queue.checkpoint_plan(job.claim, i, p)
                    )
                    with suppress(QueueUnavailable):
                        await self._plan_cache.keep(job.claim.spec, job.request.source_images, index, plan)
                case Partial():
                    job.partials.append(asyncio.ensure_future(self._show(job, happened)))
                case Rendered(image=image, pixels=pixels):
                    job.span.child("render", image.planned_at, image.rendered_at, image.index)
                    job.span.child("decode", image.rendered_at, image.decoded_at, image.index)
                    job.results[image.index] = asyncio.ensure_future(_encode(job, image, pixels))
                case Progress(phase=phase, step=step, steps=steps):
                    job.progress = {"phase": phase, "step": step, "steps": steps}
                    with suppress(QueueUnavailable):
                        await self._queue.progress(job.claim, job.progress)
                case Finished():
                    return await self._commit(job)
                case Failed(error=error):
                    return await self._fail(job, error)
                case Lost():
                    return None

    async def _show(self, job: RunningJob, partial: Partial) -> None:
        """A partial image is worth nothing later, so an absent Redis or a failed encoder only loses it."""
        spec = job.claim.spec
        try:
            pixels = await asyncio.to_thread(resized, partial.pixels, spec.width, spec.height)
            pixels = await _under_overlay(pixels, job.request)
            data = await asyncio.to_thread(encode, pixels, spec.output_format, spec.output_compression)
            shown = PartialImage(partial.image.index, partial.index, data, partial.grid.to_dict())
            await self._queue.partial_image(job.claim, shown)
        except Exception as error:
            _log_failure("partial_image_lost", logging.WARNING, error)

    async def _commit(self, job: RunningJob) -> JobState | None:
        images = await asyncio.gather(*(job.results[index] for index in range(job.claim.spec.n)))
        await asyncio.gather(*job.partials)  # after the end nobody would see them
        request = job.request
        result = JobResult(images, len(request.prompt_ids), job.claim.spec.plan_tokens, request.source_tokens)
        began = time.monotonic()
        written = await self._write_with_retry(job, lambda: self._queue.commit(job.claim, result))
        job.span.child("commit", began)
        return JobState.SUCCEEDED if written else None

    async def _fail(self, job: RunningJob, error: Exception) -> JobState | None:
        if isinstance(error, DeadlinePassed):
            ended = await self._write_with_retry(job, lambda: self._queue.expire(job.claim.job_id))
            return JobState.EXPIRED if ended else None
        if not isinstance(error, RequestError):
            _log_failure("job_failed", logging.ERROR, error)
        told = to_job_error(error, job.claim.spec)
        job.error_code = told.code or told.type
        written = await self._write_with_retry(job, lambda: self._queue.fail(job.claim, told))
        return JobState.FAILED if written else None

    async def _write_with_retry(self, job: RunningJob, write: Callable[[], Awaitable[T]]) -> T:
        """Write to the queue, however long Redis is away or full: the work is done, and its epoch says if it counts.

        Where it is this job alone that Redis has no room for, that would be for ever, and each attempt would take
        memory from the writes of the others. A result may be larger than a value may be there, which breaks the
        connection, or than the memory that is left. Neither the error nor its number tells that from an outage, but
        small writes do: as long as they are refused, too, the large one waits for them. A write that is refused
        again and again while they pass is given up.

        Raises:
            WriteRefused: `MAX_WRITE_ATTEMPTS` attempts were refused, while small writes between them went through.
            QueueUnavailable: the engine ends.
        """
        for _ in range(MAX_WRITE_ATTEMPTS):
            try:
                return await write()
            except QueueUnavailable as error:
                event(logger, "queue_unavailable", logging.WARNING, reason=str(error))
            await self._until_small_writes_pass(job)
        raise WriteRefused(f"Redis refused a write {MAX_WRITE_ATTEMPTS} times")

    async def _until_small_writes_pass(self, job: RunningJob) -> None:
        while True:
            if self._stopping.is_set():
                raise QueueUnavailable("the engine ends")
            await asyncio.sleep(REDIS_RETRY_S)
            with suppress(QueueUnavailable):
                await self._queue.progress(job.claim, job.progress)
                return

    # --- small things -------------------------------------------------------------------------------------------------

    @property
    def _is_stuck(self) -> bool:
        patience = STUCK_AFTER_S
        if self._engine.model.device.type == "cpu":
            specs = [job.claim.spec for job in self._jobs.values()]
            patience += CPU_PATIENCE_S * sum(spec.n * spec.width * spec.height for spec in specs) / 1e6
        return time.monotonic() - self._stepped_at > patience

    def _budget(self) -> FreeCapacity:
        limits = self._engine.limits
        jobs = self._jobs.values()
        planning = [job.claim.spec for job in jobs if not job.request.is_planned]
        kv_tokens = sum(spec.plan_tokens + spec.prompt_tokens_bound for spec in planning)
        source_tokens = sum(job.source_tokens for job in jobs)
        return FreeCapacity(
            images=limits.max_images - sum(job.claim.spec.n for job in jobs),
            kv_tokens=max(0, limits.kv_tokens - kv_tokens),  # a job that has its plan needs none, though none be left
            source_tokens=max(0, limits.source_tokens - source_tokens),
            idle=not jobs,
        )

    def _drop(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].events.put_nowait(Lost())

    def drain(self) -> None:
        """Take no more jobs; `run` returns when those that run have ended, or at the end of the grace period. Asked a
        second time, hand the running jobs back at once."""
        event(logger, "draining", jobs=len(self._jobs))
        if self._draining.is_set():
            self._hand_back.set()
        self._draining.set()
        self._changed.set()

    async def _finish_jobs(self, thread: asyncio.Future[None]) -> None:
        """Give the running jobs the grace period, then hand back those that are left."""
        if self._job_tasks:
            ends = asyncio.create_task(asyncio.wait(self._job_tasks))
            over = asyncio.create_task(self._hand_back.wait())
            await asyncio.wait({ends, over, thread}, timeout=self._settings.grace_s, return_when="FIRST_COMPLETED")
            over.cancel()
        for job in list(self._jobs.values()):
            with suppress(QueueUnavailable):
                await self._queue.requeue(self._info.id, job.claim)
                event(logger, "job_handed_back", **_ids(job.claim))
            self._drop(job.request.id)


async def _encode(job: RunningJob, image: Image, pixels: torch.Tensor) -> ImageResult:
    spec, began = image.request.spec, time.monotonic()
    pixels = await _under_overlay(pixels, image.request)
    texts = metadata(spec, image.seed)
    data = await asyncio.to_thread(encode, pixels, spec.output_format, spec.output_compression, texts)
    job.span.child("encode", began, image=image.index)
    return ImageResult(data, image.seed, image.plan.to_dict() if spec.return_plan and image.plan else None)


async def _under_overlay(pixels: torch.Tensor, request: Request) -> torch.Tensor:
    """What a mask wants to keep of the picture that was edited lies over the new one."""
    overlay = request.source_images.overlay if request.source_images else None
    return pixels if overlay is None else await asyncio.to_thread(covered, pixels, overlay)


def _log_failure(name: str, level: int, error: Exception) -> None:
    """Without the error's text, which may quote a prompt."""
    event(logger, name, level, error=type(error).__name__, where=where(error))


def _ids(claim: Claim) -> dict[str, Any]:
    """What events name a job by, and the request that submitted it."""
    return {"job": claim.job_id, "request": claim.origin.request_id or None}


def _request_id(claim: Claim) -> str:
    return f"{claim.job_id}/{claim.epoch}"

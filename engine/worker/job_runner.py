import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from engine.engine import Engine
from engine.errors import (
    DeadlinePassed,
    QueueUnavailable,
    RequestError,
    StoreFailed,
    StoreUnavailable,
    UnreadableJob,
    WriteRefused,
)
from engine.jobs.consumer import JobConsumer
from engine.jobs.job import Claim, JobState
from engine.jobs.results import ImageResult, JobResult
from engine.observability.logs import bind, event, where
from engine.observability.tracing import Span
from engine.request import Event, Failed, Finished, Image, Partial, Planned, Previewed, Progress, Rendered, Request
from engine.worker.encoding import encode_partial, encode_result
from engine.worker.job_errors import to_job_error
from engine.worker.plan_cache import PlanCache

REDIS_RETRY_S = 0.3
MAX_WRITE_ATTEMPTS = 10
STORE_RETRY_S, LONGEST_STORE_RETRY_S = 0.3, 5.0
STORE_TIMEOUT_S = 60.0  # a longer outage costs the jobs that end in it

logger = logging.getLogger("glimmer.engine")
T = TypeVar("T")


@dataclass(frozen=True)
class Lost:
    """The job was cancelled, expired or taken over."""


@dataclass(eq=False)
class RunningJob:
    """A claimed job and its results."""

    claim: Claim
    request: Request
    span: Span
    started: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[Event | Lost] = field(default_factory=asyncio.Queue)
    results: dict[int, asyncio.Task[ImageResult]] = field(default_factory=dict)
    partials: list[asyncio.Task[None]] = field(default_factory=list)
    progress: dict[str, str | int] = field(default_factory=dict)  # last reported
    checkpointed: set[int] = field(default_factory=set)  # images whose plan is stored
    error_code: str | None = None

    @property
    def source_tokens(self) -> int:
        """Return the source tokens: a bound until preprocessing."""
        return self.request.source_tokens or self.claim.spec.source_tokens

    @property
    def log_fields(self) -> dict[str, Any]:
        return {"job": self.claim.job_id, "request": self.claim.origin.request_id or None}


class JobRunner:
    """Runs each claimed job in one call of `run`: a failure ends only that job.

    Args:
        stopping: ends retries.
        capacity_changed: called when exact memory is known.
    """

    def __init__(
        self,
        engine: Engine,
        queue: JobConsumer,
        consumer: str,
        plan_cache: PlanCache,
        *,
        stopping: threading.Event,
        wake_engine: Callable[[], None],
        capacity_changed: Callable[[], None],
    ):
        self._engine, self._queue, self._consumer = engine, queue, consumer
        self._plan_cache, self._stopping = plan_cache, stopping
        self._hands_over = engine.model.stage == "plan"
        self._wake_engine, self._capacity_changed = wake_engine, capacity_changed

    async def run(self, job: RunningJob) -> None:
        """Run a job to its end, hand-over or loss."""
        claim, state = job.claim, None
        bind(**job.log_fields)
        event(logger, "job_claimed", run=claim.runs, images=claim.spec.n, plans_known=len(claim.plans))
        try:
            await self._load_inputs(job)
            self._engine.submit(job.request)
            self._wake_engine()
            state = await self._handle_events(job)
        except Exception as error:
            state = await self._fail(job, error)
        finally:
            self._engine.cancel(job.request.id)
            ended = "handed_over" if state is JobState.QUEUED else state.value if state else "lost"
            job.span.end(error=job.error_code, attributes={"glimmer.state": ended})
        if state is JobState.QUEUED:
            self._engine.metrics.handed_over.inc()
        elif state is not None:
            self._engine.metrics.jobs.labels(state.value).inc()
        event(logger, "job_ended", state=ended, seconds=time.monotonic() - job.started)

    async def _load_inputs(self, job: RunningJob) -> None:
        claim, request = job.claim, job.request
        if claim.handed_over is None and self._engine.model.stage == "render":
            raise UnreadableJob("a job to render came without what a planner hands over")
        if claim.spec.num_sources:
            request.source_images = await self._write_with_retry(job, lambda: self._queue.source_images(claim))
        if request.source_images is not None:  # deleted when the job ends
            request.preprocessed = await asyncio.to_thread(self._engine.preprocess_images, request.source_images)
            self._capacity_changed()
        if claim.handed_over:
            request.source_codes = list(claim.handed_over.sources)
            return
        with suppress(QueueUnavailable):
            cached = await self._plan_cache.lookup(claim.spec, request.source_images)
            self._engine.metrics.plan_cache_hits.inc(len(cached.keys() - claim.plans.keys()))
            request.plans = cached | request.plans

    async def _handle_events(self, job: RunningJob) -> JobState | None:
        """Return the final state, QUEUED if it was handed over, None if it was lost."""
        while True:
            match await job.events.get():
                case Planned(index=index, plan=plan):
                    image = job.request.images[index]
                    job.span.child("plan", image.admitted_at, image.planned_at or None, index)
                    if not (self._hands_over and job.request.is_planned):
                        await self._write_with_retry(
                            job, lambda i=index, p=plan: self._queue.checkpoint_plan(job.claim, i, p)
                        )
                        job.checkpointed.add(index)
                    with suppress(QueueUnavailable):
                        await self._plan_cache.store(job.claim.spec, job.request.source_images, index, plan)
                case Previewed(index=index, grid=grid):
                    if not job.claim.quarantined:  # it must not run beside others
                        with suppress(QueueUnavailable):
                            await self._queue.offer_preview(job.claim, index, grid)
                case Partial() as partial:
                    job.partials.append(asyncio.ensure_future(self._send_partial(job, partial)))
                case Rendered(image=image, pixels=pixels):
                    job.span.child("render", image.planned_at, image.rendered_at, image.index)
                    job.span.child("decode", image.rendered_at, image.decoded_at, image.index)
                    job.results[image.index] = asyncio.ensure_future(_encode(job, image, pixels))
                case Progress(phase=phase, step=step, steps=steps):
                    job.progress = {"phase": phase, "step": step, "steps": steps}
                    with suppress(QueueUnavailable):
                        await self._queue.progress(job.claim, job.progress)
                case Finished():
                    return await (self._hand_over(job) if self._hands_over else self._commit(job))
                case Failed(error=error):
                    return await self._fail(job, error)
                case Lost():
                    return None

    async def _hand_over(self, job: RunningJob) -> JobState | None:
        """Queue the job for the renderers, with the plans that are stored nowhere."""
        request = job.request
        stored = range(job.claim.spec.n) if job.claim.spec.plan else job.checkpointed | job.claim.plans.keys()
        plans = {image.index: image.plan for image in request.images if image.plan and image.index not in stored}
        rest = plans, len(request.prompt_ids), request.source_codes
        written = await self._write_with_retry(job, lambda: self._queue.hand_over(self._consumer, job.claim, *rest))
        return JobState.QUEUED if written else None

    async def _send_partial(self, job: RunningJob, partial: Partial) -> None:
        """Send without retries: a late one is useless."""
        try:
            await self._queue.partial_image(job.claim, await asyncio.to_thread(encode_partial, partial))
        except Exception as error:
            _log_failure("partial_image_lost", logging.WARNING, error)

    async def _commit(self, job: RunningJob) -> JobState | None:
        images = await asyncio.gather(*(job.results[index] for index in range(job.claim.spec.n)))
        await asyncio.gather(*job.partials)  # none is delivered after the commit
        request = job.request
        handed_over = job.claim.handed_over
        prompt_tokens = handed_over.prompt_tokens if handed_over else len(request.prompt_ids)
        began = time.monotonic()
        images = await self._store_images(job, images)
        result = JobResult(images, prompt_tokens, job.claim.spec.plan_tokens, request.source_tokens)
        written = await self._write_with_retry(job, lambda: self._queue.commit(job.claim, result))
        job.span.child("commit", began)
        if not written:
            await self._queue.drop_images(images)
        return JobState.SUCCEEDED if written else None

    async def _store_images(self, job: RunningJob, images: list[ImageResult]) -> list[ImageResult]:
        """Write the images to the result store, with retries.

        Raises:
            StoreFailed: it failed for `STORE_TIMEOUT_S`.
            QueueUnavailable: the process ends.
        """
        give_up_at, pause = time.monotonic() + STORE_TIMEOUT_S, STORE_RETRY_S
        while True:
            with suppress(StoreUnavailable):
                return await self._queue.store_images(job.claim, images)
            self._engine.metrics.result_store_failures.inc()
            if self._stopping.is_set():
                raise QueueUnavailable("the engine ends")
            if time.monotonic() > give_up_at:
                raise StoreFailed(f"the result store failed for {STORE_TIMEOUT_S} seconds")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_STORE_RETRY_S)

    async def _fail(self, job: RunningJob, error: Exception) -> JobState | None:
        if isinstance(error, DeadlinePassed):
            expired = await self._write_with_retry(job, lambda: self._queue.expire(job.claim.job_id))
            return JobState.EXPIRED if expired else None
        if not isinstance(error, RequestError):
            _log_failure("job_failed", logging.ERROR, error)
        job_error = to_job_error(error, job.claim.spec)
        job.error_code = job_error.code or job_error.type
        written = await self._write_with_retry(job, lambda: self._queue.fail(job.claim, job_error))
        return JobState.FAILED if written else None

    async def _write_with_retry(self, job: RunningJob, write: Callable[[], Awaitable[T]]) -> T:
        """Retry a write while Redis is unavailable; the epoch makes this safe.

        A value over Redis' size limit (which breaks the connection) or free memory fails like an outage, but small
        writes succeed: each retry waits for one. `MAX_WRITE_ATTEMPTS` bounds what it takes from others.

        Raises:
            WriteRefused: Redis accepts only small writes.
            QueueUnavailable: the process ends.
        """
        for _ in range(MAX_WRITE_ATTEMPTS):
            with suppress(QueueUnavailable):
                return await write()
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


async def _encode(job: RunningJob, image: Image, pixels: Tensor) -> ImageResult:
    began = time.monotonic()
    result = await asyncio.to_thread(encode_result, image, pixels)
    job.span.child("encode", began, image=image.index)
    return result


def _log_failure(name: str, level: int, error: Exception) -> None:
    # without the text, which may quote a prompt
    event(logger, name, level, error=type(error).__name__, where=where(error))

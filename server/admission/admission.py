"""Who gets in: nobody while draining, nobody without an engine, and never more than the queue may hold."""

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.errors import KeyReused, QueueFull, QueueUnavailable, SourcesFull, TooManyJobs
from engine.geometry import MIN_SIDE
from engine.jobs.job import EngineInfo, JobSources, JobSpec, Origin, Priority
from engine.jobs.producer import JobProducer
from server.admission.abandoned_jobs import Withdrawals
from server.admission.keys import Caller
from server.admission.rate_limits import NOTHING, Charge, Limits
from server.errors import DRAINING_RETRY_S, ENGINE_RETRY_S, ApiError, unavailable

ENGINES_FRESH_S = 1.0  # how long the list of live engines may be reused
MIN_RETRY_S, MAX_RETRY_S = 1, 60
REDIS_PATIENCE_S = 0.8  # of a Redis that is cut off without a reset: a client hears within a second
SOURCE_BYTES_PER_S = 20e6  # that a link to Redis carries at least: large pictures get so much more time

_NO_JOB = JobSpec("", MIN_SIDE, MIN_SIDE, seed=0)  # stands for one where none is to be put into the queue
_FULL = "The queue is full"
_FULL_OF_PICTURES = "The pictures of the edits in the queue take all the memory there is for them"

T = TypeVar("T")


async def in_time(asked: Awaitable[T], size: int = 0) -> T:
    """What Redis says, if it says it while a client or a probe can wait.

    Args:
        size: of what it is sent, in bytes, where that is large.

    Raises:
        QueueUnavailable: it took longer than `REDIS_PATIENCE_S`, and what the size takes.
    """
    patience_s = REDIS_PATIENCE_S + size / SOURCE_BYTES_PER_S
    try:
        async with asyncio.timeout(patience_s):
            return await asked
    except TimeoutError:
        raise QueueUnavailable(f"no answer from Redis within {patience_s:.1f} s") from None


class Gate:
    """Counts the requests being served and, once closed, lets no further one in."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    def close(self) -> None:
        """Start of the drain; there is no way back."""
        self.closed = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Holds a place while a request is served.

        Raises:
            ApiError: 503 when the gate is closed.
        """
        if self.closed:
            raise unavailable("This server is shutting down; try again.", DRAINING_RETRY_S)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def ready_engines(engines: list[EngineInfo]) -> list[EngineInfo]:
    """The engines that take work now."""
    return [engine for engine in engines if engine.state == "ready"]


class EngineDirectory:
    """The live engines, asked for at most once a second however many requests come in.

    Requests that come while Redis is being asked share its answer, and a failure too: one after the other they would
    each wait for a Redis that hangs.
    """

    def __init__(self, queue: JobProducer) -> None:
        self._queue = queue
        self._engines: list[EngineInfo] = []
        self._read_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def live(self) -> list[EngineInfo]:
        """Engines with a fresh heartbeat, in any state.

        Raises:
            QueueUnavailable: Redis is away.
        """
        if time.monotonic() - self._read_at > ENGINES_FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
                self._asking.add_done_callback(_retrieve)
            await asyncio.shield(self._asking)  # a caller that is cancelled must not take the others along
        return self._engines

    async def _ask(self) -> None:
        self._engines = await in_time(self._queue.engines())
        self._read_at = time.monotonic()

    async def one_ready(self) -> EngineInfo:
        """An engine to fit a job to; all of a deployment serve one model.

        Raises:
            ApiError: 503 when no engine takes work now.
        """
        live = await self.live()
        ready = ready_engines(live)
        if not ready:
            raise unavailable(why_not_ready(live), ENGINE_RETRY_S)
        return ready[0]


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Keeps asyncio from complaining of a failure that all who waited for it have left behind."""
    if not task.cancelled():
        task.exception()


def why_not_ready(engines: list[EngineInfo]) -> str:
    """In words, for a set of engines that `ready_engines` finds wanting."""
    if not engines:
        return "No engine is running."
    states = sorted({engine.state for engine in engines})
    if states == ["starting"]:
        return "The engine is still starting."
    return f"No engine can take work now (states: {', '.join(states)})."


class Pace:
    """How often jobs end, to tell a refused client when to come back.

    An idle hour says nothing about the pace, so the time between two ends counts at most as long as a job took.
    """

    def __init__(self) -> None:
        self._interval_s: float | None = None
        self._last_end = -math.inf

    def ended(self, duration_s: float) -> None:
        now = time.monotonic()
        interval = min(now - self._last_end, duration_s)
        self._last_end = now
        self._interval_s = interval if self._interval_s is None else 0.9 * self._interval_s + 0.1 * interval

    def seconds_until_end(self, ahead: int) -> float | None:
        """About how long until a job with `ahead` others before it will have ended; None before any has."""
        return None if self._interval_s is None else round(self._interval_s * (ahead + 1), 1)

    def retry_after_s(self, queued: int) -> int:
        """Whole seconds until about a tenth of `queued` jobs, at least one, will have ended."""
        interval = self._interval_s if self._interval_s is not None else 1.0
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(interval * max(1, queued // 10))))


@dataclass(frozen=True)
class Idempotency:
    """What makes a repeated request find the job of the first.

    Args:
        key: the `Idempotency-Key` as it was sent. Another caller's equal key is another key.
        fingerprint: a hash of what was asked for; the key with another one is refused.
    """

    key: str
    fingerprint: str

    def scoped(self, caller: Caller) -> str:
        """The key in Redis: of bounded length, and the caller's own."""
        return hashlib.sha256(f"{caller.owner}\0{self.key}".encode()).hexdigest()


@dataclass(frozen=True)
class Admitted:
    """A job in the queue. `attached`: it is an earlier request's, which may be waiting for it, too."""

    job_id: str
    attached: bool = False


class Admission:
    """Puts jobs into the queue while it has room and the caller may.

    The order for a request: `earlier`, which costs nothing; `charge`; only then what takes time or money, such as
    rewriting the prompt; `submit`, which gives the charge back where no job comes of it.
    """

    def __init__(
        self,
        queue: JobProducer,
        limits: Limits,
        max_queue: int,
        withdrawals: Withdrawals,
        max_source_bytes: int | None = None,
    ) -> None:
        self._queue, self._limits = queue, limits
        self._max_queue, self._max_source_bytes = max_queue, max_source_bytes
        self._withdrawals = withdrawals
        self.pace = Pace()

    async def expect_room(self) -> None:
        """For those who are about to decode the pictures of an edit.

        Raises:
            ApiError: 429 when the queue is at a cap now.
            QueueUnavailable: Redis is away.
        """
        stats = await in_time(self._queue.stats())
        if stats.waiting >= self._max_queue:
            raise self._come_back(_FULL, self._max_queue)
        if self._max_source_bytes is not None and stats.source_bytes >= self._max_source_bytes:
            raise self._come_back(_FULL_OF_PICTURES, 1)

    async def earlier(self, caller: Caller, idempotency: Idempotency) -> str | None:
        """The id of the job that a repeated request is to be answered with; None if it is the first, or if that one
        ended without a result.

        Raises:
            ApiError: 422 when the key came with another request.
            QueueUnavailable: Redis is away.
        """
        try:
            # A submit to a queue without room: only a known key gets past that.
            return await self._put(
                _NO_JOB, caller, idempotency, job_id=_new_id(), timeout_s=1.0, priority="batch", max_queue=0
            )
        except QueueFull:
            return None

    async def charge(self, caller: Caller, spec: JobSpec) -> Charge:
        """Counts the job against the limits of the caller's key. `headers` of the charge go onto the answer.

        Raises:
            ApiError: 429 when a limit is reached; nothing is charged.
            QueueUnavailable: Redis is away. Should it have counted the job before that, the charge stands.
        """
        pixel_steps = spec.width * spec.height * spec.num_inference_steps * spec.n
        return await in_time(self._limits.charge(caller, pixel_steps))

    async def submit(
        self,
        spec: JobSpec,
        timeout_s: float,
        priority: Priority,
        charge: Charge = NOTHING,
        *,
        sources: JobSources | None = None,
        notes: dict[str, Any] | None = None,
        idempotency: Idempotency | None = None,
        origin: Origin = Origin(),
    ) -> Admitted:
        """Reserves a place and queues the job of the caller who was charged, in one atomic step.

        Without an answer the job may be queued all the same. Nobody would wait for it, so it is withdrawn then, and the
        charge given back when that is done. But not with an idempotency key, under which another request may have found
        the job or may ask for it: there the charge stands, and a repetition costs nothing if it finds the job.

        Raises:
            ApiError: 429 when the queue is at a cap or the caller at its own; 422 when the idempotency key came with
                another request.
            QueueUnavailable: Redis is away.
        """
        job_id, caller = _new_id(), charge.caller
        try:
            found = await self._put(
                spec,
                caller,
                idempotency,
                job_id=job_id,
                timeout_s=timeout_s,
                priority=priority,
                max_queue=self._max_queue,
                sources=sources,
                max_source_bytes=self._max_source_bytes,
                notes=notes,
                origin=origin,
            )
        except (QueueFull, TooManyJobs) as refusal:
            await self._refund(charge)
            raise self._refused(refusal, caller) from None
        except ApiError:
            await self._refund(charge)
            raise
        except (QueueUnavailable, asyncio.CancelledError):
            if idempotency is None:
                self._withdrawals.start(job_id, then=lambda: self._refund(charge))
            raise
        if found != job_id:
            await self._refund(charge)
        return Admitted(found, attached=found != job_id)

    async def _put(
        self,
        spec: JobSpec,
        caller: Caller,
        idempotency: Idempotency | None,
        *,
        sources: JobSources | None = None,
        **how: Any,
    ) -> str:
        """`JobProducer.submit` on behalf of a caller."""
        try:
            return await in_time(
                self._queue.submit(
                    spec,
                    sources=sources,
                    owner=caller.owner,
                    max_owned=caller.max_concurrent,
                    idempotency_key=idempotency.scoped(caller) if idempotency else "",
                    fingerprint=idempotency.fingerprint if idempotency else "",
                    **how,
                ),
                sources.size if sources else 0,
            )
        except KeyReused:
            raise ApiError(
                422,
                "This Idempotency-Key came with another request before; use a new key for each request.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            ) from None

    async def _refund(self, charge: Charge) -> None:
        with suppress(QueueUnavailable):  # then a refusal has cost something; a day is soon over
            await in_time(self._limits.refund(charge))

    def _refused(self, refusal: QueueFull | TooManyJobs, caller: Caller) -> ApiError:
        if isinstance(refusal, SourcesFull):
            return self._come_back(_FULL_OF_PICTURES, 1)
        if isinstance(refusal, QueueFull):
            return self._come_back(_FULL, self._max_queue)
        most = caller.max_concurrent or 0
        return self._come_back(f"This key may have {most} jobs waiting and running at once", most)

    def _come_back(self, reason: str, jobs: int) -> ApiError:
        """429, with the time until about a tenth of `jobs` will have ended."""
        retry = self.pace.retry_after_s(jobs)
        return ApiError(
            429,
            f"{reason}; try again in about {retry} s.",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"retry-after": str(retry)},
        )


def _new_id() -> str:
    return f"job_{uuid.uuid4().hex}"

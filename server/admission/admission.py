"""Who gets in: nobody while draining, nobody without an engine, and never more than the queue may hold."""

import asyncio
import hashlib
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.errors import KeyReused, QueueFull, QueueUnavailable, SourcesFull, TooManyJobs
from engine.geometry import MIN_SIDE
from engine.jobs.job import JobSpec, Origin, Priority, SourceImages
from engine.jobs.producer import JobProducer
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.keys import Caller
from server.admission.rate_limits import NO_CHARGE, Charge, RateLimits
from server.admission.throughput import Throughput
from server.errors import ApiError
from server.redis_timeout import with_redis_timeout

_NO_JOB = JobSpec("", MIN_SIDE, MIN_SIDE, seed=0)  # stands for one where none is to be put into the queue
_FULL = "The queue is full"
_FULL_OF_PICTURES = "The pictures of the edits in the queue take all the memory there is for them"


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

    The order for a request: `find_by_idempotency_key`, which costs nothing; `charge`; only then what takes time or
    money, such as rewriting the prompt; `submit`, which gives the charge back where no job comes of it.
    """

    def __init__(
        self,
        queue: JobProducer,
        limits: RateLimits,
        max_queue: int,
        abandoned_jobs: AbandonedJobs,
        max_source_bytes: int | None = None,
    ) -> None:
        self._queue, self._limits = queue, limits
        self._max_queue, self._max_source_bytes = max_queue, max_source_bytes
        self._abandoned_jobs = abandoned_jobs
        self.throughput = Throughput()

    async def check_room(self) -> None:
        """For those who are about to decode the pictures of an edit.

        Raises:
            ApiError: 429 when the queue is at a cap now.
            QueueUnavailable: Redis is away.
        """
        stats = await with_redis_timeout(self._queue.stats())
        if stats.waiting >= self._max_queue:
            raise self._try_again_later(_FULL, self._max_queue)
        if self._max_source_bytes is not None and stats.source_bytes >= self._max_source_bytes:
            raise self._try_again_later(_FULL_OF_PICTURES, 1)

    async def find_by_idempotency_key(self, caller: Caller, idempotency: Idempotency) -> str | None:
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
        return await with_redis_timeout(self._limits.charge(caller, pixel_steps))

    async def submit(
        self,
        spec: JobSpec,
        timeout_s: float,
        priority: Priority,
        charge: Charge = NO_CHARGE,
        *,
        source_images: SourceImages | None = None,
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
                source_images=source_images,
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
                self._abandoned_jobs.discard(job_id, then=lambda: self._refund(charge))
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
        source_images: SourceImages | None = None,
        **how: Any,
    ) -> str:
        """`JobProducer.submit` on behalf of a caller."""
        try:
            return await with_redis_timeout(
                self._queue.submit(
                    spec,
                    source_images=source_images,
                    owner=caller.owner,
                    max_owned=caller.max_concurrent,
                    idempotency_key=idempotency.scoped(caller) if idempotency else "",
                    fingerprint=idempotency.fingerprint if idempotency else "",
                    **how,
                ),
                source_images.size if source_images else 0,
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
            await with_redis_timeout(self._limits.refund(charge))

    def _refused(self, refusal: QueueFull | TooManyJobs, caller: Caller) -> ApiError:
        if isinstance(refusal, SourcesFull):
            return self._try_again_later(_FULL_OF_PICTURES, 1)
        if isinstance(refusal, QueueFull):
            return self._try_again_later(_FULL, self._max_queue)
        most = caller.max_concurrent or 0
        return self._try_again_later(f"This key may have {most} jobs waiting and running at once", most)

    def _try_again_later(self, reason: str, jobs: int) -> ApiError:
        """429, with the time until about a tenth of `jobs` will have ended."""
        retry = self.throughput.retry_after_s(jobs)
        return ApiError(
            429,
            f"{reason}; try again in about {retry} s.",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"retry-after": str(retry)},
        )


def _new_id() -> str:
    return f"job_{uuid.uuid4().hex}"

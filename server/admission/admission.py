import asyncio
import hashlib
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.errors import KeyReused, QueueFull, QueueUnavailable, ResultsFull, SourcesFull, TooManyJobs, TooMuchKept
from engine.geometry import MIN_SIDE
from engine.jobs.job import JobRecord, JobSpec, Origin, Priority, SourceImages, Submitted
from engine.jobs.producer import JobProducer
from server.admission.abandoned_jobs import AbandonedJobs
from server.admission.keys import Caller
from server.admission.rate_limits import NO_CHARGE, Charge, RateLimits
from server.admission.redis_memory import RedisMemory
from server.admission.throughput import Throughput
from server.errors import ApiError, too_many, unavailable
from server.redis_timeout import with_redis_timeout

_NO_JOB = JobSpec("", MIN_SIDE, MIN_SIDE, seed=0)  # to look up an idempotency key
_ONE_BYTE = SourceImages([b"\0"])  # to ask for room for any
_QUEUE_FULL = "The queue is full"
_RESULTS_FULL = "The jobs and the results that are kept take all the memory reserved for them"
_TOO_MUCH_KEPT = "The jobs of this key and its results, which are kept for a while, take all the memory one key may use"
_OWNER_PARTS = 2  # one key may keep half of what all may
_SOURCES_FULL = "The images of queued edits take all the memory reserved for them"


@dataclass(frozen=True)
class Idempotency:
    """An `Idempotency-Key` and the hash of its request."""

    key: str
    fingerprint: str

    def scoped(self, caller: Caller) -> str:
        """Return the key in Redis, one per caller."""
        return hashlib.sha256(f"{caller.owner}\0{self.key}".encode()).hexdigest()


@dataclass(frozen=True)
class Admitted:
    """A queued job. `attached`: an earlier request submitted it. `record`: as it was queued."""

    job_id: str
    attached: bool = False
    record: JobRecord | None = None


class Admission:
    """Submits jobs within the limits of queue and caller.

    A request calls `find_by_idempotency_key`, which is free; `check_room`, before expensive work; `charge`; `top_up`;
    `submit`, or `refund`. Methods raise `QueueUnavailable`.
    """

    def __init__(
        self,
        queue: JobProducer,
        limits: RateLimits,
        max_queue: int,
        abandoned_jobs: AbandonedJobs,
        max_source_bytes: int | None = None,
        max_result_bytes: int | None = None,
        *,
        api_id: str = "",
    ) -> None:
        self._queue, self._limits, self._api_id = queue, limits, api_id
        self._max_queue, self._max_source_bytes, self._max_result_bytes = max_queue, max_source_bytes, max_result_bytes
        self.memory = RedisMemory(queue)
        self._abandoned_jobs = abandoned_jobs
        self.throughput = Throughput()

    async def check_room(self, caller: Caller, idempotency: Idempotency | None, *, has_sources: bool) -> str | None:
        """Raise as `submit` would; return the job of a concurrent request with the same key."""
        job_id = _new_id()
        try:
            found = await self._enqueue(
                _NO_JOB,
                caller,
                idempotency,
                job_id=job_id,
                timeout_s=1.0,
                priority="batch",
                max_queue=self._max_queue,
                source_images=_ONE_BYTE if has_sources else None,
                dry_run=True,
                **await self._memory_limits(),
            )
        except (QueueFull, TooManyJobs) as refusal:
            raise self._refused(refusal, caller) from None
        return None if found.job_id == job_id else found.job_id

    async def find_by_idempotency_key(self, caller: Caller, idempotency: Idempotency) -> str | None:
        """Return the first request's job, None without a result; raise a 422 if that request differs."""
        try:
            # A `max_queue` of 0 refuses all but known keys.
            submitted = await self._enqueue(
                _NO_JOB, caller, idempotency, job_id=_new_id(), timeout_s=1.0, priority="batch", max_queue=0
            )
        except QueueFull:
            return None
        return submitted.job_id

    async def charge(self, caller: Caller, spec: JobSpec) -> Charge:
        """Charge the caller, or raise a 429. Without a response from Redis the charge may stand."""
        return await with_redis_timeout(self._limits.charge(caller, spec.pixel_steps))

    async def top_up(self, charge: Charge, spec: JobSpec) -> None:
        """Charge what the job takes beyond `charge`. Raises as `charge`."""
        if spec.pixel_steps > charge.pixel_steps:
            await with_redis_timeout(self._limits.top_up(charge, spec.pixel_steps))

    async def refund(self, charge: Charge) -> None:
        """Take the charge back."""
        with suppress(QueueUnavailable):  # the charge stays, at most until the end of the day
            await with_redis_timeout(self._limits.refund(charge))

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
        waits: bool = False,
    ) -> Admitted:
        """Queue the job of the charged caller atomically.

        If Redis does not respond, the job may be queued. It is discarded, then refunded, except with an idempotency
        key, by which other requests may find it free of charge.

        Args:
            waits: only this connection brings the client the result; the job ends with this process.

        Raises:
            ApiError: 429 at a limit; 503 without memory in Redis; 422 as `find_by_idempotency_key`.
        """
        job_id, caller = _new_id(), charge.caller
        try:
            submitted = await self._enqueue(
                spec,
                caller,
                idempotency,
                job_id=job_id,
                timeout_s=timeout_s,
                priority=priority,
                max_queue=self._max_queue,
                source_images=source_images,
                **await self._memory_limits(),
                url_copies=bool(notes and notes.get("file_tokens")),
                notes=notes,
                ended_notes=notes | {"revised_prompt": None} if notes and notes.get("revised_prompt") else None,
                origin=origin,
                api_id=self._api_id if waits else "",
            )
        except (QueueFull, TooManyJobs) as refusal:
            await self.refund(charge)
            raise self._refused(refusal, caller) from None
        except ApiError:
            await self.refund(charge)
            raise
        except (QueueUnavailable, asyncio.CancelledError):
            if idempotency is None:
                self._abandoned_jobs.discard(job_id, then=lambda: self.refund(charge))
            raise
        is_attached = submitted.job_id != job_id
        if is_attached:
            await self.refund(charge)
        return Admitted(submitted.job_id, is_attached, submitted.record)

    async def _enqueue(
        self,
        spec: JobSpec,
        caller: Caller,
        idempotency: Idempotency | None,
        *,
        source_images: SourceImages | None = None,
        **options: Any,
    ) -> Submitted:
        try:
            return await with_redis_timeout(
                self._queue.submit(
                    spec,
                    source_images=source_images,
                    owner=caller.owner,
                    max_owned=caller.max_concurrent,
                    idempotency_key=idempotency.scoped(caller) if idempotency else "",
                    fingerprint=idempotency.fingerprint if idempotency else "",
                    **options,
                ),
                source_images.size if source_images else 0,
            )
        except KeyReused:
            raise ApiError(
                422,
                "This Idempotency-Key was used with a different request; use a new key for each request.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            ) from None

    async def _memory_limits(self) -> dict[str, int | None]:
        return {
            "max_source_bytes": self._max_source_bytes,
            "max_result_bytes": self._max_result_bytes,
            "max_kept_bytes": await self.memory.max_kept_bytes(),
            "owner_parts": _OWNER_PARTS,
        }

    def _refused(self, refusal: QueueFull | TooManyJobs, caller: Caller) -> ApiError:
        if isinstance(refusal, SourcesFull):
            return self._try_again_later(_SOURCES_FULL, 1)
        if isinstance(refusal, ResultsFull):
            retry = self.throughput.retry_after_s(self._max_queue)
            return unavailable(f"{_RESULTS_FULL}; try again in about {retry} s.", retry)
        if isinstance(refusal, TooMuchKept):
            return self._try_again_later(_TOO_MUCH_KEPT, self._max_queue)
        if isinstance(refusal, QueueFull):
            return self._try_again_later(_QUEUE_FULL, self._max_queue)
        maximum = caller.max_concurrent or 0
        return self._try_again_later(f"This key may have {maximum} jobs waiting and running at once", maximum)

    def _try_again_later(self, reason: str, jobs: int) -> ApiError:
        retry = self.throughput.retry_after_s(jobs)
        return too_many(f"{reason}; try again in about {retry} s.", retry)


def _new_id() -> str:
    return f"job_{uuid.uuid4().hex}"

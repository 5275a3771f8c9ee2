"""The engines' side of the job queue."""

import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import orjson
import redis.asyncio

from engine.errors import UnreadableJob
from engine.jobs.base import QueueBase
from engine.jobs.codec import decode_cached_plan, decode_claim, decode_sources, encode_plan, encode_result, reading
from engine.jobs.connection import redis_errors
from engine.jobs.job import (
    JOB_FORMAT,
    MAX_PLAN_BYTES,
    PLAN_PART,
    UNREADABLE_JOB,
    Claim,
    EngineInfo,
    FreeCapacity,
    JobError,
    Plan,
    SourceImages,
)
from engine.jobs.results import JobResult, PartialImage
from engine.jobs.scripts import Argument

_DEAD_LETTER_ERROR = JobError("The job brought its engine down each time it ran and was given up.")


class JobConsumer(QueueBase):
    """Claims jobs and writes for them. A write for a lost claim returns False."""

    known_format = JOB_FORMAT
    planner = ""  # fingerprint; plans of another are not resumed

    def __init__(self, redis: redis.asyncio.Redis, **options: Any):
        super().__init__(redis, **options)
        self._unanswered: dict[str, str] = {}  # claim attempts without a reply, by consumer

    async def claim(self, consumer: str, free: FreeCapacity) -> Claim | None:
        """Claim the next job if it fits, else none: large and quarantined jobs must not starve.

        Lapsed leases come first, also this engine's: renew before. After a lost reply, the next call gets the same
        grant.
        """
        attempt = self._unanswered.pop(consumer, None) or secrets.token_hex(8)
        try:
            while True:
                granted = await self.attempt_claim(consumer, free, attempt)
                if granted is None or not await self.renew(consumer, [granted]):
                    return granted
                attempt = secrets.token_hex(8)
        except BaseException:
            self._unanswered[consumer] = attempt
            raise

    async def attempt_claim(self, consumer: str, free: FreeCapacity, attempt: str) -> Claim | None:
        """Claim a job, not yet a run. A repeated attempt gets the same grant."""
        while True:
            reply = await self._scripts.run(
                "claim",
                orjson.dumps(_DEAD_LETTER_ERROR.to_dict()),
                consumer=consumer,
                attempt=attempt,
                images=free.images,
                kv_tokens=free.kv_tokens,
                source_tokens=free.source_tokens,
                idle=free.idle,
                lease_ms=self._lease_ms,
                max_format=self.known_format,
                orphan_ms=self._orphan_ms,
            )
            if reply is None:
                return None
            if isinstance(reply, list):
                job_id, epoch = reply[0].decode(), reply[1]
                with suppress(UnreadableJob), reading(job_id):
                    return decode_claim(reply, self.planner)
                error = orjson.dumps(UNREADABLE_JOB.to_dict())
                await self._scripts.run("fail", error, id=job_id, epoch=epoch)

    async def renew(self, consumer: str, claims: Iterable[Claim]) -> list[Claim]:
        """Restart leases, several times per `lease_ms`; return the lost claims.

        The first renewal makes a claim a run; one of a lost claim shows that its engine lives.
        """
        claims = list(claims)
        if not claims:
            return []
        held = [(claim.job_id, claim.epoch) for claim in claims]
        lost = await self._scripts.run("renew", consumer=consumer, claims=held, orphan_ms=self._orphan_ms)
        return [claims[index] for index in lost]

    async def progress(self, claim: Claim, progress: dict[str, Any]) -> bool:
        """Store the progress."""
        return await self._write("progress", claim, orjson.dumps(progress))

    async def checkpoint_plan(self, claim: Claim, index: int, plan: Plan) -> bool:
        """Store a plan for a later run."""
        return await self._write("checkpoint_plan", claim, encode_plan(plan, self.planner), index=index)

    async def source_images(self, claim: Claim) -> SourceImages | None:
        """Return a live edit's images; raise `UnreadableJob` if damaged."""
        with redis_errors(), reading(claim.job_id):
            return decode_sources(await self._redis.hgetall(self.key("sources", claim.job_id)))

    async def partial_image(self, claim: Claim, partial: PartialImage) -> bool:
        """Store a partial image."""
        grid = orjson.dumps(partial.grid)
        return await self._write("partial_image", claim, partial.data, grid, image=partial.image, index=partial.index)

    async def cached_plans(self, keys: Sequence[str]) -> list[Plan | None]:
        """Return cached plans."""
        with redis_errors():
            plans = await self._redis.mget([self.key("plan", key) for key in keys])
        return [None if plan is None else decode_cached_plan(plan) for plan in plans]

    async def cache_plan(self, key: str, plan: Plan, ttl_s: int) -> None:
        """Cache a plan; beyond `MAX_PLAN_BYTES`, the oldest go."""
        limits: dict[str, Argument] = {"max_bytes": MAX_PLAN_BYTES, "part": PLAN_PART}
        await self._scripts.run("cache_plan", orjson.dumps(plan.to_dict()), key=key, ttl_ms=1000 * ttl_s, **limits)

    async def commit(self, claim: Claim, result: JobResult) -> bool:
        """Store the result and end the job."""
        return await self._write("commit", claim, *encode_result(result))

    async def fail(self, claim: Claim, error: JobError) -> bool:
        """End the job as failed."""
        return await self._write("fail", claim, orjson.dumps(error.to_dict()))

    async def requeue(self, consumer: str, claim: Claim) -> bool:
        """Requeue the job; this run does not count."""
        return await self._write("requeue", claim, consumer=consumer)

    async def requeue_all(self, consumer: str, blame: bool = True) -> int:
        """Requeue a dead engine's jobs; return how many.

        Args:
            blame: the jobs may have ended the engine. False leaves no trace of its runs.
        """
        return await self._scripts.run("requeue_all", consumer=consumer, blame=blame)

    async def heartbeat(self, info: EngineInfo, metrics: str, ttl_s: float) -> None:
        """List the engine as live for `ttl_s`."""
        await self._scripts.run(
            "heartbeat", orjson.dumps(info.to_dict()), metrics, id=info.id, ttl_ms=round(ttl_s * 1000)
        )

    async def deregister(self, engine_id: str) -> None:
        """Delete the heartbeat."""
        with redis_errors():
            await self._redis.delete(self.key("engine", engine_id))

    async def wait_for_work(self, timeout_s: float) -> None:
        """Return when work was queued, or after `timeout_s`."""
        await self._wake_ups.wait(timeout_s)

    async def _write(self, script: str, claim: Claim, *blobs: str | bytes, **arguments: Argument) -> bool:
        return bool(await self._scripts.run(script, *blobs, id=claim.job_id, epoch=claim.epoch, **arguments))
